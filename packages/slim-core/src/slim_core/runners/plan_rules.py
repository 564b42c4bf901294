"""How rules that name linears or attentions by pattern are settled: who has which, and what is worth telling."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from slim_core.model.attention import AttentionInfo
from slim_core.model.units import LinearInfo
from slim_core.processors.base import AttentionRule, LinearRule
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.statistics import Need
from slim_core.recipe import NameFilter

__all__ = ["first_to_name", "spellings", "weight_rule", "why_float"]

Rule = TypeVar("Rule", LinearRule, AttentionRule)


def first_to_name(
    rules: Sequence[Rule], infos: Iterable[LinearInfo | AttentionInfo], what: str
) -> tuple[dict[str, Rule], list[str]]:
    """The first rule that names something has it; later ones that name it too are worth a warning.

    A recipe may use the names of the checkpoint or those of the model, where the two differ.

    Args:
        what: they are, e.g. ``linears``.
    """
    spelled = {info.name: spellings(info) for info in infos}
    owners: dict[str, Rule] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        for name, names in spelled.items():
            if not rule.filter.matches(*names):
                continue
            if (owner := owners.get(name)) is not None:
                twice.setdefault((rule.position, owner.position), []).append(name)
            else:
                owners[name] = rule
    warnings = [
        f"spec.{later} names {len(shared)} {what} that spec.{first} has taken (first wins), e.g. {shared[0]}"
        for (later, first), shared in twice.items()
    ]
    return owners, warnings


def spellings(info: LinearInfo | AttentionInfo) -> tuple[str, ...]:
    """The names that patterns are held against."""
    return tuple(dict.fromkeys((info.name, info.prefix, *info.also_called)))


def why_float(info: LinearInfo | AttentionInfo, rules: Sequence[LinearRule] | Sequence[AttentionRule]) -> str:
    """Why no rule has it."""
    excluded = [
        f"spec.{rule.position}.exclude"
        for rule in rules
        if rule.filter.exclude and NameFilter(rule.filter.exclude).matches(*spellings(info))
    ]
    return f"excluded by {', '.join(excluded)}" if excluded else "named by no rule"


def weight_rule(kind: LayerKind, needs: Collection[Need], *, trained: bool) -> str:
    """What stands in for a weight method that cannot see the inputs it asks for; empty if it asks for none.

    Args:
        needs: what it asks for.
        trained: whether it learns while the block is run.
    """
    if Need.HESSIAN in needs:
        return "weight pruned by magnitude" if kind is LayerKind.W16A16S else "weight rounded to nearest"
    if Need.CHANNELS in needs:
        return "weight error not weighted by inputs"
    return "weight rounded to nearest" if trained else ""

"""Drafting layers (multi-token prediction): decoder blocks in the checkpoint that the model class does not run.

Families call them by their own names: ``model.layers.61`` (DeepSeek-V3, GLM-4.5), ``mtp.layers.0`` (Qwen3-Next),
``model.mtp_block.0`` (ERNIE-4.5). They are known by what they hold: below a common prefix all parts of a block (its
attention, its norms), and in each part the tensors that it has in some block of the model, under the same names and of
the same shapes. What else is there below that prefix, such as the join of two states (``eh_proj``) or a head, comes
along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from slim_core.checkpoint.source import TensorSource

if TYPE_CHECKING:
    from slim_core.model.units import LinearInfo, Unit

__all__ = ["find_drafts"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_Parts = dict[str, frozenset[tuple[str, tuple[int, ...]]]]
"""The parts of a block by what they are called there, in order: their tensors with their shapes."""


@dataclass(frozen=True)
class _Block:
    """A decoder block, what the names of its tensors in the checkpoint begin with, and its parts."""

    unit: Unit
    front: str
    parts: _Parts

    def linears(self, part: str, prefix: str) -> Iterator[LinearInfo]:
        """The linears of one part, as they are called below another prefix."""
        for info in self.unit.linears:
            place = info.prefix.removeprefix(f"{self.front}.")
            if place.partition(".")[0] == part:
                name = f"{prefix}.{info.name.removeprefix(f'{self.unit.name}.')}"
                yield replace(info, name=name, prefix=f"{prefix}.{place}", runs=False)


def find_drafts(blocks: Sequence[Unit], names: Collection[str], source: TensorSource) -> list[Unit]:
    """The drafting layers among tensors that no parameter of the model takes, as units, in the order of their names.

    Their linears go by the names that they have in a block, with the prefix that the checkpoint has; nobody runs them.

    Args:
        blocks: the decoder blocks.
        names: of the tensors.
        source: the checkpoint, of blocks and tensors.
    """
    if not names:
        return []
    known = [
        _Block(unit, front, _parts(((name, name.removeprefix(f"{front}.")) for name in unit.tensors), source))
        for unit in blocks
        if (front := _front(unit)) is not None
    ]
    holders = {part: block for block in known for part in block.parts.items()}
    frames = sorted({tuple(block.parts) for block in known}, key=lambda frame: (-len(frame), frame))
    found: dict[str, Unit] = {}
    for prefix, parts in _candidates(names, {part for frame in frames for part in frame}, source).items():
        frame = next((one for one in frames if all((part, parts.get(part)) in holders for part in one)), None)
        if frame is not None:
            same = [block for block in known[::-1] if all(block.parts.get(part) == parts[part] for part in frame)]
            whole = min(same, key=lambda block: len(block.parts), default=None)
            unit = _unit(prefix, {part: whole or holders[part, parts[part]] for part in frame})
            if unit.linears and all(source.meta(f"{info.prefix}.weight").dtype in _FLOATS for info in unit.linears):
                found[prefix] = unit
    own: dict[str, list[str]] = {}
    for name in names:
        if (prefix := max((p for p in found if name.startswith(f"{p}.")), key=len, default=None)) is not None:
            own.setdefault(prefix, []).append(name)
    return [replace(found[prefix], tensors={name: name for name in members}) for prefix, members in own.items()]


def _front(unit: Unit) -> str | None:
    """What the names of all tensors of a block begin with; None if there is no such thing, or nothing to quantize."""
    if not unit.linears or any(name != origin for name, origin in unit.tensors.items()):
        return None
    shared: list[str] = []
    for pieces in zip(*(name.split(".")[:-1] for name in unit.tensors), strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    inside = all(info.name.startswith(f"{unit.name}.") for info in unit.linears)
    return ".".join(shared) if shared and inside else None


def _parts(places: Iterable[tuple[str, str]], source: TensorSource) -> _Parts:
    """The parts that tensors make, in order.

    Args:
        places: names of tensors, and the rest of each below a prefix.
    """
    found: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, rest in places:
        found.setdefault(rest.partition(".")[0], set()).add((rest, source.meta(name).shape))
    return {part: frozenset(tensors) for part, tensors in found.items()}


def _candidates(names: Collection[str], known: Collection[str], source: TensorSource) -> dict[str, _Parts]:
    """Every prefix below which there is something that is called like a part of a block, and all such parts there."""
    places: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        pieces = name.split(".")
        for depth in range(1, len(pieces)):
            if pieces[depth] in known:
                places.setdefault(".".join(pieces[:depth]), []).append((name, ".".join(pieces[depth:])))
    return {prefix: _parts(found, source) for prefix, found in places.items()}


def _unit(prefix: str, like: Mapping[str, _Block]) -> Unit:
    """A drafting layer, still without its tensors.

    Args:
        like: of each part a block that has it.
    """
    linears = tuple(info for part, block in like.items() for info in block.linears(part, prefix))
    parameters = {f"{info.name}.weight": f"{info.prefix}.weight" for info in linears}
    parameters |= {f"{info.name}.bias": f"{info.prefix}.bias" for info in linears if info.has_bias}
    first = next(iter(like.values())).unit
    return replace(
        first,
        name=prefix,
        block=None,
        stop=None,
        parameters=parameters,
        tensors={},
        linears=linears,
        attentions=(),
        added={},
        mirrors=first.name,
    )

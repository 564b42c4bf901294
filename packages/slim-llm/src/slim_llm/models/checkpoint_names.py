"""Where the checkpoint keeps the parameters of a model: under their own names, under names that transformers changes
while it loads, as the tensors of single experts, or as parts of stacks of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.core_model_loading import dot_natural_key

from slim_core.checkpoint.joined import JoinedSource, Part
from slim_core.checkpoint.sliced import Slice, SlicedSource
from slim_core.checkpoint.source import TensorSource
from slim_core.checkpoint.stacked import cut_stack
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.linears import keep_float
from slim_llm.models.conversions import Conversions, change_of, puts_side_by_side
from slim_llm.models.cuts import cuts_of
from slim_llm.models.draft_stacks import cut_alike
from slim_llm.models.expert_stacks import Stack
from slim_llm.models.experts import ExpertsApart, experts_apart

__all__ = ["locate"]

_NUMBER = re.compile(r"\d+")
_ARRANGED = ":arranged"  # ends the name of what is seen of a tensor in another order of rows than it is stored in
_MISSING = "a shard is missing, or the weights and config.json do not belong together"


@dataclass(frozen=True)
class _Stored:
    """A stack as it is stored: all linears of its parameter or only the one at ``position``, and how it is changed."""

    name: str
    position: int | None = None
    changes: frozenset[str] = frozenset()


@dataclass
class _Experts:
    """What the checkpoint has of one stacked parameter.

    Args:
        path: module name of the experts.
        parameter: the stacked weights, or the stacked biases.
        each: names of single tensors, by expert and position of the linear.
        stacked: names of stacks.
    """

    path: str
    experts: ExpertsApart
    stack: Stack
    parameter: str
    each: dict[tuple[int, int], str] = field(default_factory=dict[tuple[int, int], str])
    stacked: list[_Stored] = field(default_factory=list[_Stored])

    @property
    def bias(self) -> bool:
        return self.parameter == self.stack.bias

    @property
    def wanted(self) -> Iterator[tuple[int, int]]:
        """Every expert, with the position of every linear."""
        return ((e, i) for e in range(self.experts.count) for i in range(len(self.stack.linears)))

    def name(self, prefix: str, expert: int, position: int) -> str:
        parts = (prefix, str(expert), self.stack.linears[position], "bias" if self.bias else "weight")
        return ".".join(filter(None, parts))

    def stored_shape(self, stored: _Stored) -> tuple[int, ...]:
        """As it would be if it lay as transformers has it."""
        count, *matrix = self.stack.shape
        if stored.position is not None:
            matrix[1 if self.stack.transposed else 0] = self.stack.out_features
        out = matrix[1 if self.stack.transposed else 0]
        return (count, out) if self.bias else (count, *matrix)


Location = tuple[TensorSource, dict[str, str], dict[str, tuple[str | Part, ...]]]


def locate(module: nn.Module, source: TensorSource, where: str) -> Location:
    """The checkpoint with stacked experts cut apart, the stored name of every parameter that has another one, and the
    parts of every parameter that is stored in parts, or is a part of what is stored, in order.

    Args:
        module: the model, its experts taken apart.
        where: the model folder, for errors.

    Raises:
        InvalidModelError: expert tensors are missing, too many, of another shape, or stored in two ways.
        UnsupportedError: the checkpoint stacks its experts in a way that is not known.
    """
    conversions = Conversions(module)
    found = {
        f"{path}.{parameter}": _Experts(path, experts, stack, parameter)
        for path, experts in experts_apart(module)
        for stack in experts.stacks
        for parameter in filter(None, (stack.parameter, stack.bias))
    }
    single = {part.name(part.path, *at): (part, at) for part in found.values() for at in part.wanted}
    state: dict[str, Any] = module.state_dict(keep_vars=True) | found
    names: dict[str, str] = {}
    parts_of: dict[str, dict[int, str]] = {}
    cuts: dict[str, Part] = {}
    for stored in sorted(source, key=dot_natural_key):
        target, pattern = conversions.target(stored, state)
        if target in found:
            _note(found[target], stored, pattern, conversions, where)
        elif pattern is None and target in single:
            part, at = single[target]
            part.each[at] = stored
        elif found_cuts := cuts_of(conversions.rule(pattern), source.meta(stored), target, state, module.config):
            cuts |= found_cuts
        elif pattern is not None and target in state:
            rule = conversions.rule(pattern)
            if not puts_side_by_side(rule):
                raise _unknown(stored, target, rule, where)
            numbered = "*" in pattern
            at = int(_NUMBER.findall(stored)[-1]) if numbered else rule.source_patterns.index(pattern)
            parts_of.setdefault(target, {} if numbered else dict.fromkeys(range(len(rule.source_patterns)), ""))
            parts_of[target][at] = stored
        elif target != stored and target in state and target not in source:
            names[target] = stored
        elif target.removesuffix("_blocks") in found:
            raise UnsupportedError(
                f"the experts are stored as blocks of packed numbers ({stored!r})",
                where=where,
                remedy="start from a checkpoint with the experts in floating point",
            )
    _refuse_mixtures(found.values(), where)
    joined: dict[str, tuple[str | Part, ...]] = {
        name: _all_parts(name, parts, where) for name, parts in parts_of.items()
    }
    _keep_float(module, (*joined, *cuts))
    names |= {name: _seen_as(name, source) for name in cuts}
    joined |= {names[name]: (part,) for name, part in cuts.items()}
    slices: dict[str, Slice] = {}
    used = {stored.name for part in found.values() for stored in part.stacked}
    for path, _ in experts_apart(module):
        parts = [part for part in found.values() if part.path == path]
        if any(part.each for part in parts):
            names |= _single(parts, where)
        elif any(part.stacked for part in parts):
            own: dict[str, Slice] = {}
            names |= _sliced(source, parts, own, where)
            slices |= own | cut_alike(source, own, used)
    source = SlicedSource(source, slices) if slices else source
    return (JoinedSource(source, joined) if joined else source), names, joined


def _keep_float(module: nn.Module, parameters: Iterable[str]) -> None:
    for name in parameters:
        keep_float(module.get_submodule(name.rpartition(".")[0]))


def _seen_as(name: str, source: TensorSource) -> str:
    """What a parameter goes by that the source has in another arrangement."""
    return f"{name}{_ARRANGED}" if name in source else name


def _all_parts(name: str, at: Mapping[int, str], where: str) -> tuple[str, ...]:
    parts = [at.get(i, "") for i in range(max(at) + 1)]
    if not all(parts):
        raise InvalidModelError(
            f"{parts.count('')} of the {len(parts)} tensors that make {name!r} are not in the checkpoint; there is "
            f"{next(filter(None, parts))!r}",
            where=where,
            remedy=_MISSING,
        )
    return tuple(parts)


def _note(part: _Experts, stored: str, pattern: str | None, conversions: Conversions, where: str) -> None:
    """Note that a stored tensor goes into a stacked parameter."""
    if pattern is None:
        part.stacked.append(_Stored(stored))
        return
    rule = conversions.rule(pattern)
    changes = [change_of(operation) for operation in rule.operations]
    position = rule.source_patterns.index(pattern)
    several = len(rule.source_patterns) > 1
    fits = not several or len(rule.source_patterns) == len(part.stack.linears)
    if "*" in pattern:
        numbers = [int(piece) for piece in stored.split(".") if piece.isdigit()]
        if fits and numbers and set(changes) <= {"stack", "fuse"}:
            part.each[numbers[-1], position] = stored
            return
    elif fits and len(rule.target_patterns) == 1 and set(changes) <= {"fuse", "turn", "maybe turn", "alternate"}:
        part.stacked.append(_Stored(stored, position if several else None, frozenset(changes)))
        return
    raise _unknown(stored, f"{part.path}.{part.parameter}", rule, where)


def _unknown(stored: str, target: str, rule: Any, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"transformers computes {target!r} from {stored!r} in a way that is not known here ({rule.operations})",
        where=where,
        remedy="use a version of Slim that knows this family, or report it",
    )


def _refuse_mixtures(found: Iterable[_Experts], where: str) -> None:
    each = next((name for part in found for name in part.each.values()), None)
    stack = next((stored.name for part in found for stored in part.stacked), None)
    if each and stack:
        raise InvalidModelError(
            f"the checkpoint stores experts both one by one ({each!r}) and stacked ({stack!r})",
            where=where,
            remedy="remove the left-over shards of the other version",
        )


def _single(parts: list[_Experts], where: str) -> dict[str, str]:
    """The tensors of single experts by parameter, all of them there."""
    count = parts[0].experts.count
    known = {expert for part in parts for expert, _ in part.each}
    allowed = max(part.stack.shape[0] for part in parts)
    missing = [(part, *at) for part in parts for at in part.wanted if at not in part.each]
    partly = [expert for _, expert, _ in missing if expert in known]
    if max(known) >= allowed or (missing and not partly and known == set(range(len(known)))):
        raise InvalidModelError(
            f"config.json asks for {count} experts in {parts[0].path}, the checkpoint has {max(known) + 1}",
            where=where,
            remedy="the weights and config.json do not belong together",
        )
    if missing:
        part, expert, position = missing[0]
        example = next(name for part in parts for name in part.each.values()).split(".")
        depth = 3 if part.stack.linears[position] else 2
        name = part.name(".".join(example[:-depth]), expert, position)
        raise InvalidModelError(
            f"{len(missing)} expert tensors are not in the checkpoint, among them {name!r}",
            where=where,
            remedy=_MISSING,
        )
    return {part.name(part.path, *at): part.each[at] for part in parts for at in part.wanted}


def _sliced(source: TensorSource, parts: list[_Experts], slices: dict[str, Slice], where: str) -> dict[str, str]:
    """Cut the stacks of one module apart; the names of their slices by parameter."""
    for part in parts:
        linears = len(part.stack.linears)
        held = [range(linears) if stored.position is None else [stored.position] for stored in part.stacked]
        if sorted(position for positions in held for position in positions) != list(range(linears)):
            text = "is not in the checkpoint" if len(part.stacked) < linears else "is stored several times"
            raise InvalidModelError(f"{part.path + '.' + part.parameter!r} {text}", where=where, remedy=_MISSING)
        for stored in part.stacked:
            _check_stack(source, part, stored, where)
    same = _lies_as_expected(source, parts, where)
    names: dict[str, str] = {}
    for part in parts:
        stack = part.stack
        for stored in part.stacked:
            prefix = _experts_of(stored.name, part.path)
            positions = range(len(stack.linears)) if stored.position is None else [stored.position]
            linears = [stack.linears[position] for position in positions]
            interleaved = stack.interleaved is not ("alternate" in stored.changes)
            turned = stack.transposed is same
            meta = source.meta(stored.name)
            slices |= cut_stack(meta, prefix, linears, transposed=turned, interleaved=interleaved)
            for expert in range(part.experts.count):
                for i in positions:
                    names[part.name(part.path, expert, i)] = part.name(prefix, expert, i)
    return names


def _experts_of(stored: str, path: str) -> str:
    """What the checkpoint calls the module that it keeps a stack of, as far as the stack's name shows it."""
    leaf, pieces = path.rpartition(".")[2], stored.split(".")
    depth = next((depth for depth in range(len(pieces) - 1, 0, -1) if pieces[depth - 1] == leaf), 0)
    return ".".join(pieces[:depth]) or path


def _check_stack(source: TensorSource, part: _Experts, stored: _Stored, where: str) -> None:
    shape, want = source.meta(stored.name).shape, part.stored_shape(stored)
    if len(shape) == len(want) and shape[0] not in (want[0], part.experts.count):
        raise InvalidModelError(
            f"config.json asks for {part.experts.count} experts in {part.path}, {stored.name!r} has {shape[0]}",
            where=where,
            remedy="the weights and config.json do not belong together",
        )
    if len(shape) != len(want) or (part.bias and shape[1:] != want[1:]):
        raise InvalidModelError(
            f"tensor {stored.name!r} has shape {list(shape)}, config.json asks for {list(want)}",
            where=where,
            remedy="the weights and config.json do not belong together",
        )


def _lies_as_expected(source: TensorSource, parts: list[_Experts], where: str) -> bool:
    """Whether the stacked matrices of a module lie as transformers has them, not as their transpose.

    The matrices decide together, for one alone may be square.
    """
    matrices = [(part, stored) for part in parts if not part.bias for stored in part.stacked]
    have = [source.meta(stored.name).shape[1:] for _, stored in matrices]
    want = [part.stored_shape(stored)[1:] for part, stored in matrices]
    always = any("turn" in stored.changes for _, stored in matrices)
    if have == want and not always:
        return True
    if have == [shape[::-1] for shape in want]:
        return False
    texts = [f"{stored.name!r} {list(shape)}" for (_, stored), shape in zip(matrices, have, strict=True)]
    raise InvalidModelError(
        f"the stacked experts have matrices of shape {', '.join(texts)}; config.json asks for "
        f"{', '.join(str(list(shape)) for shape in want)}, or all of them transposed",
        where=where,
        remedy="the weights and config.json do not belong together",
    )

"""Stacked experts on disk: how one tensor is cut into the matrices of its experts.

Three layouts are in use. Most checkpoints store every expert by itself. Some stack them, gate and up fused, as
``gate_up_proj`` ``(experts, 2 * inner, hidden)`` and ``down_proj`` ``(experts, hidden, inner)``; others as the
transpose of that. The two shapes together always tell which: where the first is square the second is not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from slim_core.checkpoint.sliced import Slice, SlicedSource
from slim_core.checkpoint.source import TensorMeta, TensorSource

__all__ = ["cut_stack", "is_transposed", "with_experts_apart"]

# Rows of gate and up alternate in the fused tensor.
_INTERLEAVED = frozenset({"gpt_oss", "inkling", "inkling2", "inkling2_text"})
_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
_DOWN = (("down_proj",), ("w2",))
# Ending of a stacked tensor's name and of its partner's, what stands for them in the names of single experts, and what
# the linears may be called there.
_KNOWN = (
    ("experts.gate_up_proj", "experts.down_proj", "experts", _GATE_UP),
    ("experts.down_proj", "experts.gate_up_proj", "experts", _DOWN),
    ("experts.down_proj", "experts.up_proj", "experts", _DOWN),
    ("experts.up_proj", "experts.down_proj", "experts", (("up_proj",),)),
    ("experts.gate_proj", "experts.down_proj", "experts", (("gate_proj",),)),
    ("experts.w13_weight", "experts.w2_weight", "experts", _GATE_UP),
    ("experts.w2_weight", "experts.w13_weight", "experts", _DOWN),
    ("experts.fc1.weight", "experts.fc2.weight", "experts", _GATE_UP),
    ("experts.fc2.weight", "experts.fc1.weight", "experts", _DOWN),
    ("input_linear.weight", "output_linear.weight", "experts", _GATE_UP),
    ("output_linear.weight", "input_linear.weight", "experts", _DOWN),
)


def is_transposed(gate_up: Sequence[int], down: Sequence[int]) -> bool | None:
    """Whether a fused pair is stored as ``(hidden, 2 * inner)`` and ``(inner, hidden)``; None if it is no such pair.

    Args:
        gate_up, down: the last two dimensions of the two tensors.
    """
    if gate_up[0] == 2 * down[1] and gate_up[1] == down[0]:
        return False
    if gate_up[0] == down[1] and gate_up[1] == 2 * down[0]:
        return True
    return None


def cut_stack(
    stack: TensorMeta, prefix: str, linears: Sequence[str], *, transposed: bool = False, interleaved: bool = False
) -> dict[str, Slice]:
    """The slices of a stack, by the name that each linear's tensor goes by: ``<prefix>.<expert>.<linear>.weight``.

    Args:
        stack: ``(experts, out, in)``, ``(experts, in, out)`` if transposed, or biases ``(experts, out)``.
        linears: those whose output features are fused in it, in order; an empty name stands for the expert itself.
        interleaved: the output features of the linears alternate instead of lying side by side.
    """
    bias = len(stack.shape) == 2
    out = stack.shape[-1 if transposed or bias else -2]
    count, each = len(linears), out // len(linears)
    slices: dict[str, Slice] = {}
    for expert in range(stack.shape[0]):
        for i, linear in enumerate(linears):
            outputs = range(i, out, count) if interleaved else range(i * each, (i + 1) * each)
            name = ".".join(filter(None, (prefix, str(expert), linear, "bias" if bias else "weight")))
            slices[name] = Slice(stack.name, expert, outputs, transposed and not bias)
    return slices


def with_experts_apart(source: TensorSource, names: Collection[str], config: dict[str, Any]) -> TensorSource:
    """A source whose stacked experts are seen one by one, where ``names`` has them so: the tensors of another folder.

    Args:
        config: the content of the source's ``config.json``.
    """
    text: Any = config.get("text_config") or config
    interleaved = config.get("model_type") in _INTERLEAVED or text.get("model_type") in _INTERLEAVED
    slices: dict[str, Slice] = {}
    for name in source:
        if name not in names:
            slices |= _slices(source, source.meta(name), names, interleaved)
    return SlicedSource(source, slices) if slices else source


def _slices(source: TensorSource, stack: TensorMeta, names: Collection[str], interleaved: bool) -> dict[str, Slice]:
    bias = stack.name.endswith("_bias") and len(stack.shape) == 2
    name = stack.name.removesuffix("_bias") if bias else stack.name
    if not bias and len(stack.shape) != 3:
        return {}
    part = "bias" if bias else "weight"
    for ending, partner, holder, spellings in _KNOWN:
        front = name.removesuffix(ending)
        if front == name or front + partner not in source:
            continue
        for linears in spellings:
            if f"{front}{holder}.0.{linears[0]}.{part}" in names:
                pair = source.meta(name).shape[1:], source.meta(front + partner).shape[1:]
                turned = is_transposed(*(pair[::-1] if spellings is _DOWN else pair)) or False
                fused = len(linears) > 1 and interleaved
                return cut_stack(stack, front + holder, linears, transposed=turned, interleaved=fused)
    prefix = name.removesuffix(".weight")
    return cut_stack(stack, prefix, ("",)) if f"{prefix}.0.weight" in names else {}

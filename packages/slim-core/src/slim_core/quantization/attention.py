"""Quantized attention: the cache of keys and values (C8), and query, key and value as the kernel multiplies them
(FAQuant).

States are ``(batch, heads, tokens, channels)``. Statically quantized ones are int8, ``clamp(round(x / s + z))`` with a
scale per channel (of every head) or per head, or FP8 with a scale per head; dynamically quantized ones have a scale
per token of a head, or are MXFP8 or MXFP4 with an exponent for every 32 of what the kernel sums over: channels of query
and key, tokens of the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.model.attention import AttentionInfo, States
from slim_core.quantization.affine import EPSILON, dequantize, quantize, quantize_per_token, stored_parameters
from slim_core.quantization.floating import e4m3_scale, e4m3_values, quantize_e4m3_per_token, round_to_e4m3
from slim_core.quantization.microscaling import mxfp4_activations, mxfp8_activations

__all__ = ["AttentionForm", "AttentionKind", "QuantizedAttention", "QuantizedState", "StateForm"]
__all__ += ["check_attention", "state_parameters"]

_STATES = ("query", "key", "value")


class AttentionKind(StrEnum):
    """What is quantized of an attention; the value is the type of its tensors in the ascendv1 format."""

    C8 = "C8"
    FAQUANT = "FAQuant"


@dataclass(frozen=True)
class StateForm:
    """How one of query, key and value is quantized.

    Args:
        dtype: ``int8``, ``fp8_e4m3``, ``mxfp8`` or ``mxfp4``.
        scope: ``per_channel`` or ``per_head`` (static), ``per_token`` or ``per_block`` (dynamic).
        symmetric: without offset.
        share: the share of all values of a channel or head that a static range must hold; the rest, farthest from
            zero, is clipped.
    """

    dtype: str
    scope: str
    symmetric: bool = True
    share: float = 1.0

    @property
    def is_static(self) -> bool:
        """Whether calibration must find its scale."""
        return self.scope in ("per_channel", "per_head")

    def rows(self, heads: int, dim: int) -> int:
        """How many static scales there are."""
        return heads * dim if self.scope == "per_channel" else heads

    def __str__(self) -> str:
        return f"{self.dtype} {self.scope}{'' if self.symmetric else ' asymmetric'}"


@dataclass(frozen=True)
class AttentionForm:
    """What an attention becomes; a state that is None stays in floating point."""

    kind: AttentionKind
    query: StateForm | None
    key: StateForm | None
    value: StateForm | None

    def states(self) -> Iterator[tuple[str, StateForm]]:
        """The quantized states by name, in the order query, key, value."""
        for name in _STATES:
            form: StateForm | None = getattr(self, name)
            if form is not None:
                yield name, form

    @property
    def needs_data(self) -> bool:
        return any(form.is_static for _, form in self.states())

    def __str__(self) -> str:
        forms = {name[0]: str(form) for name, form in self.states()}
        if len(set(forms.values())) == 1:
            missing = "" if self.kind is AttentionKind.C8 or len(forms) == 3 else f" ({', '.join(forms)})"
            return f"{self.kind} {next(iter(forms.values()))}{missing}"
        return f"{self.kind} {', '.join(f'{name} {form}' for name, form in forms.items())}"


def check_attention(form: AttentionForm, info: AttentionInfo) -> None:
    """Refuse an attention that cannot take a form.

    Raises:
        UnsupportedError: its states cannot be reached, or engines keep no cache of keys and values for it.
    """
    reason = info.problem
    if not reason and not info.cached and form.kind is AttentionKind.C8:
        reason = "it keeps no keys and values for tokens that follow"
    if not reason and info.latent and form.kind is AttentionKind.C8:
        reason = (
            "it caches a compressed latent instead of keys and values, and engines read no scales per channel for it"
        )
    if not reason and form.query is not None and not info.sees_query:
        reason = "its query cannot be reached, only what enters its cache"
    if reason:
        remedy = "exclude this attention"
        if info.latent and not info.problem:
            remedy = "use fa3_quant, which quantizes the latent, or exclude this attention"
        elif not info.cached and not info.problem and form.kind is AttentionKind.C8:
            remedy = "use fa3_quant"
        raise UnsupportedError(f"cannot become {form.kind}: {reason}", where=info.name, remedy=remedy)


@dataclass(frozen=True, eq=False)
class QuantizedState:
    """One of query, key and value, quantized.

    Args:
        scale: float32, ``(heads * channels,)`` head-major for ``per_channel``, ``(heads,)`` for ``per_head``; None if
            it is taken at run time.
        offset: integral float32 of the same shape, added when quantizing; None without scale.
    """

    form: StateForm
    scale: Tensor | None = None
    offset: Tensor | None = None

    def simulate(self, x: Tensor) -> Tensor:
        """What the target computes with in place of ``x`` ``(batch, heads, tokens, channels)``, in its dtype."""
        return self._values(x).to(x.dtype)

    def _values(self, x: Tensor) -> Tensor:
        match self.form.dtype, self.form.scope:
            case "int8", "per_token":
                codes, scale = quantize_per_token(x, bits=8)
                return dequantize(codes, scale, torch.zeros_like(scale))
            case "fp8_e4m3", "per_token":
                codes, scale = quantize_e4m3_per_token(x)
                return e4m3_values(codes) * scale
            case "mxfp8", "per_block":
                return mxfp8_activations(x)
            case "mxfp4", "per_block":
                return mxfp4_activations(x)
            case _:
                return self._static(x)

    def _static(self, x: Tensor) -> Tensor:
        if self.scale is None or self.offset is None:
            raise UnexpectedError(f"a state that is {self.form} has no scale")
        shape = (1, x.shape[1], 1, -1)
        scale = self.scale.view(shape)
        if self.form.dtype == "fp8_e4m3":
            return round_to_e4m3(x.float() / scale) * scale
        offset = self.offset.view(shape)
        return dequantize(quantize(x, scale, offset, bits=8), scale, offset)


@dataclass(frozen=True, eq=False)
class QuantizedAttention:
    """The immutable result of quantizing one attention; states that are None stay as they are."""

    kind: AttentionKind
    query: QuantizedState | None
    key: QuantizedState | None
    value: QuantizedState | None

    def states(self) -> Iterator[tuple[str, QuantizedState]]:
        """The quantized states by name, in the order query, key, value."""
        for name in _STATES:
            state: QuantizedState | None = getattr(self, name)
            if state is not None:
                yield name, state

    def simulate(self, query: Tensor | None, key: Tensor, value: Tensor) -> States:
        """The states that the target computes with: a tap for :class:`~slim_core.model.attention.AttentionAccess`."""
        if self.query is not None:
            assert query is not None
            query = self.query.simulate(query)
        return (
            query,
            key if self.key is None else self.key.simulate(key),
            value if self.value is None else _summed_over_tokens(self.value, value),
        )


def _summed_over_tokens(state: QuantizedState, value: Tensor) -> Tensor:
    """A value, whose blocks lie along the tokens, because those are what it is summed over."""
    if state.form.scope != "per_block":
        return state.simulate(value)
    return state.simulate(value.transpose(2, 3)).transpose(2, 3)


def state_parameters(form: StateForm, low: Tensor, high: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Scale and offset for static ranges.

    The scale is one that the engine's dtype can hold, because engines keep it in that; the offset is taken from it.

    Args:
        low, high: smallest and largest values, any shape.
        dtype: the engine's dtype, None if it is not known.

    Returns:
        Two float32 tensors of that shape; the offset is integral.
    """
    if form.dtype == "fp8_e4m3":
        scale = e4m3_scale(torch.maximum(-low, high)).clamp(min=EPSILON)
        return (scale if dtype is None else scale.to(dtype).float()), torch.zeros_like(scale)
    return stored_parameters(low, high, 8, form.symmetric, dtype)

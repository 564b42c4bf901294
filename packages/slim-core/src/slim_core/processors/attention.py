"""What the processors of attentions share."""

from __future__ import annotations

import torch

from slim_core.processors.base import AttentionWork, UnitWork
from slim_core.quantization.attention import QuantizedAttention, QuantizedState, StateForm, state_parameters
from slim_core.quantization.statistics.attention import AttentionStatistics, StateStatistics

__all__ = ["finish_attentions", "quantized_attention"]


def finish_attentions(work: UnitWork, position: str) -> None:
    """Finish every attention of a unit that the plan gave to the processor at ``position``."""
    for attention in work.attentions.values():
        if attention.assignment.position == position:
            work.finish_attention(attention, quantized_attention(attention, work.dtype))


def quantized_attention(work: AttentionWork, dtype: torch.dtype | None) -> QuantizedAttention:
    """The quantized attention of the form that was planned.

    Args:
        dtype: the engine's dtype.

    Raises:
        SpecError: a static state was never observed.
        InvalidModelError: NaN or infinity was observed.
    """
    form, seen = work.assignment.form, work.statistics or AttentionStatistics()
    states = {
        name: _quantized_state(state, seen.states.get(name) or StateStatistics(state), work.info.name, name, dtype)
        for name, state in form.states()
    }
    return QuantizedAttention(form.kind, states.get("query"), states.get("key"), states.get("value"))


def _quantized_state(
    form: StateForm, seen: StateStatistics, attention: str, state: str, dtype: torch.dtype | None
) -> QuantizedState:
    if not form.is_static:
        return QuantizedState(form)
    low, high = seen.bounds(attention, state)
    return QuantizedState(form, *state_parameters(form, low, high, dtype))

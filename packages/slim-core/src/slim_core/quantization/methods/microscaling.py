"""The weight methods of the microscaling formats: rules for the exponent of a block, alone or in competition.

Every rule of the protocol is one :class:`ExponentRule`, and every search picks, by the squared error of the block or of
the whole weight, among rules of which ``minmax`` is one. So no search is worse than ``minmax``.

===============  ==================================  =========================================
method           exponent                            as a rule: scaled magnitudes come to lie in
===============  ==================================  =========================================
mxfp8 minmax     ``floor(log2 m) - 8``               [256, 512), saturating at 448
mse_round        that, or ``ceil(log2 m) - 8``       that, or (128, 256]
mxfp4 minmax     ``floor(log2(m / 0.875)) - 2``      [3.5, 7)
ceil_x           ``ceil(log2(m / c))``               (c / 2, c]
fouroversix      nearest to ``log2(m / 6)``, or      [6 / sqrt 2, 6 sqrt 2), or
                 to ``log2(m / 4)``                  [4 / sqrt 2, 4 sqrt 2)
===============  ==================================  =========================================

``ceil_x`` has no ``- 2`` for the largest exponent of an element, although the protocol's documents write one: ``c`` is
already in units of the elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slim_core.quantization.microscaling import (
    BLOCK,
    LOWEST,
    MXFP4,
    MXFP8,
    MXFP8_FLOOR,
    ExponentRule,
    MxFormat,
    by_blocks,
    dual_scales,
    exponents_of,
    from_blocks,
    magnitudes,
    power_of_two,
    to_bytes,
)
from slim_core.quantization.row_blocks import decibels, for_each_block, rows_per_block
from slim_core.quantization.weights import MxWeight, RowSource, refuse_infinite

__all__ = ["ceil_x_weight", "dualscale_weight", "fouroversix_weight", "mse_round_weight", "mxfp4_weight"]
__all__ += ["mxfp8_weight", "search_values"]

MXFP8_CEIL = ExponentRule(256.0, inclusive=True)
MXFP4_MINMAX = ExponentRule(7.0)
FOUR_OR_SIX = (ExponentRule(6 * math.sqrt(2)), ExponentRule(4 * math.sqrt(2)))
_SAMPLE_EVERY = 8


def mxfp8_weight(weight: RowSource, *, name: str, device: torch.device | None = None) -> MxWeight:
    """``minmax`` for MXFP8. Elements are cast as hardware casts them, halves to even, saturating at 448.

    Args:
        weight: float matrix ``(out, in)``; ``in`` need not be a multiple of 32.
        name: the tensor's name, for errors.
        device: where to compute.

    Raises:
        InvalidModelError: the weight holds NaN or infinity.
    """
    return _quantize(weight, MXFP8, (MXFP8_FLOOR,), name, device)


def mse_round_weight(weight: RowSource, *, name: str, device: torch.device | None = None) -> MxWeight:
    """``mse_round`` for MXFP8: the exponent rounded down, or up where that makes the block's squared error smaller.

    Arguments and errors are those of :func:`mxfp8_weight`.
    """
    return _quantize(weight, MXFP8, (MXFP8_FLOOR, MXFP8_CEIL), name, device)


def mxfp4_weight(weight: RowSource, *, name: str, device: torch.device | None = None) -> MxWeight:
    """``minmax`` for MXFP4. Elements are rounded half away from zero.

    Arguments and errors are those of :func:`mxfp8_weight`.
    """
    return _quantize(weight, MXFP4, (MXFP4_MINMAX,), name, device)


def fouroversix_weight(weight: RowSource, *, name: str, device: torch.device | None = None) -> MxWeight:
    """``fouroversix`` for MXFP4: the largest magnitude of a block near 6 or near 4, whichever has less squared error.

    Arguments and errors are those of :func:`mxfp8_weight`.
    """
    return _quantize(weight, MXFP4, FOUR_OR_SIX, name, device)


def ceil_x_weight(
    weight: RowSource,
    *,
    name: str,
    value: float = 7.25,
    search: Sequence[float] = (),
    device: torch.device | None = None,
) -> MxWeight:
    """``ceil_x`` for MXFP4: the largest magnitude of a block at most ``value``.

    Args:
        value: in units of the elements; what is above 6 saturates.
        search: values to choose from instead: the one with the least squared error over the whole weight, unless
            ``minmax`` has less. The weight is read twice then.

    The other arguments and errors are those of :func:`mxfp8_weight`.
    """
    rule = ExponentRule(value, inclusive=True)
    if search:
        candidates = [MXFP4_MINMAX, *(ExponentRule(c, inclusive=True) for c in search)]
        rule = _best_rule(weight, MXFP4, candidates, name, device)
    return _quantize(weight, MXFP4, (rule,), name, device)


def search_values(low: float, high: float, step: float) -> list[float]:
    """``low``, ``low + step`` and so on up to ``high``, which belongs to them if it is met."""
    return [low + i * step for i in range(math.floor((high - low) / step + 1e-9) + 1)]


def dualscale_weight(weight: RowSource, *, outer_block: int, name: str, device: torch.device | None = None) -> MxWeight:
    """``dualscale``: an outer float32 scale ``m / 6`` per ``outer_block`` columns, then MXFP4 ``minmax``.

    Args:
        outer_block: a multiple of 32 that divides ``in``.

    The other arguments and errors are those of :func:`mxfp8_weight`.
    """
    return _quantize(weight, MXFP4, (MXFP4_MINMAX,), name, device, outer_block)


def _quantize(
    weight: RowSource,
    form: MxFormat,
    rules: Sequence[ExponentRule],
    name: str,
    device: torch.device | None,
    outer_block: int = 0,
) -> MxWeight:
    out, width = weight.shape
    elements = torch.empty(out, width, dtype=form.dtype)
    exponents = torch.empty(out, -(-width // BLOCK), dtype=torch.uint8)
    outer = torch.empty(out, width // outer_block, 1) if outer_block else None
    if not out or not width:
        return MxWeight(elements, exponents, float("inf"), outer)
    step = rows_per_block(width, device)

    def work(start: int) -> tuple[float, float]:
        stop = min(start + step, out)
        rows = weight.rows(start, stop).to(device).float()
        unit: Tensor | None = None
        if outer is not None:
            scale = dual_scales(rows, outer_block)
            refuse_infinite(scale, name, start)
            outer[start:stop].copy_(scale)
            rows = (by_blocks(rows, outer_block) / scale).flatten(1)
            unit = scale.repeat_interleave(outer_block // BLOCK, 1)
        blocks = by_blocks(rows)
        largest = magnitudes(blocks)
        refuse_infinite(largest, name, start)
        exponent = _best_exponents(blocks, largest, rules, form)
        elements[start:stop].copy_(from_blocks(form.encode(blocks * power_of_two(-exponent)), width))
        exponents[start:stop].copy_(to_bytes(exponent).squeeze(2))
        return (0.0, 0.0) if (start // step) % _SAMPLE_EVERY else _energies(blocks, exponent, form, unit)

    return MxWeight(elements, exponents, decibels(for_each_block(work, range(0, out, step))), outer)


def _best_exponents(blocks: Tensor, largest: Tensor, rules: Sequence[ExponentRule], form: MxFormat) -> Tensor:
    """The exponents ``(rows, blocks, 1)`` by the rule that makes least error in each block; the first of equals."""
    first = best = exponents_of(largest, rules[0], form.highest)
    if len(rules) == 1:
        return best
    least = _squared_errors(blocks, first, first, form)
    for rule in rules[1:]:
        exponent = exponents_of(largest, rule, form.highest)
        error = _squared_errors(blocks, exponent, first, form)
        best = torch.where(error < least, exponent, best)
        least = torch.minimum(error, least)
    return best


def _squared_errors(blocks: Tensor, exponent: Tensor, unit: Tensor, form: MxFormat) -> Tensor:
    """What rounding with these exponents costs, ``(rows, blocks, 1)``, in units of ``4^unit``.

    The unit keeps the squares of tiny and of huge weights within float32.
    """
    scaled = blocks * power_of_two(-exponent)
    error = form.round(scaled).sub_(scaled).square_().sum(-1, keepdim=True)
    return error * power_of_two(2 * (exponent - unit))


def _best_rule(
    weight: RowSource, form: MxFormat, rules: Sequence[ExponentRule], name: str, device: torch.device | None
) -> ExponentRule:
    """The rule that makes least error over the whole weight, the first of equals.

    Next to the exponent of a block's largest magnitude the rules have a few exponents only, so a block is rounded once
    for each of these and not once for each rule.
    """
    out, width = weight.shape
    if not out or not width:
        return rules[0]
    step = rows_per_block(width, device)
    offsets = range(min(rule.offset for rule in rules), max(rule.offset for rule in rules) + 2)

    def work(start: int) -> Tensor:
        blocks = by_blocks(weight.rows(start, min(start + step, out)).to(device).float())
        largest = magnitudes(blocks)
        refuse_infinite(largest, name, start)
        mantissa, exponent = torch.frexp(largest)
        unit = torch.exp2(2.0 * exponent.double())
        errors = {
            offset: unit * _squared_errors(blocks, (exponent + offset).clamp(LOWEST, form.highest), exponent, form)
            for offset in offsets
        }
        totals = [
            torch.where(rule.exceeded(mantissa), errors[rule.offset + 1], errors[rule.offset]).sum() for rule in rules
        ]
        return torch.stack(totals).cpu()

    return rules[int(torch.stack(for_each_block(work, range(0, out, step))).sum(0).argmin())]


def _energies(blocks: Tensor, exponent: Tensor, form: MxFormat, unit: Tensor | None) -> tuple[float, float]:
    """Squared sums of the values and of their errors; ``unit`` is what every block is to be multiplied by."""
    scale = power_of_two(exponent).double()
    if unit is not None:
        scale = scale * unit
    signal = (blocks * power_of_two(-exponent)).square_().sum(-1, keepdim=True).double() * scale.square()
    noise = _squared_errors(blocks, exponent, exponent, form).double() * scale.square()
    return float(signal.sum()), float(noise.sum())

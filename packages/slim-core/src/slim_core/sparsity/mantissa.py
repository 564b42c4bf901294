"""Shorter mantissas: few distinct numbers, which the compression unit behind W16A16S layers packs well.

A weight is ``m * 2^e`` with ``m`` in [1, 2). Two bits of ``m`` are kept, so that it is one of 1, 1.25, 1.5, 1.75 and 2.
The weights that this would cost most keep their whole mantissa. The unit works on float16, whose small numbers carry
little: below 2^-8 only the power of two is kept, and below 2^-14, where float16 loses digits, nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slim_core.sparsity.selection import smallest

__all__ = ["reduce_mantissas"]

_KEPT_BITS = 2
_PROTECTED = 0.02
_POWERS_BELOW = 2.0**-8
_ZERO_BELOW = 2.0**-14
_BLOCK_ELEMENTS = 1 << 20


def reduce_mantissas(weight: Tensor, importance: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight with short mantissas, in the dtype that it will be stored in. Applied twice, it is as applied once.

    All arithmetic is float32, so that nothing overflows: a number beyond the range of ``dtype`` becomes its largest,
    and one that would round up beyond it is rounded down. A number that only float16 could not hold is shortened like
    any other.

    Besides ``weight`` and the result it takes 5 bytes per element and blocks of a few MiB.

    Args:
        weight: float32 ``(out, in)``, contiguous, finite; not written to.
        importance: float32 ``(in,)``, the root mean square of every input channel, None if it is not known. What a
            weight loses counts times this; the 2 % (rounded down) of the weights that count most are left whole, those
            below 2^-8 aside.
    """
    if not weight.numel():
        return weight.to(dtype)
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    blocks = [slice(start, start + step) for start in range(0, weight.shape[0], step)]
    loss = torch.empty_like(weight)
    for rows in blocks:
        exact = _stored(weight[rows], dtype)
        lost = (exact - _shortened(exact, dtype)).abs_()
        loss[rows] = (lost if importance is None else lost.mul_(importance)).masked_fill_(_tiny(exact), 0)
    shorten = smallest(loss, weight.numel() - int(weight.numel() * _PROTECTED))
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in blocks:
        exact = _stored(weight[rows], dtype)
        result[rows] = torch.where(shorten[rows] | _tiny(exact), _shortened(exact, dtype), exact)
    return result


def _stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers as ``dtype`` holds them, float32."""
    largest = torch.finfo(dtype).max
    return rows.clamp(-largest, largest).to(dtype).float()


def _tiny(rows: Tensor) -> Tensor:
    return rows.abs() < _POWERS_BELOW


def _shortened(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Every number shortened; half to even, and 1.5 of a power of two down."""
    mantissa, exponent = torch.frexp(rows)
    mantissa, exponent = mantissa * 2, exponent - 1  # the mantissa is in [1, 2) now, and 2^exponent fits
    parts = 2**_KEPT_BITS
    short = torch.ldexp((mantissa * parts).round_().div_(parts), exponent)
    power = torch.ldexp((mantissa.abs() > 1.5).float().add_(1).copysign_(mantissa), exponent)
    magnitude = rows.abs()
    short = torch.where(magnitude < _POWERS_BELOW, power, short).masked_fill_(magnitude < _ZERO_BELOW, 0)
    top = _largest_short(dtype)
    return short.clamp_(-top, top)


def _largest_short(dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` with a short mantissa: all of its bits set at the highest exponent."""
    _, exponent = math.frexp(torch.finfo(dtype).max)
    return 2.0 ** (exponent - 1) * (2 - 2.0**-_KEPT_BITS)

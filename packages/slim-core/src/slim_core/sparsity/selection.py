"""Exactly so many of the smallest elements of a tensor, without sorting it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["smallest"]

_BLOCK = 1 << 18
_LOW_BITS = 15


def smallest(values: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` elements with the smallest magnitudes; of equal ones those that come first.

    Without their sign bit, floats order like the integers that their bits are. The magnitude to stop at is found from
    two histograms of those integers, of their high and of their low halves, in blocks that stay in the cache.

    Args:
        values: contiguous float32, any shape, finite.
        count: from 0 to the number of elements.

    Returns:
        bool, the shape of ``values``, ``count`` times true.
    """
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    if count:
        last, ties = _threshold(values, count)
        for start, bits in _blocks(values):
            part = bits < last
            if ties:
                equal = (bits == last).nonzero().flatten()[:ties]
                part[equal] = True
                ties -= len(equal)
            chosen[start : start + len(bits)] = part
    return chosen.view(values.shape)


def _blocks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat = values.view(-1).view(torch.int32)
    for start in range(0, len(flat), _BLOCK):
        yield start, flat[start : start + _BLOCK] & 0x7FFFFFFF


def _threshold(values: Tensor, count: int) -> tuple[int, int]:
    """The bits of the ``count``-th smallest magnitude, and how many equal to it are among the ``count``."""
    high = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64, device=values.device)
    for _, bits in _blocks(values):
        high += torch.bincount(bits >> _LOW_BITS, minlength=len(high))
    upper, count = _bin_of(high, count)
    low = torch.zeros(1 << _LOW_BITS, dtype=torch.int64, device=values.device)
    for _, bits in _blocks(values):
        low += torch.bincount(bits[(bits >> _LOW_BITS) == upper] & (len(low) - 1), minlength=len(low))
    lower, count = _bin_of(low, count)
    return upper << _LOW_BITS | lower, count


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that the ``count``-th element lies in, and which one of that bin it is."""
    up_to = histogram.cumsum(0)
    position = int(torch.searchsorted(up_to, count))
    return position, count - int(up_to[position] - histogram[position])

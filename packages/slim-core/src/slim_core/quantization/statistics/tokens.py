"""A sample of the tokens that a linear reads, spread over how large their largest value is.

A plain random sample rarely holds the few tokens with outliers, and a mean over tokens holds none. Here tokens are
sorted into strata by their largest absolute value, half an octave each, and every stratum gets the same share of the
sample, as far as it has tokens.

Which tokens of a stratum are taken is decided by a hash of their values, so the sample does not depend on the order in
which tokens arrive, on batches, or on how they were divided over processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slim_core.errors import InvalidModelError, UnsupportedError

__all__ = ["TokenSample"]

_STRATA_PER_OCTAVE = 2
_SEED = 1234
_HASHED_CHANNELS = 64
_SPARE_ROWS = 64
_Integers = np.ndarray[Any, np.dtype[np.int64]]


class TokenSample:
    """At most ``size`` tokens of all that were seen; memory for them and one batch.

    Tokens of zeros say nothing and are left out.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._counts: dict[int, int] = {}  # stratum to tokens seen
        # Of the tokens held, in the order of their strata and hashes: stratum, hash, and row of the buffer.
        self._levels: _Integers = np.empty(0, np.int64)
        self._keys: _Integers = np.empty(0, np.int64)
        self._places: _Integers = np.empty(0, np.int64)
        self._buffer = torch.empty(0, 0)

    @property
    def seen(self) -> int:
        """How many tokens there were to choose from."""
        return sum(self._counts.values())

    def update(self, x: Tensor) -> None:
        """Take in activations ``(..., channels)``.

        Raises:
            InvalidModelError: they hold NaN or infinity.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.numel():
            return
        largest = rows.abs().amax(1).float().cpu()
        if not bool(torch.isfinite(largest).all()):
            raise InvalidModelError("its activations hold NaN or infinity", remedy="check the model")
        if not bool(largest.all()):
            rows, largest = rows[(largest > 0).to(rows.device)], largest[largest > 0]
        levels = (_STRATA_PER_OCTAVE * largest.double().log2()).floor().long().numpy()
        strata, counts = np.unique(levels, return_counts=True)
        seen = dict(zip(strata.tolist(), counts.tolist(), strict=True))
        # Only what stays in the sample leaves the device.
        self._take(seen, levels, _hashes(rows), rows.shape[1], lambda i: rows[i.to(rows.device)].float().cpu())

    def merge(self, other: TokenSample) -> None:
        """Add what another one saw; its size is no smaller."""
        places = torch.as_tensor(other._places)
        width = other._buffer.shape[1]
        self._take(other._counts, other._levels, other._keys, width, lambda i: other._buffer[places[i]])

    def tokens(self) -> Tensor:
        """float32 ``(at most size, channels)``, those with small values first.

        Raises:
            UnsupportedError: no token was seen.
        """
        taken = self._taken()
        starts = {level: int(np.searchsorted(self._levels, level)) for level in taken}
        places = [self._places[starts[level] : starts[level] + count] for level, count in taken.items()]
        return self._buffer[torch.as_tensor(np.concatenate(places))]

    def counts(self) -> Tensor:
        """float32 ``(tokens,)``: how many of all that were seen each of :meth:`tokens` stands for.

        Sums over all tokens are estimated without bias by sums over the sample that count each so often.

        Raises:
            UnsupportedError: no token was seen.
        """
        return torch.cat([torch.full((n,), self._counts[level] / max(n, 1)) for level, n in self._taken().items()])

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> TokenSample:
        """The same tokens as ``(x - shift) / scale``; nothing is to be added to it."""
        other = TokenSample(self.size)
        other._counts, other._levels, other._keys, other._places = self._counts, self._levels, self._keys, self._places
        if len(self._buffer):
            other._buffer = (self._buffer if shift is None else self._buffer - shift.cpu()) / scale.cpu()
        return other

    def _take(
        self, seen: dict[int, int], levels: _Integers, keys: _Integers, width: int, fetch: Callable[[Tensor], Tensor]
    ) -> None:
        """Of some more tokens, take those with the smallest hashes of their stratum, and drop what they displace.

        Args:
            fetch: gives float32 rows ``(n, width)`` by their indices.
        """
        if not len(levels):
            return
        held = len(self._levels)
        if held and width != self._buffer.shape[1]:
            widths = f"{self._buffer.shape[1]} and {width}"
            raise UnsupportedError(f"tokens of different widths, {widths}, cannot share a sample")
        self._counts = dict(self._counts)
        for level, count in seen.items():
            self._counts[level] = self._counts.get(level, 0) + count
        levels, keys = np.concatenate([self._levels, levels]), np.concatenate([self._keys, keys])
        order = np.lexsort((keys, levels))
        sorted_levels = levels[order]
        ranks = np.arange(len(order)) - np.searchsorted(sorted_levels, sorted_levels)
        # Shares only ever become smaller, so what is beyond them now will not be asked for again.
        order = order[ranks <= self._share()]
        new = order >= held
        places = np.empty(len(order), np.int64)
        places[~new] = self._places[order[~new]]
        free = np.setdiff1d(np.arange(len(self._buffer)), places[~new])
        if (more := int(new.sum()) - len(free)) > 0:
            old = self._buffer if held else self._buffer.new_empty(0, width)
            # Room for the next ones too: a larger buffer is in memory beside the last, and the heap keeps both.
            more = -(-max(more, min(len(old), self.size - len(old))) // _SPARE_ROWS) * _SPARE_ROWS
            free = np.append(free, np.arange(len(old), len(old) + more))
            self._buffer = torch.cat([old, old.new_empty(more, width)])
        places[new] = free[: int(new.sum())]
        self._buffer[torch.as_tensor(places[new])] = fetch(torch.as_tensor(order[new] - held))
        self._levels, self._keys, self._places = levels[order], keys[order], places

    def _taken(self) -> dict[int, int]:
        """How many tokens of every stratum are in the sample, those with small values first."""
        levels = sorted(self._counts)
        if not levels:
            raise UnsupportedError("no token was seen to take a sample of", remedy="use a larger calibration set")
        share = self._share()
        taken = {level: min(self._counts[level], share) for level in levels}
        left = self.size - sum(taken.values())
        for level in reversed(levels):  # what is left goes to the largest, one each
            if left and taken[level] < self._counts[level]:
                taken[level] += 1
                left -= 1
        return taken

    def _share(self) -> int:
        """The largest number of tokens that every stratum may have, if it has them."""
        left, share = self.size, 0
        counts = sorted(self._counts.values())
        for i, count in enumerate(counts):
            share = left // (len(counts) - i)
            if count > share:
                return share
            left -= count
        return self.size if counts else share


def _hashes(rows: Tensor) -> _Integers:
    """int64 ``(tokens,)``: a hash of the float32 bits of some channels of every row; 0.0 and -0.0 are alike.

    The channels are spread over the row. They are so many that two tokens with the same values in all of them are as
    good as the same token.
    """
    step = -(-rows.shape[1] // _HASHED_CHANNELS)
    values = rows[:, ::step].float().cpu().contiguous()
    generator = np.random.Generator(np.random.PCG64(_SEED))
    factors = generator.integers(0, 2**64, values.shape[1], dtype=np.uint64) | np.uint64(1)
    bits = (values + 0.0).numpy().view(np.uint32)
    keys = (bits.astype(np.uint64) * factors).sum(1, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return (keys ^ (keys >> np.uint64(31))).view(np.int64)

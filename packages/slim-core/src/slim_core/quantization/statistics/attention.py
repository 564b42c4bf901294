"""What is known of the states of an attention: extremes of every channel or head, and its largest values.

All of it is independent of the order of samples and of how they are batched, and can be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError, SpecError, UnexpectedError
from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionForm, StateForm

__all__ = ["AttentionStatistics", "Largest", "StateStatistics"]


@dataclass
class Largest:
    """The ``keep`` largest values of every row, exactly, of however many are seen.

    Args:
        values: float32 ``(rows, up to keep)`` in no order; None before anything was seen.
        count: values seen in each row.
    """

    keep: int
    values: Tensor | None = None
    count: int = 0

    def update(self, x: Tensor) -> None:
        """Take in values ``(rows, n)``."""
        if x.shape[1]:
            self._add(_top(x, self.keep), x.shape[1])

    def merge(self, other: Largest) -> None:
        """Add what another one saw."""
        if other.values is not None:
            self._add(other.values, other.count)

    def _add(self, values: Tensor, count: int) -> None:
        self.values = values if self.values is None else _top(torch.cat([self.values, values], 1), self.keep)
        self.count += count

    def rescaled(self, factor: Tensor) -> Largest:
        """The same for rows multiplied by positive factors ``(rows,)``; nothing is to be added to it."""
        return Largest(self.keep, None if self.values is None else self.values * factor.unsqueeze(1), self.count)

    def bound(self, share: float) -> Tensor:
        """The smallest bounds ``(rows,)`` below or at which at least this share of the values of each row lie.

        Raises:
            UnexpectedError: more was seen than there was room for.
        """
        above = above_bound(self.count, share)
        if self.values is None or above >= self.values.shape[1]:
            raise UnexpectedError(f"the {above + 1} largest of {self.count} values are needed, {self.keep} were kept")
        return self.values.topk(above + 1, dim=1).values[:, above]


def above_bound(count: int, share: float) -> int:
    """How many of ``count`` values may lie above a bound that holds a share of them, counted in decimal fractions."""
    return count - max(1, math.ceil(Fraction(str(share)) * count))


def _top(x: Tensor, keep: int) -> Tensor:
    return x.float() if x.shape[1] <= keep else x.topk(keep, dim=1, sorted=False).values.float()


@dataclass
class StateStatistics:
    """Extremes ``(rows,)`` in float32 of one state, and the values beyond its range; rows are channels or heads.

    Args:
        magnitudes: the largest magnitudes, kept if a symmetric range holds but a share of the values.
        highs, lows: the largest and (negated) smallest values, kept if an asymmetric range does.
    """

    form: StateForm
    minimum: Tensor | None = None
    maximum: Tensor | None = None
    tokens: int = 0
    magnitudes: Largest | None = None
    highs: Largest | None = None
    lows: Largest | None = None

    @classmethod
    def of(cls, form: StateForm, dim: int, tokens: int) -> StateStatistics:
        """Empty statistics with room for what the form needs of so many tokens with ``dim`` channels a head."""
        found = cls(form)
        count = tokens * (1 if form.scope == "per_channel" else dim)
        if form.share < 1 and form.symmetric:
            found.magnitudes = Largest(above_bound(count, form.share) + 1)
        elif form.share < 1:
            keep = above_bound(count, found.side) + 1
            found.highs, found.lows = Largest(keep), Largest(keep)
        return found

    @property
    def side(self) -> float:
        """The share of the values that one end of an asymmetric range must hold."""
        return (1 + self.form.share) / 2

    def update(self, x: Tensor) -> None:
        """Take in states ``(batch, heads, tokens, channels)``."""
        x = x.detach()
        if not x.numel():
            return
        rows = _rows(x, self.form)
        self._extremes(rows.amin(1).float(), rows.amax(1).float(), x.shape[0] * x.shape[2])
        if self.magnitudes is not None:
            self.magnitudes.update(rows.abs())
        if self.highs is not None and self.lows is not None:
            self.highs.update(rows)
            self.lows.update(-rows)

    def merge(self, other: StateStatistics) -> None:
        """Add what another one saw."""
        if other.minimum is None or other.maximum is None:
            return
        self._extremes(other.minimum, other.maximum, other.tokens)
        for mine, others in (
            (self.magnitudes, other.magnitudes),
            (self.highs, other.highs),
            (self.lows, other.lows),
        ):
            if mine is not None and others is not None:
                mine.merge(others)

    def _extremes(self, low: Tensor, high: Tensor, tokens: int) -> None:
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)
        self.tokens += tokens

    def rescaled(self, factor: Tensor) -> StateStatistics:
        """The statistics of states whose channels were multiplied by positive factors ``(heads * channels,)``.

        Raises:
            UnexpectedError: they are not of single channels, so they do not say.
        """
        if self.form.scope != "per_channel":
            raise UnexpectedError(f"statistics {self.form.scope} cannot be rescaled channel by channel")
        if self.minimum is None or self.maximum is None:
            return self
        factor = factor.to(self.minimum)
        tails = [None if tail is None else tail.rescaled(factor) for tail in (self.magnitudes, self.highs, self.lows)]
        return StateStatistics(self.form, self.minimum * factor, self.maximum * factor, self.tokens, *tails)

    def bounds(self, name: str, state: str) -> tuple[Tensor, Tensor]:
        """The range to quantize with: the narrowest that holds the share of the form, two float32 ``(rows,)`` on the
        host. A symmetric one is cut at the same magnitude on both sides, an asymmetric one by half of what may lie
        outside on either.

        Args:
            name, state: the attention, and which of its states, for errors.

        Raises:
            SpecError: nothing was observed.
            InvalidModelError: NaN or infinity was observed.
        """
        if self.minimum is None or self.maximum is None:
            raise SpecError(
                f"no calibration sample reached this attention, so the range of its {state} is unknown",
                where=name,
                remedy="use a larger calibration set, or exclude this attention",
            )
        low, high = self.minimum, self.maximum
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise InvalidModelError(
                f"its {state} holds NaN or infinity", where=name, remedy="check the model and the calibration set"
            )
        if self.magnitudes is not None:
            bound = self.magnitudes.bound(self.form.share)
            low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
        elif self.highs is not None and self.lows is not None:
            low, high = -self.lows.bound(self.side), self.highs.bound(self.side)
        return low.cpu(), high.cpu()


def _rows(x: Tensor, form: StateForm) -> Tensor:
    """States as ``(rows, values)``; channels are ordered head by head."""
    if form.scope == "per_channel":
        return x.permute(1, 3, 0, 2).reshape(x.shape[1] * x.shape[3], -1)
    return x.transpose(0, 1).reshape(x.shape[1], -1)


@dataclass
class AttentionStatistics:
    """What was seen of the statically quantized states of one attention, by their name."""

    states: dict[str, StateStatistics] = field(default_factory=dict[str, StateStatistics])

    @classmethod
    def of(cls, form: AttentionForm, info: AttentionInfo, tokens: int) -> AttentionStatistics:
        """Empty statistics with room for what the form needs of so many tokens."""
        dims = {"query": info.key_dim, "key": info.key_dim, "value": info.value_dim}
        return cls({n: StateStatistics.of(state, dims[n], tokens) for n, state in form.states() if state.is_static})

    def observe(self, query: Tensor | None, key: Tensor, value: Tensor) -> None:
        """Take in states: a tap for :class:`~slim_core.model.attention.AttentionAccess` that changes nothing."""
        for name, state in (("query", query), ("key", key), ("value", value)):
            if state is not None and (statistics := self.states.get(name)) is not None:
                statistics.update(state)

    def rescaled(self, state: str, factor: Tensor) -> AttentionStatistics:
        """The same with the channels of one state multiplied by positive factors ``(heads * channels,)``.

        Statistics of whole heads do not say what becomes of them; they are left as they are, to be observed afresh.
        """
        seen = self.states.get(state)
        if seen is None or seen.form.scope != "per_channel":
            return self
        return AttentionStatistics({**self.states, state: seen.rescaled(factor)})

    def merge(self, other: AttentionStatistics) -> None:
        """Add what another one saw."""
        for name, statistics in other.states.items():
            self.states[name].merge(statistics)

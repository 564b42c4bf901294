"""Statistics of the inputs of linears, as many as were asked for, and the observer that gathers them."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor, nn

from slim_core.errors import InvalidModelError
from slim_core.logging import get_logger
from slim_core.quantization.statistics.channels import ChannelStatistics
from slim_core.quantization.statistics.hessian import Hessian
from slim_core.quantization.statistics.histogram import Histogram
from slim_core.quantization.statistics.ranges import TensorRange, observe_range
from slim_core.quantization.statistics.tokens import TokenSample

__all__ = ["SAMPLED_TOKENS", "InputObserver", "InputStatistics", "Need"]

_logger = get_logger(__name__)
SAMPLED_TOKENS = 512


class Need(StrEnum):
    """What a processor may ask to know of the inputs of a linear."""

    RANGE = "range"
    SAMPLE_RANGES = "sample_ranges"
    HISTOGRAM = "histogram"
    CHANNELS = "channels"
    HESSIAN = "hessian"
    TOKENS = "tokens"


@dataclass
class InputStatistics:
    """What was seen of one input. Only the parts that were asked for are filled; ``range`` always is.

    Args:
        kept: a sample of the tokens themselves, at most :data:`SAMPLED_TOKENS`.
        siblings: only of an expert that too few tokens reached: what all experts of its layer saw of this input. Its
            range takes the place of the own one, and methods that need to know more do without.
    """

    needs: frozenset[Need] = frozenset()
    range: TensorRange = field(default_factory=TensorRange)
    histogram: Histogram = field(default_factory=Histogram)
    channels: ChannelStatistics = field(default_factory=ChannelStatistics)
    hessian: Hessian = field(default_factory=Hessian)
    kept: TokenSample = field(default_factory=lambda: TokenSample(SAMPLED_TOKENS))
    siblings: InputStatistics | None = None

    @property
    def tokens(self) -> int:
        return self.range.tokens

    @property
    def is_starved(self) -> bool:
        """Whether too few tokens were seen to learn from."""
        return self.siblings is not None

    def update(self, x: Tensor) -> None:
        """Take in activations ``(batch, ..., channels)``."""
        self.range.merge(observe_range(x))
        if Need.HISTOGRAM in self.needs:
            self.histogram.update(x)
        if Need.CHANNELS in self.needs:
            self.channels.update(x)
        if Need.HESSIAN in self.needs:
            self.hessian.update(x)
        if Need.TOKENS in self.needs:
            self.kept.update(x)

    def merge(self, other: InputStatistics) -> None:
        """Add what another one saw."""
        self.merge_small(other)
        self.hessian.merge(other.hessian)

    def merge_small(self, other: InputStatistics) -> None:
        """:meth:`merge` of all but the Hessian."""
        self.range.merge(other.range)
        self.histogram.merge(other.histogram)
        self.channels.merge(other.channels)
        self.kept.merge(other.kept)

    def settle(self) -> None:
        """All has been seen."""
        self.channels.settle()

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> InputStatistics:
        """The statistics of ``(x - shift) / scale``, exactly, without looking at ``x`` again.

        Extremes and sums of channels carry over and give the range of the whole; so do the Hessian and the tokens
        kept. What is lost: the histogram, and the extremes of single samples (``aggregation_type: mean``).

        Args:
            scale, shift: float32 ``(channels,)``, the scale positive.
        """
        channels = self.channels.rescaled(scale, shift)
        whole = TensorRange(samples=self.range.samples, tokens=self.range.tokens)
        whole.sum_of_minima = whole.sum_of_maxima = float("nan")
        if channels.minimum is not None and channels.maximum is not None:
            whole.minimum, whole.maximum = float(channels.minimum.min()), float(channels.maximum.max())
        return InputStatistics(
            self.needs,
            whole,
            channels=channels,
            hessian=self.hessian.rescaled(scale, shift, self.channels.total),
            kept=self.kept.rescaled(scale, shift),
            siblings=None if self.siblings is None else self.siblings.rescaled(scale, shift),
        )


@dataclass
class _Watched:
    """A linear under observation; ``leader`` is the one whose statistics it shares."""

    statistics: InputStatistics
    calls: int = 0
    leader: str | None = None


@dataclass
class InputObserver:
    """Watches the inputs of some linears while a unit runs.

    Linears that are always given the very same tensor (q, k and v; gate and up) share one set of statistics.

    Args:
        only: the linears that are looked at for now; None: all that are watched.
    """

    only: Container[str] | None = None
    _watched: dict[str, _Watched] = field(default_factory=dict[str, _Watched])
    _handles: list[Any] = field(default_factory=list[Any])
    _last: tuple[weakref.ref[Tensor], str] | None = None

    def watch(
        self, name: str, linear: nn.Module, needs: Iterable[Need] = (Need.RANGE,), tokens: int = SAMPLED_TOKENS
    ) -> None:
        """Start observing a linear; of ``tokens``, where they are needed, so many are kept."""
        self._watched[name] = _Watched(InputStatistics(frozenset(needs), kept=TokenSample(tokens)))

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, args[0] if args else kwargs["input"])

        self._handles.append(linear.register_forward_pre_hook(hook, with_kwargs=True))

    def _see(self, name: str, x: Tensor) -> None:
        if self.only is not None and name not in self.only:
            return
        watched = self._watched[name]
        watched.calls += 1
        if self._last is not None and self._last[0]() is x:
            leader = self._last[1]
            if watched.calls == 1 and self._may_share(name, leader):
                watched.leader = leader
                self._watched[leader].statistics.hessian.shared = True
            if watched.leader == leader:
                return
        if watched.leader is not None:
            self._part(name, watched)
        try:
            watched.statistics.update(x)
        except InvalidModelError as error:
            raise InvalidModelError(error.what, where=error.where or name, remedy=error.remedy) from error
        self._last = (weakref.ref(x), name)

    def _may_share(self, name: str, leader: str) -> bool:
        other = self._watched[leader]
        return other.calls == 1 and self._watched[name].statistics.needs <= other.statistics.needs

    def _part(self, name: str, watched: _Watched) -> None:
        """No longer share. The calls so far are those of the leader, or nearly: good enough for such a model."""
        assert watched.leader is not None
        _logger.warning("%s and %s shared their input only in some calls; their statistics mix", name, watched.leader)
        watched.statistics.merge(self._watched[watched.leader].statistics)
        watched.leader = None

    @property
    def statistics(self) -> dict[str, InputStatistics]:
        """What was seen of every linear; those that share their input have the same object."""
        return {
            name: self._watched[watched.leader].statistics if watched.leader else watched.statistics
            for name, watched in self._watched.items()
        }

    def sharing(self) -> dict[str, tuple[int, str]]:
        """By linear, how often it was called, and the linear whose statistics it shares: its own name if none."""
        return {name: (watched.calls, watched.leader or name) for name, watched in self._watched.items()}

    def settled(self) -> dict[str, InputStatistics]:
        """:attr:`statistics`, when all has been seen."""
        found = self.statistics
        for seen in {id(one): one for one in found.values()}.values():
            seen.settle()
        return found

    def stop(self) -> None:
        """Stop observing; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

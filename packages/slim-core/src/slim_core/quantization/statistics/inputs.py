"""Statistics of the inputs of linears, as many as were asked for, and the observer that gathers them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor, nn

from slim_core.logging import get_logger
from slim_core.quantization.statistics.channels import ChannelStatistics
from slim_core.quantization.statistics.hessian import Hessian
from slim_core.quantization.statistics.ranges import TensorRange, observe_range

__all__ = ["InputObserver", "InputStatistics", "Need"]

_logger = get_logger(__name__)


class Need(StrEnum):
    """What a processor may ask to know of the inputs of a linear."""

    RANGE = "range"
    CHANNELS = "channels"
    HESSIAN = "hessian"


@dataclass
class InputStatistics:
    """What was seen of one input. Only the parts that were asked for are filled; ``range`` always is."""

    needs: frozenset[Need] = frozenset()
    range: TensorRange = field(default_factory=TensorRange)
    channels: ChannelStatistics = field(default_factory=ChannelStatistics)
    hessian: Hessian = field(default_factory=Hessian)

    @property
    def tokens(self) -> int:
        return self.range.tokens

    def update(self, x: Tensor) -> None:
        """Take in activations ``(batch, ..., channels)``."""
        self.range.merge(observe_range(x))
        if Need.CHANNELS in self.needs:
            self.channels.update(x)
        if Need.HESSIAN in self.needs:
            self.hessian.update(x)

    def merge(self, other: InputStatistics) -> None:
        """Add what another one saw."""
        self.range.merge(other.range)
        self.channels.merge(other.channels)
        self.hessian.merge(other.hessian)


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
    """

    _watched: dict[str, _Watched] = field(default_factory=dict[str, _Watched])
    _handles: list[Any] = field(default_factory=list[Any])
    _last: tuple[weakref.ref[Tensor], str] | None = None

    def watch(self, name: str, linear: nn.Module, needs: Iterable[Need] = (Need.RANGE,)) -> None:
        """Start observing a linear."""
        self._watched[name] = _Watched(InputStatistics(frozenset(needs)))

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, args[0] if args else kwargs["input"])

        self._handles.append(linear.register_forward_pre_hook(hook, with_kwargs=True))

    def _see(self, name: str, x: Tensor) -> None:
        watched = self._watched[name]
        watched.calls += 1
        if self._last is not None and self._last[0]() is x:
            leader = self._last[1]
            if watched.calls == 1 and self._may_share(name, leader):
                watched.leader = leader
            if watched.leader == leader:
                return
        if watched.leader is not None:
            self._part(name, watched)
        watched.statistics.update(x)
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

    def stop(self) -> None:
        """Stop observing; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

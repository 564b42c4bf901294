"""Where the time of a run goes: by phase on the thread that does the work, and how long threads behind it are busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from enum import StrEnum

__all__ = ["COMPUTING", "Busy", "Phase", "Profile"]


class Phase(StrEnum):
    """What the thread of a run is doing."""

    LOADING = "loading weights"
    FORWARDS = "forwards"
    RESHAPING = "smoothing and rotation"
    QUANTIZING = "quantizing"
    STAGES = "stages ahead"
    WRITER = "waiting for the writer"
    RANKS = "waiting for other ranks"
    REST = "the rest"


COMPUTING = (Phase.LOADING, Phase.FORWARDS, Phase.RESHAPING, Phase.QUANTIZING, Phase.STAGES)
"""The phases in which the run gets on by itself."""


class Profile:
    """Seconds of one thread by phase. A phase inside another one stops it meanwhile, so every second counts once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent: dict[str, float] = {}
        self._phase = Phase.REST
        self._since = clock()

    @contextmanager
    def within(self, phase: Phase) -> Generator[None]:
        """Within this context time counts for ``phase``."""
        outer = self._phase
        self._turn_to(phase)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, phase: Phase) -> None:
        now = self._clock()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def spent(self, before: Mapping[str, float] | None = None) -> dict[str, float]:
        """Seconds so far, beyond those of an earlier call if given; phases that took none are left out."""
        self._turn_to(self._phase)
        before = before or {}
        return {name: rest for name, all_ in self._spent.items() if (rest := all_ - before.get(name, 0.0)) > 0}


class Busy:
    """Seconds in which at least one of several pieces of work was under way, on whatever threads."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._state = threading.Condition()
        self._under_way = 0
        self._since = 0.0
        self._spent = 0.0

    def begin(self) -> None:
        with self._state:
            if not self._under_way:
                self._since = self._clock()
            self._under_way += 1

    def end(self) -> None:
        with self._state:
            self._under_way -= 1
            if not self._under_way:
                self._spent += self._clock() - self._since
                self._state.notify_all()

    @contextmanager
    def within(self) -> Generator[None]:
        """One piece of work."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @property
    def seconds(self) -> float:
        """So far, with what is under way."""
        with self._state:
            return self._spent + (self._clock() - self._since if self._under_way else 0.0)

    def wait(self) -> None:
        """Until nothing is under way."""
        with self._state:
            self._state.wait_for(lambda: not self._under_way)

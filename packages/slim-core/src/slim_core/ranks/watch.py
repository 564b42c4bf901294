"""Watching the other ranks: whether each is alive, and gets on."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from slim_core.errors import EnvVarError
from slim_core.logging import get_logger

__all__ = ["TIMEOUT_VARIABLE", "Fault", "Watch", "timeout_of_environment"]

TIMEOUT_VARIABLE = "SLIM_RANK_TIMEOUT"
_TIMEOUT = 1800.0
_SILENCE = 120.0
_GRACE = 10.0
_logger = get_logger(__name__)


def timeout_of_environment() -> float:
    """Seconds after which a rank that gets no further is given up.

    Raises:
        EnvVarError: ``SLIM_RANK_TIMEOUT`` is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(_TIMEOUT))
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise EnvVarError(f"{TIMEOUT_VARIABLE} is {text!r}", where="environment", remedy="set it to seconds, e.g. 1800")


@dataclass(frozen=True)
class Fault:
    """A rank that no longer takes part, and why."""

    rank: int
    reason: str


@dataclass
class _Seen:
    """The last sign of life of a rank: its number, when it came, how far the rank was, and since when."""

    beat: int
    when: float
    ticks: int
    since: float
    where: str = ""


class Watch:
    """Tells the others that this rank is alive and how far it has come, and notices when one of them stops.

    A rank that waits for others is not to blame for getting no further. The first fault is kept; ``on_fault`` is told
    of it, and if the process has not ended some seconds later, it is ended, for whoever waits for a rank that is gone
    waits in code that cannot be interrupted.

    Args:
        store: a connection of its own to the store of all ranks.
        timeout: seconds without progress; a rank that is silent altogether is given up after two minutes at most.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float, on_fault: Callable[[Fault], bool]) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._timeout, self._silence = timeout, min(timeout, _SILENCE)
        self._on_fault = on_fault
        self._seen: dict[int, _Seen] = {}
        self._stop = threading.Event()
        self.ticks = 0
        self.where = "the beginning"
        self.waiting = False
        self.fault: Fault | None = None
        self._thread = threading.Thread(target=self._run, name="slim-watch", daemon=True)

    def start(self) -> None:
        """All ranks are connected now, so one of which nothing is ever heard is silent from now on."""
        now = time.monotonic()
        others = (rank for rank in range(self._size) if rank != self._rank)
        self._seen = {rank: _Seen(0, now, 0, now, self.where) for rank in others}
        self._thread.start()

    def stop(self) -> None:
        """The run has ended, well or not."""
        self._stop.set()
        self._thread.join(self._silence)

    def _run(self) -> None:
        every = min(1.0, self._silence / 8)
        beat = 0
        while not self._stop.wait(every):
            beat += 1
            try:
                told = json.dumps([beat, self.ticks, self.waiting, self.where])
                self._store.set(f"beat/{self._rank}", told)
                found = self._look()
            except Exception as error:  # noqa: BLE001 - the store is gone, and with it rank 0
                found = Fault(0, f"it can no longer be reached ({str(error).splitlines()[0][:200]})")
            if found is not None and not self._stop.is_set():
                self._give_up(found)
                return

    def _look(self) -> Fault | None:
        now = time.monotonic()
        for rank, seen in self._seen.items():
            key = f"beat/{rank}"
            if self._store.check([key]):
                beat, ticks, waiting, where = json.loads(self._store.get(key))
                if beat != seen.beat:
                    seen.beat, seen.when = beat, now
                if ticks != seen.ticks or waiting or where != seen.where:
                    seen.ticks, seen.since, seen.where = ticks, now, where
            if now - seen.when > self._silence:
                return Fault(rank, f"it has given no sign of life for {self._silence:g} s, at {seen.where}")
            if now - seen.since > self._timeout:
                return Fault(rank, f"it hangs: no progress for {self._timeout:g} s, at {seen.where}")
        return None

    def _give_up(self, fault: Fault) -> None:
        self.fault = self.fault or fault
        if self._on_fault(fault):
            return
        if not self._stop.wait(_GRACE):
            _logger.error("rank %d is lost: %s; run again with --resume", fault.rank, fault.reason)
            os._exit(1)

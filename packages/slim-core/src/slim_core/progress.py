"""What a run tells while it runs: one stream of events, shown by rich on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Protocol

from slim_core.logging import error_console, get_logger, on_terminal
from slim_core.memory import resident_memory

__all__ = [
    "PlainProgress",
    "Progress",
    "RichProgress",
    "SilentProgress",
    "show_progress",
]

_logger = get_logger(__name__)


class Progress(Protocol):
    """Receives the events of one run."""

    def start(self, title: str, steps: Mapping[str, int]) -> None:
        """The run begins; ``steps`` are its units and the weight of each in the whole."""
        ...

    def begin(self, step: str) -> None:
        """Work on a unit begins."""
        ...

    def done(self, step: str) -> None:
        """A unit is finished."""
        ...

    def stop(self) -> None:
        """The run has ended, well or not."""
        ...


class SilentProgress:
    """Shows nothing."""

    def start(self, title: str, steps: Mapping[str, int]) -> None:
        del title, steps

    def begin(self, step: str) -> None:
        del step

    def done(self, step: str) -> None:
        del step

    def stop(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class PlainProgress:
    """A log line for every finished unit, with share, time left and memory; at most one a second."""

    def __init__(self) -> None:
        self._steps: Mapping[str, int] = {}
        self._done = 0
        self._began = 0.0
        self._said = -math.inf

    def start(self, title: str, steps: Mapping[str, int]) -> None:
        self._steps, self._done, self._began, self._said = steps, 0, time.monotonic(), -math.inf
        _logger.info("%s: %d units", title, len(steps))

    def begin(self, step: str) -> None:
        del step

    def done(self, step: str) -> None:
        self._done += self._steps.get(step, 0)
        total = sum(self._steps.values()) or 1
        now = time.monotonic()
        if now - self._said < 1 and self._done < total:
            return
        self._said = now
        share = self._done / total
        left = (now - self._began) * (1 - share) / share if share else 0.0
        _logger.info(
            "%3d %%  %s done, %s left, %d MiB in memory", share * 100, step, _clock(left), resident_memory() >> 20
        )

    def stop(self) -> None:
        pass


class RichProgress:
    """A live bar with the unit at work, time left and memory."""

    def start(self, title: str, steps: Mapping[str, int]) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._steps = steps
        self.stop()
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[memory]}  {task.fields[unit]}", markup=False),
            console=error_console(),
        )
        self._task = self._bar.add_task(title, total=sum(steps.values()) or 1, unit="", memory="")
        self._bar.start()

    def begin(self, step: str) -> None:
        self._bar.update(self._task, unit=step, memory=f"{resident_memory() >> 20} MiB")

    def done(self, step: str) -> None:
        self._bar.update(self._task, advance=self._steps.get(step, 0), memory=f"{resident_memory() >> 20} MiB")

    def stop(self) -> None:
        if hasattr(self, "_bar"):
            self._bar.stop()


def show_progress() -> Progress:
    """The live bar if standard error is a terminal, plain lines otherwise."""
    return RichProgress() if on_terminal() else PlainProgress()

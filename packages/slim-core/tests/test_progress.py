"""What a run tells: plain lines with share, time left and memory, or a live bar on a terminal."""

from __future__ import annotations

import builtins
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from slim_core import progress
from slim_core.logging import error_console
from slim_core.memory import peak_memory, resident_memory
from slim_core.progress import (
    PlainProgress,
    Progress,
    RichProgress,
    SilentProgress,
    show_progress,
)


@pytest.fixture(autouse=True)
def _console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("slim"), "propagate", True)
    error_console.cache_clear()
    yield
    error_console.cache_clear()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.25]  # a machine that has just been started
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "resident_memory", lambda: 300 << 20)
    return now


def test_plain_lines(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slim")
    shown = PlainProgress()
    shown.start("Quantizing", {"embed": 10, "block 0": 40, "block 1": 40, "head": 10})
    for seconds, step in ((6, "embed"), (24, "block 0"), (24.5, "block 1"), (0.1, "head")):
        shown.begin(step)
        clock[0] += seconds
        shown.done(step)
    shown.stop()
    assert [record.getMessage() for record in caplog.records] == [
        "Quantizing: 4 units",
        " 10 %  embed done, 0:54 left, 300 MiB in memory",
        " 50 %  block 0 done, 0:30 left, 300 MiB in memory",
        " 90 %  block 1 done, 0:06 left, 300 MiB in memory",
        "100 %  head done, 0:00 left, 300 MiB in memory",
    ]


def test_plain_lines_come_once_a_second_at_most(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slim")
    shown = PlainProgress()
    steps = {str(i): 1 for i in range(100)}
    shown.start("Quantizing", steps)
    for step in steps:
        clock[0] += 0.0625
        shown.done(step)
    said = [record.getMessage().split("%")[0].strip() for record in caplog.records[1:]]
    assert said == ["1", "17", "33", "49", "65", "81", "97", "100"]


def test_plain_lines_with_odd_steps(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slim")
    shown = PlainProgress()
    shown.done("before the start")
    shown.start("Nothing", {})
    clock[0] += 5
    shown.done("unknown")
    shown.start("Weightless", {"a": 0})
    shown.done("a")
    assert [record.getMessage() for record in caplog.records][1:3] == [
        "Nothing: 0 units",
        "  0 %  unknown done, 0:00 left, 300 MiB in memory",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "1:00:00"), (360_000, "100:00:00")]
)
def test_the_clock(seconds: float, text: str) -> None:
    assert progress._clock(seconds) == text


def work(shown: Progress, title: str = "Quantizing") -> None:
    shown.start(title, {"a": 1, "model.layers[0]": 3, "[/b]": 0})
    for step in ("a", "unknown", "model.layers[0]", "[/b]"):
        shown.begin(step)
        shown.done(step)
    shown.stop()


def test_the_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    shown = show_progress()
    assert isinstance(shown, RichProgress)
    shown.stop()  # a run that ends before it begins
    work(shown, "Quantizing [red]x[/]")
    shown.stop()
    work(shown)  # one object may be used again
    shown.start("Left open", {"b": 1})
    left_open = shown._bar
    shown.start("Started over", {"b": 1})
    assert not left_open.live.is_started
    shown.stop()
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for text in ("Quantizing [red]x[/]", "100%", "ETA", "MiB  ", "[/b]", "Started over"):
        assert text in seen


def test_log_lines_do_not_tear_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = RichProgress()
    shown.start("x", {"a": 1})
    assert shown._bar.console is error_console()
    shown.stop()


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_no_terminal_no_bar(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert isinstance(show_progress(), PlainProgress)


def test_silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    work(SilentProgress())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_memory_figures() -> None:
    before, highest = resident_memory(), peak_memory()
    assert 0 < before <= highest + (1 << 20)
    room = 64 << 20
    data = bytearray(room)
    data[::4096] = b"x" * (room // 4096)
    assert resident_memory() - before > room * 0.9
    assert peak_memory() >= before + room * 0.9
    del data
    assert peak_memory() >= before + room * 0.9


def test_the_peak_is_that_of_this_process_alone() -> None:
    """``ru_maxrss`` of a fresh process starts with the memory of the one that forked it."""
    code = "from slim_core.memory import peak_memory, resident_memory; print(peak_memory(), resident_memory())"
    room = 400 << 20
    data = bytearray(room)
    data[::4096] = b"x" * (room // 4096)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak, resident = map(int, done.stdout.split())
    assert resident <= peak + (1 << 20)
    assert peak < room


def test_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", refuse)
    assert resident_memory() == peak_memory() > 1 << 20

"""What commands share: tables, sizes, errors on a terminal, exit statuses."""

from __future__ import annotations

import io
import threading

import pytest

from slim_core.console import run_command, show_table
from slim_core.errors import SchemaValidateError
from slim_core.logging import error_console
from slim_core.sizes import human_size


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (28 << 30, "28.0 GiB"), (3 << 40, "3.00 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert human_size(count) == text


def test_table_without_a_terminal_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["", "original"], [["perplexity", "3.1"], ["tokens", "[2]"]])
    assert capsys.readouterr().out == "            original\nperplexity  3.1\ntokens      [2]\n"


def test_table_on_a_terminal_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    show_table(["name", "value"], [["[bold]", "1"]])
    assert "[bold]" in screen.getvalue()
    assert "\u2502" in screen.getvalue()


def test_error_on_a_terminal_is_red_and_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    error_console.cache_clear()

    def fail() -> None:
        raise SchemaValidateError("x" * 300, where="[here]", remedy="do better")

    try:
        assert run_command(fail) == 1
    finally:
        error_console.cache_clear()
    assert screen.getvalue() == f"\x1b[1;31merror 203 SchemaValidateError: [here]: {'x' * 300} (do better)\x1b[0m\n"


def test_status_of_the_work_passes_through() -> None:
    assert run_command(lambda: 3) == 3
    assert run_command(lambda: None) == 0


def test_works_outside_the_main_thread() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run_command(lambda: 0)))
    thread.start()
    thread.join()
    assert statuses == [0]

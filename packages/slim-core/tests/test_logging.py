"""Log lines: the environment variable decides the level, the terminal decides the form."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from rich.logging import RichHandler

from slim_core.errors import EnvVarError
from slim_core.logging import (
    LOG_LEVEL_VARIABLE,
    error_console,
    get_logger,
    level_from_environment,
    on_terminal,
    set_up_logging,
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger("slim")
    before = root.handlers, root.propagate, root.level
    error_console.cache_clear()
    yield
    root.handlers, root.propagate = before[0], before[1]
    root.setLevel(before[2])
    error_console.cache_clear()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names() -> None:
    assert get_logger("slim_core.checkpoint.reader").name == "slim.core.checkpoint.reader"
    assert get_logger("slim_llm").name == "slim.llm"
    assert get_logger("third_party.adapter").name == "slim.third_party.adapter"


@pytest.mark.parametrize(
    ("value", "level"),
    [(None, 20), ("INFO", 20), ("DEBUG", 10), ("debug", 10), ("Info", 20), (" DEBUG ", 10)],
)
def test_the_level(monkeypatch: pytest.MonkeyPatch, value: str | None, level: int) -> None:
    monkeypatch.delenv(LOG_LEVEL_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(LOG_LEVEL_VARIABLE, value)
    assert level_from_environment() == level


@pytest.mark.parametrize("value", ["", "WARNING", "10", "INFO,DEBUG", "trace"])
def test_illegal_levels(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MSMODELSLIM_LOG_LEVEL", value)
    with pytest.raises(EnvVarError, match=f"MSMODELSLIM_LOG_LEVEL is {value!r}.*INFO or DEBUG, or unset it") as caught:
        set_up_logging()
    assert caught.value.code == 102


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv(LOG_LEVEL_VARIABLE, raising=False)
    set_up_logging()
    logger = get_logger("slim_core.x")
    logger.debug("hidden")
    logger.info("[bold]%s", "as it is")
    logger.warning("watch out")
    lines = stream.getvalue().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["INFO [bold]as it is", "WARNING watch out"]
    assert all(len(line.split(" ")[0].split(":")) == 3 for line in lines)


def test_setting_up_twice_doubles_nothing_and_reaches_no_other_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, elsewhere = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    other = logging.StreamHandler(elsewhere)
    logging.getLogger().addHandler(other)
    try:
        set_up_logging(logging.DEBUG)
        set_up_logging(logging.DEBUG)
        get_logger("slim_core.x").debug("once")
    finally:
        logging.getLogger().removeHandler(other)
    assert stream.getvalue().count("once") == 1
    assert elsewhere.getvalue() == ""


def test_a_terminal_gets_rich_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    set_up_logging(logging.INFO)
    [handler] = logging.getLogger("slim").handlers
    assert isinstance(handler, RichHandler)
    assert handler.console is error_console() is error_console()
    get_logger("slim_core.x").info("layers[0] [/red] done")
    assert "layers[0] [/red] done" in re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_a_process_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert not on_terminal()
    set_up_logging(logging.INFO)
    get_logger("slim_core.x").warning("nobody hears this")

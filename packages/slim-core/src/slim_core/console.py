"""What every command shares: questions, tables, and how an error becomes a line and an exit code. Imports no torch."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from slim_core.errors import EnvError, SlimError, UnexpectedError, UnsupportedError
from slim_core.logging import error_console, set_up_logging
from slim_core.sizes import human_size

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "EXIT_PROBLEMS", "ask", "human_size", "run_command", "say", "show_table"]

EXIT_ERROR = 1
EXIT_PROBLEMS = 3
EXIT_INTERRUPTED = 130
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM, errno.EMFILE)


def say(text: str) -> None:
    """A result, to standard output, where it stands before the log lines that come after it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def ask(question: str) -> bool:
    """Put a yes/no question to the user; anything but ``y`` or ``yes`` means no.

    Raises:
        UnsupportedError: nobody sits at the terminal.
    """
    answer = ""
    if sys.stdin.isatty():
        # To standard error: the question must be seen when standard output goes to a file.
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
    if not answer:
        raise UnsupportedError(
            f"a question needs an answer, and standard input is no terminal: {question}",
            remedy="pass --yes to agree beforehand, or give a recipe with --config_path",
        )
    return answer.strip().lower() in ("y", "yes")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: drawn by rich on a terminal, aligned columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        table = Table(*(Column(Text(name)) for name in header))
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def run_command(work: Callable[[], int | None], *, debug: bool = False) -> int:
    """Do the work of a command and return the exit status of the process.

    A :class:`SlimError` becomes one line on standard error and status 1, whatever else goes wrong too, as a
    :class:`UnexpectedError`. Ctrl-C and SIGTERM become 130. What ``work`` returns passes through.

    Args:
        debug: show tracebacks as well.
    """
    try:
        with _termination_interrupts():
            set_up_logging()
            _warn_once()
            status = work() or 0
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone. Nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:  # noqa: BLE001 - the last resort of the process
        if debug:
            traceback.print_exc()
        _report(error, debug)
        return EXIT_ERROR


def _report(error: Exception, debug: bool) -> None:
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        error = EnvError(error.strerror or "the system refused", where=error.filename and str(error.filename))
    elif isinstance(error, MemoryError):
        error = EnvError("the memory of this machine is used up", remedy="use runner: layer_wise, or fewer samples")
    elif not isinstance(error, SlimError):
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        advice = "" if debug else ", with what the same command prints when --debug is added"
        error = UnexpectedError(what, remedy=f"a bug in Slim; please report it{advice}")
    _complain(f"error {error.code} {type(error).__name__}: {error}")


def _complain(text: str) -> None:
    sys.stdout.flush()
    if sys.stderr.isatty():
        error_console().print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
    else:
        sys.stderr.write(f"{text}\n")


@contextmanager
def _termination_interrupts() -> Generator[None]:
    """Let SIGTERM do what Ctrl-C does, so that a run that is told to stop leaves its journal in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warn_once() -> None:
    """Drop warnings that were shown before: the plan that is shown and the run find the same ones."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            return True
        new = text not in said
        said.add(text)
        return new

    for handler in logging.getLogger("slim").handlers:
        handler.addFilter(is_new)

"""Logging: standard library loggers below ``slim``; the level comes from ``MSMODELSLIM_LOG_LEVEL``."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from slim_core.errors import EnvVarError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "LOG_LEVEL_VARIABLE",
    "error_console",
    "get_logger",
    "level_from_environment",
    "on_terminal",
    "set_up_logging",
]

LOG_LEVEL_VARIABLE = "MSMODELSLIM_LOG_LEVEL"
_LEVELS = {"INFO": logging.INFO, "DEBUG": logging.DEBUG}


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; ``name`` is its ``__name__``."""
    return logging.getLogger(f"slim.{name.removeprefix('slim_')}")


def level_from_environment() -> int:
    """The level named by ``MSMODELSLIM_LOG_LEVEL`` (any case).

    Raises:
        EnvVarError: the variable holds neither ``INFO`` nor ``DEBUG``.
    """
    value = os.environ.get(LOG_LEVEL_VARIABLE, "INFO")
    level = _LEVELS.get(value.strip().upper())
    if level is None:
        raise EnvVarError(
            f"{LOG_LEVEL_VARIABLE} is {value!r}", where="environment", remedy="set it to INFO or DEBUG, or unset it"
        )
    return level


def set_up_logging(level: int | None = None) -> None:
    """Send Slim's log lines to standard error: through rich on a terminal, plain elsewhere. Only commands call this."""
    if on_terminal():
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=error_console(), show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("slim")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(level_from_environment() if level is None else level)


def on_terminal() -> bool:
    """Whether someone can watch standard error. A process started without one has None there."""
    return sys.stderr is not None and sys.stderr.isatty()


@cache
def error_console() -> Console:
    """The one rich console on standard error, shared so that log lines do not tear a live display."""
    from rich.console import Console

    return Console(stderr=True)

"""A folder that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from slim_core.errors import EnvError
from slim_core.logging import get_logger

__all__ = ["empty_folder", "lock_folder"]

_ATTEMPTS = 10
_logger = get_logger(__name__)


def lock_folder(folder: Path, busy: str, remedy: str) -> int:
    """Create a folder if need be and lock it. Its previous owner may rename it away or remove it just now: then again.

    Args:
        busy, remedy: what to say if another process has it.

    Returns:
        What holds the lock until it is closed.

    Raises:
        EnvError: another process has it, or it disappears again and again.
        OSError: it cannot be made.
    """
    for left in reversed(range(_ATTEMPTS)):
        folder.mkdir(mode=0o750, exist_ok=True)
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            held = False
            try:
                _flock(lock, folder, busy, remedy)
                # Some network file systems never give the same identity twice.
                held = os.path.samestat(os.fstat(lock), os.lstat(folder)) or not left
            finally:
                if not held:
                    os.close(lock)
            if held:
                return lock
    raise EnvError("the folder disappears again and again", where=str(folder))


def _flock(lock: int, folder: Path, busy: str, remedy: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EnvError(busy, where=str(folder), remedy=remedy) from error
    except OSError as error:
        _logger.warning("%s cannot be locked (%s): take care that no other run writes to it", folder, error.strerror)


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder, and follow no symbolic link."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

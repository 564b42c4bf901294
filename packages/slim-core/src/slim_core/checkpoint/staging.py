"""Where output is written before it is finished: a hidden folder beside the target, and a journal in it.

The target appears by rename when everything is written and checked. An existing output survives until then, and a
killed run leaves only the hidden folder, from which ``--resume`` continues.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from slim_core.errors import EnvError, SecurityError, UnsupportedError
from slim_core.logging import get_logger

__all__ = ["Staging", "check_target"]

JOURNAL = "journal.jsonl"
_logger = get_logger(__name__)


def _hidden(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.slim-{suffix}"


def check_target(target: Path, model: Path, overwrite: bool) -> None:
    """Refuse a target that would damage something.

    Raises:
        SecurityError: the target is the model folder, lies inside it or around it, is a file, or is a non-empty folder
            without ``overwrite``.
    """
    real, source = target.resolve(), model.resolve()
    if real == source or source in real.parents or real in source.parents:
        raise SecurityError(
            "save_path and model_path overlap", where=str(target), remedy="choose a folder outside the model"
        )
    if target.exists() and not target.is_dir():
        raise SecurityError("save_path is a file", where=str(target), remedy="choose a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise SecurityError(
            "save_path exists and is not empty",
            where=str(target),
            remedy="choose another folder, or pass --overwrite to replace it once the new output is complete",
        )


class Staging:
    """The folder of a run in progress.

    Args:
        target: the folder that will appear.
        fingerprint: identifies model, recipe, data and version; a resumed run must have the same one.
        resume: continue what an interrupted run left.

    Raises:
        EnvError: the folder cannot be created, or another process is writing to it.
        UnsupportedError: ``resume`` and there is nothing to resume, or it was started with something else.
    """

    def __init__(self, target: Path, fingerprint: str, *, resume: bool = False) -> None:
        self.target = target
        self.folder = _hidden(target, "partial")
        self._old = _hidden(target, "old")
        self._lock: int | None = None
        self._restore_interrupted_swap()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o750, exist_ok=True)
        except OSError as error:
            raise EnvError(f"cannot be created: {error.strerror}", where=str(self.folder)) from error
        self._take_lock()
        self.finished: list[str] = []
        journal = self.folder / JOURNAL
        if resume:
            self.finished = _read_journal(journal, fingerprint)
        else:
            if journal.exists():
                _logger.warning("discarding the interrupted run in %s; --resume would have continued it", self.folder)
            self._empty()
            self._append({"fingerprint": fingerprint})

    def _restore_interrupted_swap(self) -> None:
        if self._old.exists():
            if self.target.exists():
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.target)

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._unlock()
            raise EnvError("another run is writing to this save_path", where=str(self.folder)) from error

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _empty(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _append(self, record: dict[str, object]) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def record(self, unit: str, note: dict[str, object] | None = None) -> None:
        """Note that every tensor of a unit has been handed to the file system."""
        self.finished.append(unit)
        self._append({"unit": unit, **(note or {})})

    def commit(self) -> None:
        """Make the finished folder the target. The journal goes; an output that was there before goes last."""
        (self.folder / JOURNAL).unlink()
        _sync_folder(self.folder)
        if self.target.exists() and any(self.target.iterdir()):
            os.rename(self.target, self._old)
        os.rename(self.folder, self.target)
        _sync_folder(self.target.parent)
        if self._old.exists():
            shutil.rmtree(self._old)
        self._unlock()

    def leave(self) -> bool:
        """Give up for now. Returns whether something worth resuming was left; otherwise the folder is removed."""
        if not self.finished and self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()
        return bool(self.finished)


def _read_journal(journal: Path, fingerprint: str) -> list[str]:
    if not journal.exists():
        raise UnsupportedError(
            "there is no interrupted run to resume", where=str(journal.parent), remedy="run without --resume"
        )
    lines = journal.read_text("utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    if not records or records[0].get("fingerprint") != fingerprint:
        raise UnsupportedError(
            "the interrupted run had another recipe, model, data set or version",
            where=str(journal.parent),
            remedy="run without --resume to start over, or restore what was used then",
        )
    if len(records) != len(lines):
        journal.write_text("".join(lines[: len(records)]), "utf-8")
    return [record["unit"] for record in records[1:]]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

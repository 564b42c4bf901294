"""Where output is written before it is finished: a hidden folder beside the target, and a journal in it.

The target appears by rename when everything is written and checked. An existing output survives until then, and a
killed run leaves only the hidden folder, from which ``--resume`` continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from slim_core.checkpoint.folder_lock import empty_folder, lock_folder
from slim_core.errors import EnvError, SecurityError, UnsupportedError
from slim_core.logging import get_logger

__all__ = ["Staging", "check_target", "partial_folder"]

JOURNAL = "journal.jsonl"
_logger = get_logger(__name__)


def _hidden(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.slim-{suffix}"


def _real(path: Path) -> Path:
    """The path with symbolic links followed, so that output lands where a link points and the link stays."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise SecurityError(
            "the path is a loop of symbolic links", where=str(path), remedy="choose another folder"
        ) from error


def partial_folder(target: Path) -> Path:
    """Where a run that is not finished keeps its output."""
    return _hidden(_real(target), "partial")


def _occupied(path: Path, keeps: Sequence[str] = ()) -> bool:
    if not path.is_dir():
        return path.exists()
    return any(not any(fnmatchcase(entry.name, pattern) for pattern in keeps) for entry in path.iterdir())


def check_target(target: Path, model: Path, overwrite: bool, keeps: Sequence[str] = ()) -> None:
    """Refuse a target that would damage something, or that could not be put in place at the end.

    Args:
        keeps: patterns of files that do not count, because the run takes them over into its output.

    Raises:
        SecurityError: the target is the model folder, lies inside it or around it; is a file or a mount point; is a
            non-empty folder without ``overwrite``; or holds the home or working folder, which are never replaced.
        EnvError: the target cannot be looked at.
    """
    real, source = _real(target), _real(model)
    if real == source or source in real.parents or real in source.parents:
        raise SecurityError(
            "save_path and model_path overlap", where=str(target), remedy="choose a folder outside the model"
        )
    try:
        _check_place(target, real, overwrite, keeps)
    except OSError as error:
        raise EnvError(
            f"cannot be used as save_path: {error.strerror}", where=str(target), remedy="choose another folder"
        ) from error


def _check_place(target: Path, real: Path, overwrite: bool, keeps: Sequence[str]) -> None:
    if real.exists() and not real.is_dir():
        raise SecurityError("save_path is a file", where=str(target), remedy="choose a folder")
    if os.path.ismount(real):
        raise SecurityError(
            "save_path is a mount point, which cannot be replaced by the finished output",
            where=str(target),
            remedy="choose a folder inside it",
        )
    if not (_occupied(real, keeps) or _occupied(_hidden(real, "old"))):
        return
    if not overwrite:
        raise SecurityError(
            "save_path exists and is not empty",
            where=str(target),
            remedy="choose another folder, or pass --overwrite to replace it once the new output is complete",
        )
    for kept in (Path(os.path.expanduser("~")), Path(os.getcwd())):
        if real == kept.resolve() or real in kept.resolve().parents:
            raise SecurityError(
                f"save_path holds {kept} and is never replaced", where=str(target), remedy="choose another folder"
            )


class Staging:
    """The folder of a run in progress.

    Args:
        target: the folder that will appear; symbolic links are followed.
        fingerprint: identifies model, recipe, data and version; a resumed run must have the same one.
        resume: continue what an interrupted run left.

    Raises:
        EnvError: the folder cannot be created, another process is writing to it, or something has appeared at the
            target since the interrupted run began.
        UnsupportedError: ``resume`` and there is nothing to resume, or it was started with something else.
    """

    def __init__(self, target: Path, fingerprint: str, *, resume: bool = False) -> None:
        self.target = _real(target)
        self.folder = _hidden(self.target, "partial")
        self._old = _hidden(self.target, "old")
        self._aside = _hidden(self.target, "journal")
        self._lock: int | None = None
        self.finished: list[str] = []
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(
                self.folder,
                "another run is writing to this save_path",
                "wait until it has ended, or choose another save_path",
            )
            self._restore_interrupted_swap()
            if resume:
                self._resume(fingerprint)
            else:
                self._start(fingerprint)
        except BaseException as error:
            if self._lock is not None:
                with suppress(OSError):
                    self.folder.rmdir()  # only if it is empty
            self._unlock()
            if isinstance(error, OSError):
                raise EnvError(
                    f"save_path cannot be prepared: {error.strerror}",
                    where=str(error.filename or self.folder),
                    remedy="choose another folder, or remove the cause",
                ) from error
            raise

    @classmethod
    def joined(cls, target: Path, finished: Sequence[str]) -> Staging:
        """The folder that another process of the same run has prepared and keeps the journal of; only to be written to.

        Args:
            finished: the units that an interrupted run has written.
        """
        staging = cls.__new__(cls)
        staging.target = _real(target)
        staging.folder = _hidden(staging.target, "partial")
        staging.finished = list(finished)
        staging._lock = None
        return staging

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _restore_interrupted_swap(self) -> None:
        """Tidy up after a run that was killed inside :meth:`commit`."""
        unfinished = any(self.folder.iterdir())
        if self._old.exists():
            if not _occupied(self.target):
                os.rename(self._old, self.target)
            elif unfinished and self._aside.exists():
                raise EnvError(
                    f"something has appeared at save_path while its previous content was in {self._old}",
                    where=str(self.target),
                    remedy="move one of the two away",
                )
            else:
                shutil.rmtree(self._old)
        if self._aside.exists():
            if unfinished:
                os.replace(self._aside, self.folder / JOURNAL)
            else:
                self._aside.unlink()

    def _start(self, fingerprint: str) -> None:
        if (self.folder / JOURNAL).exists():
            _logger.warning("discarding the interrupted run in %s; --resume would have continued it", self.folder)
        empty_folder(self.folder)
        self._replaces = _occupied(self.target)
        self._append({"fingerprint": fingerprint, "replaces": self._replaces})

    def _resume(self, fingerprint: str) -> None:
        records = _read_journal(self.folder / JOURNAL)
        if not records:
            raise UnsupportedError(
                "there is no interrupted run to resume", where=str(self.folder), remedy="run without --resume"
            )
        if records[0].get("fingerprint") != fingerprint:
            raise UnsupportedError(
                "the interrupted run had another recipe, model, data set or version",
                where=str(self.folder),
                remedy="run without --resume to start over, or restore what was used then",
            )
        self._replaces = bool(records[0].get("replaces"))
        self._check_intruder()
        self.finished = [record["unit"] for record in records[1:]]

    def _append(self, record: dict[str, object]) -> None:
        with (self.folder / JOURNAL).open("ab", buffering=0) as stream:
            stream.write(json.dumps(record).encode() + b"\n")

    def record(self, unit: str, note: dict[str, object] | None = None) -> None:
        """Note that every tensor of a unit has been handed to the file system."""
        self._append({"unit": unit, **(note or {})})
        self.finished.append(unit)

    def _check_intruder(self) -> None:
        if not self._replaces and _occupied(self.target):
            raise EnvError(
                "something has appeared at save_path since the run began",
                where=str(self.target),
                remedy="move it away, then run again with --resume",
            )

    def commit(self) -> None:
        """Make the finished folder the target. An output that was there before goes last.

        The journal stays within reach until the target is in place, so that no finished work is lost on the way.

        Raises:
            EnvError: something has appeared at the target meanwhile, or a rename is refused; all is as it was before.
        """
        journal = self.folder / JOURNAL
        self._check_intruder()
        try:
            _sync_files(self.folder)
            os.replace(journal, self._aside)
            try:
                self._swap()
            except OSError:
                os.replace(self._aside, journal)
                raise
        except OSError as error:
            raise EnvError(
                f"the finished output cannot be put in place: {error.strerror}",
                where=str(self.target),
                remedy="remove the cause, then run again with --resume",
            ) from error
        with suppress(OSError):
            _sync(self.target.parent)
            self._aside.unlink()
        shutil.rmtree(self._old, ignore_errors=True)
        if self._old.exists():
            _logger.warning("the previous output could not be removed: %s", self._old)
        self._unlock()

    def _swap(self) -> None:
        moved = _occupied(self.target)
        if moved:
            os.rename(self.target, self._old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if moved:
                os.rename(self._old, self.target)
            raise

    def leave(self, *, keep: bool = False) -> bool:
        """Give up for now. Returns whether something worth resuming was left; otherwise the folder is removed.

        Args:
            keep: something was, though no unit is finished.
        """
        keep = keep or bool(self.finished)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()
        return keep


def _read_journal(journal: Path) -> list[dict[str, Any]]:
    """The records up to the first one that is damaged; the rest is cut off, its units will be written again."""
    try:
        content = journal.read_bytes()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    length = 0
    for line in content.splitlines(keepends=True):
        record = _parse_record(line, "unit" if records else "fingerprint")
        if record is None:
            os.truncate(journal, length)
            break
        records.append(record)
        length += len(line)
    return records


def _parse_record(line: bytes, key: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        record: Any = json.loads(line)
        if line.endswith(b"\n") and isinstance(record, dict):
            record = cast("dict[str, Any]", record)
            return record if isinstance(record.get(key), str) else None
    return None


def _sync_files(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

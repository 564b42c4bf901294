"""Staging: failures and crashes around the commit lose neither what was there nor what is new."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slim_core.checkpoint import staging as module
from slim_core.checkpoint.staging import JOURNAL, Staging, check_target
from slim_core.errors import EnvError, SecurityError, UnsupportedError

pytestmark = pytest.mark.usefixtures("logs_propagate")


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it on the way."""


def nth_call(monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: BaseException) -> None:
    real = getattr(os, name)
    calls: list[int] = []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("rename", [1, 2])
def test_a_refused_rename_changes_nothing(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    runs.fill(target)
    staging = runs.begin(target)
    nth_call(monkeypatch, "rename", rename, OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(EnvError, match=r"the finished output cannot be put in place: Permission denied.*--resume"):
        staging.commit()
    monkeypatch.undo()
    assert runs.content(target) == runs.OLD
    assert runs.listing(target.parent) == [".out.slim-partial", "out"]
    assert staging.leave()
    runs.begin(target, resume=True).commit()
    assert runs.content(target) == runs.NEW


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("call", "number"), [("replace", 1), ("rename", 1), ("rename", 2), ("fsync", 1), ("fsync", 4), ("fsync", 5)]
)
def test_a_crash_inside_the_commit_loses_neither_old_nor_new(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, full: bool
) -> None:
    if full:
        runs.fill(target)
    staging = runs.begin(target)
    nth_call(monkeypatch, call, number, Crash())
    if (call, number, full) == ("rename", 2, False):
        staging.commit()  # only one rename was needed
        assert runs.content(target) == runs.NEW
        return
    with pytest.raises(Crash):
        staging.commit()
    monkeypatch.undo()
    runs.die(staging)
    swapped = (call, number) == ("fsync", 5)
    if swapped:
        with pytest.raises(UnsupportedError, match="no interrupted run"):
            Staging(target, "f", resume=True)
    else:
        again = Staging(target, "f", resume=True)
        assert again.finished == ["unit 0", "unit 1"]
        assert (runs.content(target) if full else target.exists()) == (runs.OLD if full else False)
        again.commit()
    assert runs.content(target) == runs.NEW
    assert runs.listing(target.parent) == ["out"]


def test_starting_over_after_a_crash_between_the_renames(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.fill(target)
    model = runs.fill(target.parent / "model")
    staging = runs.begin(target)
    nth_call(monkeypatch, "rename", 2, Crash())
    with pytest.raises(Crash):
        staging.commit()
    monkeypatch.undo()
    runs.die(staging)
    assert runs.listing(target.parent) == [".out.slim-journal", ".out.slim-old", ".out.slim-partial", "model"]
    with pytest.raises(SecurityError, match=r"not empty.*--overwrite"):
        check_target(target, model, overwrite=False)
    target.mkdir()  # an empty folder in its place, as job scripts make it, must not cost the old output
    assert Staging(target, "g").leave() is False
    assert runs.content(target) == runs.OLD
    assert runs.listing(target.parent) == ["model", "out"]


def test_something_new_at_the_target_after_a_crash_between_the_renames(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.fill(target)
    staging = runs.begin(target)
    nth_call(monkeypatch, "rename", 2, Crash())
    with pytest.raises(Crash):
        staging.commit()
    monkeypatch.undo()
    runs.die(staging)
    (target / "deep").mkdir(parents=True)
    for resume in (False, True, False):
        with pytest.raises(EnvError, match="something has appeared at save_path while its previous content was in"):
            Staging(target, "f", resume=resume)
    assert runs.content(runs.hidden(target, "old")) == runs.OLD
    shutil.rmtree(target)
    assert Staging(target, "f", resume=True).finished == ["unit 0", "unit 1"]
    assert runs.content(target) == runs.OLD


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_that_appears_during_the_run_survives(runs: Any, target: Path, kind: str) -> None:
    staging = runs.begin(target)
    if kind == "folder":
        runs.fill(target)
    else:
        target.write_text("mine")
    with pytest.raises(EnvError, match="something has appeared at save_path since the run began"):
        staging.commit()
    assert staging.leave()
    with pytest.raises(EnvError, match="something has appeared"):
        Staging(target, "f", resume=True)
    moved = target.rename(target.parent / "mine")
    runs.begin(target, resume=True).commit()
    assert runs.content(target) == runs.NEW
    assert moved.exists()


def test_an_old_output_that_cannot_be_removed_is_no_failure(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs.fill(target)
    staging = runs.begin(target)
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_args, **_options: None)
    staging.commit()
    monkeypatch.undo()
    assert f"the previous output could not be removed: {runs.hidden(target, 'old')}" in caplog.text
    assert runs.content(target) == runs.NEW
    Staging(target, "g").leave()
    assert runs.listing(target.parent) == ["out"]


def test_trouble_after_the_swap_is_no_failure(runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = runs.begin(target)
    nth_call(monkeypatch, "fsync", 5, OSError(errno.EIO, "Input/output error"))
    staging.commit()
    assert runs.content(target) == runs.NEW


def test_everything_is_forced_to_disk_before_it_appears(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = runs.begin(target)
    (staging.folder / "deep").mkdir()
    (staging.folder / "deep" / "file").write_text("x")
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        assert (runs.hidden(target, "partial").exists()) is (synced[-1] != "place")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    staging.commit()
    assert sorted(synced[:-2]) == ["0.bin", "1.bin", "deep", "file", JOURNAL]
    assert synced[-2:] == [".out.slim-partial", "place"]

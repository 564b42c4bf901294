"""Staging: output appears only when it is complete, nothing that was there is lost, and a killed run continues."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.checkpoint import staging as module
from slim_core.checkpoint.staging import JOURNAL, Staging, check_target
from slim_core.errors import EnvError, SecurityError, UnsupportedError


@pytest.fixture(autouse=True)
def _logs_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("slim"), "propagate", True)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


def hidden(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.slim-{suffix}"


def begin(target: Path, units: int = 2, fingerprint: str = "f", **options: bool) -> Staging:
    staging = Staging(target, fingerprint, **options)
    for number in range(len(staging.finished), units):
        (staging.folder / f"{number}.bin").write_text(f"new {number}")
        staging.record(f"unit {number}", {"seconds": 1.5})
    return staging


def die(staging: Staging) -> None:
    """What the end of the process does: locks go, files stay."""
    staging._unlock()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OLD = {"old.bin": "old"}


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old.bin").write_text("old")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


NEW = {"0.bin": "new 0", "1.bin": "new 1"}


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
def test_the_target_appears_at_commit_and_not_before(target: Path, before: str) -> None:
    if before == "empty":
        target.mkdir(parents=True)
    if before == "full":
        fill(target)
    staging = begin(target)
    assert staging.folder == hidden(target, "partial")
    assert staging.finished == ["unit 0", "unit 1"]
    assert (content(target) if target.exists() else {}) == (OLD if before == "full" else {})
    staging.commit()
    assert content(target) == NEW
    assert listing(target.parent) == ["out"]
    assert not Staging(target, "f").leave()


def test_a_new_folder_is_for_owner_and_group(target: Path) -> None:
    before = os.umask(0)
    try:
        begin(target).commit()
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o7777 == 0o750


def test_a_failure_leaves_what_was_there(target: Path) -> None:
    fill(target)
    staging = begin(target, 1)
    assert staging.leave()
    assert content(target) == OLD
    assert listing(staging.folder) == ["0.bin", JOURNAL]


def test_a_run_that_finished_nothing_leaves_nothing(target: Path) -> None:
    staging = begin(target, 0)
    (staging.folder / "shard").write_text("x")
    assert not staging.leave()
    assert listing(target.parent) == []
    assert not staging.leave()


@pytest.mark.parametrize("full", [False, True])
def test_resuming_continues(target: Path, full: bool) -> None:
    if full:
        fill(target)
    die(begin(target, 1))
    staging = begin(target, 2, resume=True)
    assert staging.finished == ["unit 0", "unit 1"]
    staging.commit()
    assert content(target) == NEW
    assert listing(target.parent) == ["out"]


def test_starting_over_discards_and_says_so(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    staging = begin(target, 1)
    (staging.folder / "deep" / "er").mkdir(parents=True)
    (staging.folder / "link").symlink_to(fill(target.parent / "precious"))
    die(staging)
    again = Staging(target, "g")
    assert "discarding the interrupted run" in caplog.text
    assert listing(again.folder) == [JOURNAL]
    assert content(target.parent / "precious") == OLD
    assert again.leave() is False


def test_resuming_needs_something_to_resume(target: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no interrupted run to resume \(run without --resume\)"):
        Staging(target, "f", resume=True)
    assert listing(target.parent) == []
    begin(target).commit()
    with pytest.raises(UnsupportedError, match="no interrupted run"):
        Staging(target, "f", resume=True)
    assert content(target) == NEW
    assert listing(target.parent) == ["out"]


def test_resuming_needs_the_same_run(target: Path) -> None:
    die(begin(target, 1))
    for _ in range(2):  # the refusal must not keep the lock
        with pytest.raises(UnsupportedError, match="another recipe, model, data set or version"):
            Staging(target, "other", resume=True)
    assert Staging(target, "f", resume=True).finished == ["unit 0"]


LINES = [json.dumps(line).encode() + b"\n" for line in ({"fingerprint": "f"}, {"unit": "a"}, {"unit": "b"})]
TORN: list[tuple[bytes, list[str]]] = [
    (b"".join(LINES), ["a", "b"]),
    (b"".join(LINES)[:-1], ["a"]),
    (b"".join(LINES) + b'{"unit": "c', ["a", "b"]),
    (b"".join(LINES) + b'{"unit": "c"}', ["a", "b"]),
    (b"".join(LINES) + b"\0\0\0\0\n", ["a", "b"]),
    (b"".join(LINES) + b"\xff\xfe", ["a", "b"]),
    (b"".join(LINES) + b"[]\n", ["a", "b"]),
    (b"".join(LINES) + b'{"unit": 3}\n', ["a", "b"]),
    (b"".join(LINES[:2]) + b'{"unit": "b{"unit": "c"}\n' + LINES[2], ["a"]),
    (LINES[0], []),
]


@pytest.mark.parametrize(("journal", "finished"), TORN)
def test_a_torn_journal_counts_up_to_the_tear(target: Path, journal: bytes, finished: list[str]) -> None:
    die(begin(target, 0))
    (hidden(target, "partial") / JOURNAL).write_bytes(journal)
    staging = Staging(target, "f", resume=True)
    assert staging.finished == finished
    staging.record("next")
    die(staging)
    assert Staging(target, "f", resume=True).finished == [*finished, "next"]


@pytest.mark.parametrize("journal", [b"", b"{", b'{"fingerprint": "f"}', b"\0" * 20, b'{"unit": "a"}\n'])
def test_a_journal_without_a_beginning(target: Path, journal: bytes) -> None:
    die(begin(target, 0))
    (hidden(target, "partial") / JOURNAL).write_bytes(journal)
    with pytest.raises(UnsupportedError, match="no interrupted run to resume"):
        Staging(target, "f", resume=True)


@pytest.mark.parametrize("name", ["\u2028", "ü\n", "\ud800", 'a"b'])
def test_unit_names_of_any_kind_survive(target: Path, name: str) -> None:
    staging = begin(target, 0)
    staging.record(name)
    die(staging)
    assert Staging(target, "f", resume=True).finished == [name]


def test_a_unit_counts_only_once_it_is_noted(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = begin(target, 0)
    monkeypatch.setattr(staging, "_append", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        staging.record("unit 0")
    assert staging.finished == []
    assert staging.leave() is False


# Two runs at once


def test_one_run_at_a_time(target: Path) -> None:
    staging = begin(target, 1)
    for options in ({}, {"resume": True}):
        with pytest.raises(EnvError, match="another run is writing to this save_path"):
            Staging(target, "f", **options)
    assert listing(staging.folder) == ["0.bin", JOURNAL]
    staging.leave()
    assert Staging(target, "f", resume=True).finished == ["unit 0"]


HOLD = """
import sys
from pathlib import Path
from slim_core.checkpoint.staging import Staging
Staging(Path(sys.argv[1]), "f").record("unit 0")
print("ready", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(target: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(EnvError, match="another run is writing"):
            Staging(target, "f")
        other.kill()
    assert Staging(target, "f", resume=True).finished == ["unit 0"]


def test_a_folder_that_is_renamed_away_between_opening_and_locking(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run commits just then: its folder is the target now and must not be taken for ours."""
    other = begin(target)
    real = fcntl.flock
    calls: list[int] = []

    def flock(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            other.commit()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    staging = Staging(target, "f")
    assert len(calls) == 2
    assert content(target) == NEW
    assert listing(staging.folder) == [JOURNAL]
    staging.leave()
    assert content(target) == NEW


def test_a_file_system_without_lasting_identities(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda _left, _right: False)
    before = len(os.listdir("/proc/self/fd"))
    begin(target).commit()
    assert content(target) == NEW
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_disappears_again_and_again(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", refuse(errno.ENOENT))
    with pytest.raises(EnvError, match="disappears again and again"):
        Staging(target, "f")


def test_a_file_system_without_locks(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    begin(target).commit()
    assert "cannot be locked (Function not implemented)" in caplog.text
    assert content(target) == NEW


# Failures and crashes around the commit


def refuse(number: int) -> Callable[..., Any]:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


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
def test_a_refused_rename_changes_nothing(target: Path, monkeypatch: pytest.MonkeyPatch, rename: int) -> None:
    fill(target)
    staging = begin(target)
    nth_call(monkeypatch, "rename", rename, OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(EnvError, match=r"the finished output cannot be put in place: Permission denied.*--resume"):
        staging.commit()
    monkeypatch.undo()
    assert content(target) == OLD
    assert listing(target.parent) == [".out.slim-partial", "out"]
    assert staging.leave()
    begin(target, resume=True).commit()
    assert content(target) == NEW


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("call", "number"), [("replace", 1), ("rename", 1), ("rename", 2), ("fsync", 1), ("fsync", 4), ("fsync", 5)]
)
def test_a_crash_inside_the_commit_loses_neither_old_nor_new(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, full: bool
) -> None:
    if full:
        fill(target)
    staging = begin(target)
    nth_call(monkeypatch, call, number, Crash())
    if (call, number, full) == ("rename", 2, False):
        staging.commit()  # only one rename was needed
        assert content(target) == NEW
        return
    with pytest.raises(Crash):
        staging.commit()
    monkeypatch.undo()
    die(staging)
    swapped = (call, number) == ("fsync", 5)
    if swapped:
        with pytest.raises(UnsupportedError, match="no interrupted run"):
            Staging(target, "f", resume=True)
    else:
        again = Staging(target, "f", resume=True)
        assert again.finished == ["unit 0", "unit 1"]
        assert (content(target) if full else target.exists()) == (OLD if full else False)
        again.commit()
    assert content(target) == NEW
    assert listing(target.parent) == ["out"]


def test_starting_over_after_a_crash_between_the_renames(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(target)
    model = fill(target.parent / "model")
    staging = begin(target)
    nth_call(monkeypatch, "rename", 2, Crash())
    with pytest.raises(Crash):
        staging.commit()
    monkeypatch.undo()
    die(staging)
    assert listing(target.parent) == [".out.slim-journal", ".out.slim-old", ".out.slim-partial", "model"]
    with pytest.raises(SecurityError, match=r"not empty.*--overwrite"):
        check_target(target, model, overwrite=False)
    target.mkdir()  # an empty folder in its place, as job scripts make it, must not cost the old output
    assert Staging(target, "g").leave() is False
    assert content(target) == OLD
    assert listing(target.parent) == ["model", "out"]


def test_something_new_at_the_target_after_a_crash_between_the_renames(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(target)
    staging = begin(target)
    nth_call(monkeypatch, "rename", 2, Crash())
    with pytest.raises(Crash):
        staging.commit()
    monkeypatch.undo()
    die(staging)
    (target / "deep").mkdir(parents=True)
    for resume in (False, True, False):
        with pytest.raises(EnvError, match="something has appeared at save_path while its previous content was in"):
            Staging(target, "f", resume=resume)
    assert content(hidden(target, "old")) == OLD
    shutil.rmtree(target)
    assert Staging(target, "f", resume=True).finished == ["unit 0", "unit 1"]
    assert content(target) == OLD


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_that_appears_during_the_run_survives(target: Path, kind: str) -> None:
    staging = begin(target)
    if kind == "folder":
        fill(target)
    else:
        target.write_text("mine")
    with pytest.raises(EnvError, match="something has appeared at save_path since the run began"):
        staging.commit()
    assert staging.leave()
    with pytest.raises(EnvError, match="something has appeared"):
        Staging(target, "f", resume=True)
    moved = target.rename(target.parent / "mine")
    begin(target, resume=True).commit()
    assert content(target) == NEW
    assert moved.exists()


def test_an_old_output_that_cannot_be_removed_is_no_failure(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(target)
    staging = begin(target)
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_args, **_options: None)
    staging.commit()
    monkeypatch.undo()
    assert f"the previous output could not be removed: {hidden(target, 'old')}" in caplog.text
    assert content(target) == NEW
    Staging(target, "g").leave()
    assert listing(target.parent) == ["out"]


def test_trouble_after_the_swap_is_no_failure(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = begin(target)
    nth_call(monkeypatch, "fsync", 5, OSError(errno.EIO, "Input/output error"))
    staging.commit()
    assert content(target) == NEW


def test_everything_is_forced_to_disk_before_it_appears(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = begin(target)
    (staging.folder / "deep").mkdir()
    (staging.folder / "deep" / "file").write_text("x")
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        assert (hidden(target, "partial").exists()) is (synced[-1] != "place")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    staging.commit()
    assert sorted(synced[:-2]) == ["0.bin", "1.bin", "deep", "file", JOURNAL]
    assert synced[-2:] == [".out.slim-partial", "place"]


# Places


def test_a_link_stays_and_what_it_points_to_is_replaced(target: Path) -> None:
    real = fill(target.parent / "disk" / "real")
    target.symlink_to(real)
    staging = begin(target)
    assert staging.folder == hidden(real, "partial")
    staging.commit()
    assert target.is_symlink()
    assert content(real) == NEW
    assert listing(real.parent) == ["real"]


def test_a_link_to_nowhere_names_the_new_place(target: Path) -> None:
    target.parent.mkdir()
    target.symlink_to("later/real")
    begin(target).commit()
    assert content(target.parent / "later" / "real") == NEW


def test_relative_targets(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = target.parent / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for text, where in (("out", inner / "out"), ("../up", target.parent / "up"), ("x/../y", inner / "y")):
        staging = begin(Path(text))
        monkeypatch.chdir("/")
        staging.commit()
        monkeypatch.chdir(inner)
        assert content(where) == NEW
    assert listing(inner) == ["out", "y"]


def make_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


OBSTACLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent is a file": (lambda t: make_file(t.parent), "File exists"),
    "grandparent is a file": (lambda t: make_file(t.parent.parent / "place"), "File exists"),
    "staging folder is a file": (lambda t: make_file(hidden(t, "partial")), "File exists"),
    "staging folder is a link": (
        lambda t: fill(t.parent / "precious") and hidden(t, "partial").symlink_to("precious"),
        "Not a directory|symbolic links",
    ),
}


@pytest.mark.parametrize(("obstacle", "message"), OBSTACLES.values(), ids=OBSTACLES)
def test_a_folder_that_cannot_be_made(target: Path, obstacle: Callable[[Path], Any], message: str) -> None:
    obstacle(target)
    with pytest.raises(EnvError, match=f"save_path cannot be prepared: ({message})"):
        Staging(target, "f")
    if (target.parent / "precious").exists():
        assert content(target.parent / "precious") == OLD


def test_a_folder_that_cannot_be_written(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    with pytest.raises(EnvError, match="save_path cannot be prepared: Read-only file system"):
        Staging(target, "f")
    monkeypatch.undo()
    monkeypatch.setattr(Staging, "_append", refuse(errno.ENOSPC))
    with pytest.raises(EnvError, match="No space left on device"):
        Staging(target, "f")
    assert listing(target.parent) == []
    monkeypatch.undo()
    assert Staging(target, "f").finished == []


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="File name too long"):
        Staging(tmp_path / ("x" * 250), "f")

"""Staging: output appears only when it is complete, and a killed run continues."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.checkpoint.staging import JOURNAL, Staging
from slim_core.errors import EnvError, UnsupportedError

pytestmark = pytest.mark.usefixtures("logs_propagate")


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
def test_the_target_appears_at_commit_and_not_before(runs: Any, target: Path, before: str) -> None:
    if before == "empty":
        target.mkdir(parents=True)
    if before == "full":
        runs.fill(target)
    staging = runs.begin(target)
    assert staging.folder == runs.hidden(target, "partial")
    assert staging.finished == ["unit 0", "unit 1"]
    assert (runs.content(target) if target.exists() else {}) == (runs.OLD if before == "full" else {})
    staging.commit()
    assert runs.content(target) == runs.NEW
    assert runs.listing(target.parent) == ["out"]
    assert not Staging(target, "f").leave()


def test_a_new_folder_is_for_owner_and_group(runs: Any, target: Path) -> None:
    before = os.umask(0)
    try:
        runs.begin(target).commit()
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o7777 == 0o750


def test_a_failure_leaves_what_was_there(runs: Any, target: Path) -> None:
    runs.fill(target)
    staging = runs.begin(target, 1)
    assert staging.leave()
    assert runs.content(target) == runs.OLD
    assert runs.listing(staging.folder) == ["0.bin", JOURNAL]


def test_a_run_that_finished_nothing_leaves_nothing(runs: Any, target: Path) -> None:
    staging = runs.begin(target, 0)
    (staging.folder / "shard").write_text("x")
    assert not staging.leave()
    assert runs.listing(target.parent) == []
    assert not staging.leave()


@pytest.mark.parametrize("full", [False, True])
def test_resuming_continues(runs: Any, target: Path, full: bool) -> None:
    if full:
        runs.fill(target)
    runs.die(runs.begin(target, 1))
    staging = runs.begin(target, 2, resume=True)
    assert staging.finished == ["unit 0", "unit 1"]
    staging.commit()
    assert runs.content(target) == runs.NEW
    assert runs.listing(target.parent) == ["out"]


def test_starting_over_discards_and_says_so(runs: Any, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    staging = runs.begin(target, 1)
    (staging.folder / "deep" / "er").mkdir(parents=True)
    (staging.folder / "link").symlink_to(runs.fill(target.parent / "precious"))
    runs.die(staging)
    again = Staging(target, "g")
    assert "discarding the interrupted run" in caplog.text
    assert runs.listing(again.folder) == [JOURNAL]
    assert runs.content(target.parent / "precious") == runs.OLD
    assert again.leave() is False


def test_resuming_needs_something_to_resume(runs: Any, target: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no interrupted run to resume \(run without --resume\)"):
        Staging(target, "f", resume=True)
    assert runs.listing(target.parent) == []
    runs.begin(target).commit()
    with pytest.raises(UnsupportedError, match="no interrupted run"):
        Staging(target, "f", resume=True)
    assert runs.content(target) == runs.NEW
    assert runs.listing(target.parent) == ["out"]


def test_resuming_needs_the_same_run(runs: Any, target: Path) -> None:
    runs.die(runs.begin(target, 1))
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
def test_a_torn_journal_counts_up_to_the_tear(runs: Any, target: Path, journal: bytes, finished: list[str]) -> None:
    runs.die(runs.begin(target, 0))
    (runs.hidden(target, "partial") / JOURNAL).write_bytes(journal)
    staging = Staging(target, "f", resume=True)
    assert staging.finished == finished
    staging.record("next")
    runs.die(staging)
    assert Staging(target, "f", resume=True).finished == [*finished, "next"]


@pytest.mark.parametrize("journal", [b"", b"{", b'{"fingerprint": "f"}', b"\0" * 20, b'{"unit": "a"}\n'])
def test_a_journal_without_a_beginning(runs: Any, target: Path, journal: bytes) -> None:
    runs.die(runs.begin(target, 0))
    (runs.hidden(target, "partial") / JOURNAL).write_bytes(journal)
    with pytest.raises(UnsupportedError, match="no interrupted run to resume"):
        Staging(target, "f", resume=True)


@pytest.mark.parametrize("name", ["\u2028", "ü\n", "\ud800", 'a"b'])
def test_unit_names_of_any_kind_survive(runs: Any, target: Path, name: str) -> None:
    staging = runs.begin(target, 0)
    staging.record(name)
    runs.die(staging)
    assert Staging(target, "f", resume=True).finished == [name]


def test_a_unit_counts_only_once_it_is_noted(runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = runs.begin(target, 0)
    monkeypatch.setattr(staging, "_append", runs.refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        staging.record("unit 0")
    assert staging.finished == []
    assert staging.leave() is False


def test_a_link_stays_and_what_it_points_to_is_replaced(runs: Any, target: Path) -> None:
    real = runs.fill(target.parent / "disk" / "real")
    target.symlink_to(real)
    staging = runs.begin(target)
    assert staging.folder == runs.hidden(real, "partial")
    staging.commit()
    assert target.is_symlink()
    assert runs.content(real) == runs.NEW
    assert runs.listing(real.parent) == ["real"]


def test_a_link_to_nowhere_names_the_new_place(runs: Any, target: Path) -> None:
    target.parent.mkdir()
    target.symlink_to("later/real")
    runs.begin(target).commit()
    assert runs.content(target.parent / "later" / "real") == runs.NEW


def test_relative_targets(runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = target.parent / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for text, where in (("out", inner / "out"), ("../up", target.parent / "up"), ("x/../y", inner / "y")):
        staging = runs.begin(Path(text))
        monkeypatch.chdir("/")
        staging.commit()
        monkeypatch.chdir(inner)
        assert runs.content(where) == runs.NEW
    assert runs.listing(inner) == ["out", "y"]


def make_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


OBSTACLES: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "parent is a file": (lambda runs, t: make_file(t.parent), "File exists"),
    "grandparent is a file": (lambda runs, t: make_file(t.parent.parent / "place"), "File exists"),
    "staging folder is a file": (lambda runs, t: make_file(runs.hidden(t, "partial")), "File exists"),
    "staging folder is a link": (
        lambda runs, t: runs.fill(t.parent / "precious") and runs.hidden(t, "partial").symlink_to("precious"),
        "Not a directory|symbolic links",
    ),
}


@pytest.mark.parametrize(("obstacle", "message"), OBSTACLES.values(), ids=OBSTACLES)
def test_a_folder_that_cannot_be_made(
    runs: Any, target: Path, obstacle: Callable[[Any, Path], Any], message: str
) -> None:
    obstacle(runs, target)
    with pytest.raises(EnvError, match=f"save_path cannot be prepared: ({message})"):
        Staging(target, "f")
    if (target.parent / "precious").exists():
        assert runs.content(target.parent / "precious") == runs.OLD


def test_a_folder_that_cannot_be_written(runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", runs.refuse(errno.EROFS))
    with pytest.raises(EnvError, match="save_path cannot be prepared: Read-only file system"):
        Staging(target, "f")
    monkeypatch.undo()
    monkeypatch.setattr(Staging, "_append", runs.refuse(errno.ENOSPC))
    with pytest.raises(EnvError, match="No space left on device"):
        Staging(target, "f")
    assert runs.listing(target.parent) == []
    monkeypatch.undo()
    assert Staging(target, "f").finished == []


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="File name too long"):
        Staging(tmp_path / ("x" * 250), "f")

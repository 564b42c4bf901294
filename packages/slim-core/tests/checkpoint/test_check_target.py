"""Which targets are refused before any work is done: what overlaps the model, what is taken, what is never replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from slim_core.checkpoint import staging as module
from slim_core.checkpoint.staging import check_target
from slim_core.errors import EnvError, SecurityError


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old.bin").write_text("old")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fill(tmp_path / "models" / "qwen")


OVERLAPS: dict[str, Callable[[Path], Path]] = {
    "the model": lambda m: m,
    "inside": lambda m: m / "out",
    "deep inside": lambda m: m / "a" / "b" / "out",
    "around": lambda m: m.parent,
    "far around": lambda m: m.parent.parent,
    "the root": lambda _m: Path("/"),
    "by a detour": lambda m: m.parent / "x" / ".." / "qwen",
    "a link to the model": lambda m: link(m.parent / "link", m),
    "inside a link to the model": lambda m: link(m.parent / "link", m) / "out",
    "a link to a place inside": lambda m: link(m.parent / "link", m / "out"),
}


def link(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", OVERLAPS.values(), ids=OVERLAPS)
def test_targets_that_overlap_the_model(model: Path, place: Callable[[Path], Path], overwrite: bool) -> None:
    with pytest.raises(SecurityError, match=r"save_path and model_path overlap \(choose a folder outside"):
        check_target(place(model), model, overwrite)


def test_a_model_behind_a_link(model: Path, tmp_path: Path) -> None:
    through = link(tmp_path / "link", model)
    for target in (model / "out", model):
        with pytest.raises(SecurityError, match="overlap"):
            check_target(target, through, overwrite=True)
    check_target(tmp_path / "links", through, overwrite=False)
    check_target(model.parent / "qwen-w8a8", model, overwrite=False)


def test_targets_that_are_taken(model: Path, tmp_path: Path) -> None:
    for overwrite in (False, True):
        (tmp_path / "file").touch()
        with pytest.raises(SecurityError, match="save_path is a file"):
            check_target(tmp_path / "file", model, overwrite)
        loop = tmp_path / "loop"
        loop.unlink(missing_ok=True)
        with pytest.raises(SecurityError, match="loop of symbolic links"):
            check_target(link(loop, loop), model, overwrite)
    full = fill(tmp_path / "full")
    for path in (full, link(tmp_path / "to-full", full)):
        with pytest.raises(
            SecurityError, match=r"exists and is not empty \(choose another folder, or pass --overwrite"
        ):
            check_target(path, model, overwrite=False)
        check_target(path, model, overwrite=True)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", model, overwrite=False)
    check_target(tmp_path / "absent" / "deep", model, overwrite=False)
    assert [(path.name, path.read_text()) for path in full.iterdir()] == [("old.bin", "old")]


def test_home_and_working_folder_are_never_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = fill(tmp_path / "users" / "me"), fill(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for target in (home, home.parent, work, work.parent, Path(), Path("..")):
        with pytest.raises(SecurityError, match="is never replaced"):
            check_target(target, model, overwrite=True)
    check_target(fill(work / "out"), model, overwrite=True)
    check_target(fill(home / "out"), model, overwrite=True)


def test_a_mount_point_is_refused_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(SecurityError, match=r"is a mount point.*\(choose a folder inside it\)"):
        check_target(tmp_path / "volume", model, overwrite=True)
    check_target(tmp_path / "volume" / "out", model, overwrite=False)


def test_a_target_that_cannot_be_looked_at(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module, "_occupied", refuse)
    with pytest.raises(EnvError, match="cannot be used as save_path: Permission denied"):
        check_target(tmp_path / "x", model, overwrite=False)

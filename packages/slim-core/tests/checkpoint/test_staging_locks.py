"""Staging: one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slim_core.checkpoint.staging import JOURNAL, Staging
from slim_core.errors import EnvError

pytestmark = pytest.mark.usefixtures("logs_propagate")


def test_one_run_at_a_time(runs: Any, target: Path) -> None:
    staging = runs.begin(target, 1)
    for options in ({}, {"resume": True}):
        with pytest.raises(EnvError, match="another run is writing to this save_path"):
            Staging(target, "f", **options)
    assert runs.listing(staging.folder) == ["0.bin", JOURNAL]
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
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run commits just then: its folder is the target now and must not be taken for ours."""
    other = runs.begin(target)
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
    assert runs.content(target) == runs.NEW
    assert runs.listing(staging.folder) == [JOURNAL]
    staging.leave()
    assert runs.content(target) == runs.NEW


def test_a_file_system_without_lasting_identities(runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda _left, _right: False)
    before = len(os.listdir("/proc/self/fd"))
    runs.begin(target).commit()
    assert runs.content(target) == runs.NEW
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_disappears_again_and_again(runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", runs.refuse(errno.ENOENT))
    with pytest.raises(EnvError, match="disappears again and again"):
        Staging(target, "f")


def test_a_file_system_without_locks(
    runs: Any, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", runs.refuse(errno.ENOSYS))
    runs.begin(target).commit()
    assert "cannot be locked (Function not implemented)" in caplog.text
    assert runs.content(target) == runs.NEW

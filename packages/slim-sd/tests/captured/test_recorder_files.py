"""What lies in the files of a recorder that fails, is killed, or writes more than memory holds."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import EnvError, InvalidDatasetError, SecurityError, SlimError
from slim_sd.captured import files as record_files
from slim_sd.captured.recorder import forward_parameters
from slim_sd.captured.records import open_records, sidecar_file


def test_an_error_of_the_pipeline_leaves_what_was_there(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    recording.capture(path, {"hidden_states": torch.zeros(1)})
    before = path.read_bytes(), sidecar_file(path).read_bytes()
    with pytest.raises(AttributeError, match="add_"):
        recording.capture(path, {"hidden_states": torch.ones(1)}, {"hidden_states": "no tensor"})
    assert (path.read_bytes(), sidecar_file(path).read_bytes()) == before
    assert recording.left(tmp_path) == ["calib_data.json", "calib_data.pth"]
    recording.capture(path, {"hidden_states": torch.full((1,), 2.0)})
    assert recording.records(path)[0][0].item() == 2


def test_a_second_capture_to_the_same_file_at_the_same_time(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    with recording.recorder(module := recording.Layer(), path):
        module(torch.zeros(1))
        with pytest.raises(EnvError, match="another run is capturing"), recording.recorder(recording.Layer(), path):
            pass
        module(torch.zeros(1))
    assert len(recording.records(path)) == 2


def test_a_file_system_without_locks(
    recording: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, logger="slim"):
        assert len(recording.capture(tmp_path / "calib_data.pth", {"hidden_states": torch.zeros(1)})) == 1
    assert "cannot be locked (No locks available)" in caplog.text
    assert recording.left(tmp_path) == ["calib_data.json", "calib_data.pth"]


def test_a_target_that_is_no_file(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    path.mkdir()
    with pytest.raises(SecurityError, match="is not a file"), recording.recorder(recording.Layer(), path):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvError, match="cannot be written"),
        recording.recorder(recording.Layer(), tmp_path / "file" / "a.pth"),
    ):
        pass


def _run_and_be_killed(code: str, *arguments: str) -> None:
    """Run code in another process; it must end by SIGKILL."""
    lines = (
        "import os, signal, sys, torch",
        "from pathlib import Path",
        "from torch import nn",
        "from slim_sd.captured import files as record_files",
        "from slim_sd.captured.recorder import Recorder",
        "class Layer(nn.Module):",
        "    def forward(self, hidden_states, timestep=1, *, extra=None): return hidden_states",
        "module, path = Layer(), Path(sys.argv[1])",
        "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)",
    )
    script = "\n".join((*lines, code))
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_a_killed_capture(recording: Any, tmp_path: Path) -> None:
    """It leaves nothing that looks finished, and the next capture clears away what it left."""
    path = tmp_path / "calib_data.pth"
    _run_and_be_killed(
        "with Recorder(module, path, fingerprint='model', settings={}) as recorder:\n"
        "    for i in range(20): module(torch.full((100_000,), float(i)))\n"
        "    recorder._jobs.drain()\n"
        "    kill()",
        str(path),
    )
    assert recording.left(tmp_path) == [".calib_data.pth.slim-capture"]
    assert (tmp_path / ".calib_data.pth.slim-capture" / "tensors").stat().st_size > 1_000_000
    assert record_files.find_records(tmp_path) is None
    recording.capture(path, {"hidden_states": torch.zeros(1)})
    assert recording.left(tmp_path) == ["calib_data.json", "calib_data.pth"]


def test_killed_between_the_two_files(recording: Any, tmp_path: Path) -> None:
    """The sidecar of the new file lies beside the old one: noticed."""
    path = tmp_path / "calib_data.pth"
    recording.capture(path, {"hidden_states": torch.zeros(1)})
    _run_and_be_killed(
        "replace, count = os.replace, iter(range(9))\n"
        "record_files.os.replace = lambda *a: kill() if next(count) else replace(*a)\n"
        f"with Recorder(module, path, fingerprint='model', settings={recording.SETTINGS!r}): module(torch.ones(1))",
        str(path),
    )
    names = forward_parameters(recording.Layer())
    with pytest.raises(InvalidDatasetError, match="its sidecar belongs to another file"):
        open_records(path, parameters=names, fingerprint="model", settings=recording.SETTINGS)
    recording.capture(path, {"hidden_states": torch.ones(1)})
    assert len(open_records(path, parameters=names, fingerprint="model", settings=recording.SETTINGS)) == 1
    assert recording.left(tmp_path) == ["calib_data.json", "calib_data.pth"]


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write more to any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [500_000, 1_500_000, 2_000_100], ids=["first call", "later", "only the archive"])
def test_no_room_for_a_file(recording: Any, tmp_path: Path, limit: int) -> None:
    path = tmp_path / "calib_data.pth"
    recording.capture(path, {"hidden_states": torch.zeros(1)})
    before = path.read_bytes()
    calls = [{"hidden_states": torch.full((250_000,), float(i))} for i in range(2)]
    with pytest.raises(EnvError, match="File too large") as caught, _files_up_to(limit):
        recording.capture(path, *calls)
    assert caught.value.where == str(path)
    assert path.read_bytes() == before
    assert recording.left(tmp_path) == ["calib_data.json", "calib_data.pth"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(
    recording: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_files.os, call, full)
    with pytest.raises(EnvError, match="No space left on device"):
        recording.capture(tmp_path / "calib_data.pth", {"hidden_states": torch.zeros(1)})
    assert recording.left(tmp_path) == []


def test_a_bug_in_the_background_is_not_swallowed(
    recording: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(record_files.RecordWriter, "add", broken)
    with pytest.raises(RuntimeError, match="recording a call failed") as caught:
        recording.capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1)})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not isinstance(caught.value, SlimError)


def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    """Captured, assembled, opened and read: 32 calls of 8 MiB, 256 MiB."""
    script = "\n".join(
        (
            "import sys, torch",
            "from pathlib import Path",
            "from torch import nn",
            "from slim_core.memory import peak_memory, resident_memory",
            "from slim_sd.captured import recorder as capture, files as record_files",
            "from slim_sd.captured.records import open_records",
            "capture._WAITING_BYTES, record_files._RELEASE_AFTER = 16 << 20, 16 << 20",
            "class Layer(nn.Module):",
            "    def forward(self, hidden_states, prompt): return None",
            "module, path, names = Layer(), Path(sys.argv[1]), ['hidden_states', 'prompt']",
            "small = path.with_name('small.pth')",
            "def run(path, count):",
            "    with capture.Recorder(module, path, fingerprint='', settings={}):",
            "        for i in range(count):",
            "            module(torch.full((2 << 20,), float(i)), torch.ones(1 << 18))",
            "    for call in open_records(path, parameters=names, fingerprint='', settings={}):",
            "        assert call['prompt'].sum() == 1 << 18",
            "run(small, 2)",
            "before = peak_memory()",
            "run(path, 32)",
            "print((peak_memory() - before) >> 20)",
        )
    )
    path = tmp_path / "calib_data.pth"
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert 256 << 20 < path.stat().st_size < 258 << 20
    assert int(result.stdout) < 96

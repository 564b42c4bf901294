"""Failures of the streaming writer surface instead of hanging; and what they leave can be gone on with."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.checkpoint import writer as module
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import Shard, ShardedWriter, lay_out
from slim_core.errors import EnvError, InvalidModelError, SpecError, UnexpectedError, UnsupportedError

pytestmark = pytest.mark.usefixtures("no_hang")


def failing(number: int) -> Callable[..., int]:
    def fail(*_args: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("damage", ["gone", "shorter", "unreadable"])
def test_a_source_that_changes_under_the_run(
    shards: list[Shard], tmp_path: Path, origin: Checkpoint, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    file = origin.stored("a").file
    if damage == "gone":
        file.unlink()
    elif damage == "shorter":
        os.truncate(file, origin.stored("a").begin + 4)
    else:
        monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
        monkeypatch.setattr(os, "pread", failing(errno.EIO))
    writer = ShardedWriter(tmp_path, shards)
    writer.copy("a", origin.stored("a"))
    with pytest.raises(InvalidModelError, match=r"model\.safetensors: tensor 'a' can no longer be read") as caught:
        writer.flush()
    assert caught.value.where == str(file)
    writer.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_surfaces_at_the_next_call(
    shards: list[Shard],
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    origin: Checkpoint,
    number: int,
) -> None:
    writer = ShardedWriter(tmp_path, shards)
    called: list[int] = []
    monkeypatch.setattr(os, "pwrite", failing(number))
    writer.put("a", tensors["a"])
    writer._jobs.drain()
    message = f"writing the output failed: {os.strerror(number)}.*--resume"
    for use in (
        lambda: writer.put("b", tensors["b"]),
        lambda: writer.copy("b", origin.stored("b")),
        lambda: writer.after_writing(lambda: called.append(1)),
        writer.flush,
        writer.finish,
    ):
        with pytest.raises(EnvError, match=message) as caught:
            use()
        assert caught.value.where == str(tmp_path)
        assert isinstance(caught.value.__cause__, OSError)
    writer.close()
    assert not called


def test_nothing_is_noted_after_a_failed_write(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was queued behind the failure must not happen, above all the journal line of the unit."""
    called: list[int] = []
    writer = ShardedWriter(tmp_path, shards)
    gate = threading.Event()
    writer.after_writing(lambda: called.append(2 * gate.wait(30)))
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    writer.put("a", tensors["a"])
    writer.after_writing(lambda: called.append(1))
    gate.set()
    with pytest.raises(EnvError):
        writer.flush()
    writer.close()
    assert called == [2]


def test_a_producer_that_waits_for_room_is_woken_by_a_failure(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 64)
    writer = ShardedWriter(tmp_path, shards)
    gate = threading.Event()
    monkeypatch.setattr(os, "pwrite", lambda *args: gate.wait(30) and failing(errno.ENOSPC)())
    writer.put("a", tensors["a"])
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(EnvError, match="No space left"):
        writer.put("b", tensors["b"])
    writer.close()


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("odd"), MemoryError("odd"), Odd("odd")])
def test_whatever_an_action_raises_surfaces(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path, error: BaseException
) -> None:
    def act() -> None:
        raise error

    writer = ShardedWriter(tmp_path, shards)
    writer.after_writing(act)
    with pytest.raises(UnexpectedError, match=r"the background writer failed: \w+\('odd'\)") as caught:
        writer.flush()
    assert caught.value.__cause__ is error
    with pytest.raises(UnexpectedError, match="odd"):
        writer.put("a", tensors["a"])
    with pytest.raises(UnexpectedError, match="odd"):
        writer.finish()
    writer.close()


def test_an_error_of_slim_passes_as_it_is(shards: list[Shard], tmp_path: Path) -> None:
    error = SpecError("no such thing")

    def act() -> None:
        raise error

    writer = ShardedWriter(tmp_path, shards)
    writer.after_writing(act)
    with pytest.raises(SpecError) as caught:
        writer.flush()
    assert caught.value is error
    writer.close()


def test_a_write_that_takes_nothing_is_a_failure(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardedWriter(tmp_path, shards)
    monkeypatch.setattr(os, "pwrite", lambda *_args: 0)
    writer.put("a", tensors["a"])
    with pytest.raises(EnvError, match="takes no more bytes"):
        writer.flush()
    writer.close()


def test_a_failed_sync_surfaces(tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardedWriter(tmp_path, lay_out([TensorMeta("a", torch.float32, (5, 3))], "w", 0))
    writer.put("a", tensors["a"])
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(EnvError, match="Input/output error"):
        writer.finish()
    monkeypatch.setattr(os, "close", lambda fd, close=os.close: close(fd) or failing(errno.EIO)())
    writer.close()


@pytest.mark.parametrize("call", ["pwrite", "truncate", "open", "fchmod"])
def test_a_start_that_fails_leaves_nothing_open(
    shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    real = getattr(os, call)
    calls = iter(range(100))
    # The first file is opened as usual, the second one fails.
    monkeypatch.setattr(os, call, lambda *args: real(*args) if next(calls) == 0 else failing(errno.ENOSPC)())
    with pytest.raises(EnvError, match="No space left on device"):
        ShardedWriter(tmp_path, shards)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unwritable_folder(shards: list[Shard], tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"absent/w-00001.*: writing the output failed: No such file"):
        ShardedWriter(tmp_path / "absent", shards)


def test_resuming_keeps_what_was_written(shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path) -> None:
    first = ShardedWriter(tmp_path, shards)
    done = ["a", "codes"]
    for name in done:
        first.put(name, tensors[name])
    first.close()
    with (tmp_path / shards[-1].file_name).open("r+b") as stream:
        stream.seek(shards[-1].nbytes - 1)
        stream.write(b"\xff")  # half a tensor that never was noted as done
    again = ShardedWriter(tmp_path, shards, done=[*done, "of another plan"])
    with pytest.raises(UnexpectedError, match="a: the tensor was already written"):
        again.put("a", tensors["a"])
    for name in random.Random(1).sample(sorted(set(tensors) - set(done)), len(tensors) - len(done)):
        again.put(name, tensors[name])
    again.finish()
    straight = tmp_path / "straight"
    straight.mkdir()
    writer = ShardedWriter(straight, shards)
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.finish()
    for shard in shards:
        assert (tmp_path / shard.file_name).read_bytes() == (straight / shard.file_name).read_bytes()


def shard_of(shards: list[Shard], name: str) -> Shard:
    return next(shard for shard in shards if name in shard.offsets)


@pytest.mark.parametrize("damage", ["gone", "shorter", "longer", "header"])
def test_resuming_over_a_file_that_is_not_the_one_begun(shards: list[Shard], tmp_path: Path, damage: str) -> None:
    ShardedWriter(tmp_path, shards).close()
    file = tmp_path / shard_of(shards, "a").file_name
    size = file.stat().st_size
    match damage:
        case "gone":
            file.unlink()
        case "shorter":
            os.truncate(file, size - 1)
        case "longer":
            os.truncate(file, size + 1)
        case _:
            with file.open("r+b") as stream:
                stream.seek(20)
                stream.write(b"?")
    with pytest.raises(UnsupportedError, match=r"this file of the interrupted run is gone or was changed"):
        ShardedWriter(tmp_path, shards, done=["a"])
    assert shard_of(shards, "b") != shard_of(shards, "a")
    ShardedWriter(tmp_path, shards, done=["b"]).close()  # a file without finished tensors is simply written again

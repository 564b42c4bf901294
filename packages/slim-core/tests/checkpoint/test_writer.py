"""The streaming writer: the layout rule, files equal to the library's, and failures that surface instead of hanging."""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from slim_core.checkpoint import writer as module
from slim_core.checkpoint.header import StoredTensor, read_header
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import Shard, ShardedWriter, lay_out
from slim_core.errors import EnvError, InvalidModelError, SpecError, UnexpectedError, UnsupportedError

TENSORS = {
    "a": torch.randn(5, 3),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "nothing": torch.empty(0, 4),
    "codes": torch.randint(-128, 128, (7, 3), dtype=torch.int8),
    "b": torch.randn(4, 2, 3).bfloat16(),
    "flags": torch.tensor([True, False]),
    "f8": torch.randn(9).to(torch.float8_e4m3fn),
    "turned": torch.randn(3, 4).T,
}


def metas(tensors: dict[str, Tensor]) -> list[TensorMeta]:
    return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


SHARDS = lay_out(metas(TENSORS), "w", 60)


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.float(), right.float())


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A deadlock ends the test run instead of stopping it for good, and no background thread outlives its test."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    for thread in threading.enumerate():
        if thread.name == "slim-writer":
            thread.join(10)
            assert not thread.is_alive()


sizes = st.lists(
    st.tuples(st.sampled_from([torch.int8, torch.bfloat16, torch.float32]), st.integers(0, 40)), max_size=20
)


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(0, 120))
def test_the_layout_rule(content: list[tuple[torch.dtype, int]], limit: int) -> None:
    tensors = [TensorMeta(f"t{i}", dtype, (n,)) for i, (dtype, n) in enumerate(content)]
    shards = lay_out(tensors, "stem", limit)
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    if limit == 0:
        assert [shard.file_name for shard in shards] == ["stem.safetensors"]
    for number, shard in enumerate(shards, 1):
        if limit:
            assert shard.file_name == f"stem-{number:05d}-of-{len(shards):05d}.safetensors"
            held = sum(tensor.nbytes for tensor in shard.tensors)
            assert held < limit or len(shard.tensors) == 1
            if number < len(shards):
                assert held + shards[number].tensors[0].nbytes >= limit
        assert all(shard.offsets[tensor.name] % tensor.dtype.itemsize == 0 for tensor in shard.tensors)


def test_numbers_beyond_five_digits() -> None:
    shards = lay_out([TensorMeta(f"t{i}", torch.int8, (1,)) for i in range(100_000)], "s", 1)
    assert shards[0].file_name == "s-00001-of-100000.safetensors"
    assert shards[-1].file_name == "s-100000-of-100000.safetensors"


def test_a_name_may_appear_once() -> None:
    twin = TensorMeta("a", torch.int8, (9,))
    for limit in (0, 10):
        with pytest.raises(UnexpectedError, match="a: two tensors of the plan have this name"):
            lay_out([twin, TensorMeta("b", torch.int8, (9,)), twin], "s", limit)


@settings(max_examples=25, deadline=None)
@given(st.permutations(sorted(TENSORS)), st.sampled_from([0, 1, 60, 1000]))
def test_any_order_gives_the_files_of_the_library(order: list[str], limit: int) -> None:
    shards = lay_out(metas(TENSORS), "w", limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = ShardedWriter(folder, shards)
        for tensor in order:
            writer.put(tensor, TENSORS[tensor])
        writer.finish()
        assert sorted(path.name for path in folder.iterdir()) == [shard.file_name for shard in shards]
        for shard in shards:
            file = folder / shard.file_name
            assert file.stat().st_size == shard.nbytes
            ours = load_file(file)
            save_file({t.name: TENSORS[t.name].contiguous() for t in shard.tensors}, folder / "theirs")
            theirs = load_file(folder / "theirs")
            assert ours.keys() == theirs.keys()
            assert all(same(ours[key], theirs[key]) for key in theirs)
            found = {t.name: t for t in read_header(file)}
            assert {key: found[key].begin for key in found} == shard.offsets


def test_headers_are_there_first(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    try:
        for shard in SHARDS:
            assert [t.name for t in sorted(read_header(tmp_path / shard.file_name), key=lambda t: t.name)] == sorted(
                t.name for t in shard.tensors
            )
    finally:
        writer.close()


def test_what_does_not_follow_the_plan_is_refused_and_can_be_put_right(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    for tensor, message in (
        (TENSORS["a"].half(), r"a: tensor is torch.float16\[5, 3\], the plan says torch.float32\[5, 3\]"),
        (TENSORS["a"].T, r"a: tensor is torch.float32\[3, 5\], the plan says"),
        (TENSORS["a"].flatten(), r"a: tensor is torch.float32\[15\]"),
        (TENSORS["a"].to("meta"), "a: the tensor has no values"),
    ):
        with pytest.raises(UnexpectedError, match=message):
            writer.put("a", tensor)
    with pytest.raises(UnexpectedError, match="unknown: the tensor is not in the plan"):
        writer.put("unknown", TENSORS["a"])
    writer.put("a", TENSORS["a"].clone().requires_grad_())
    with pytest.raises(UnexpectedError, match="a: the tensor was already written"):
        writer.put("a", TENSORS["a"])
    with pytest.raises(UnexpectedError, match=r"7 tensors of the plan were never written: b, codes, f8"):
        writer.finish()
    for name in set(TENSORS) - {"a"}:
        writer.put(name, TENSORS[name])
    writer.finish()
    assert all(same(Checkpoint(tmp_path).load(name), tensor) for name, tensor in TENSORS.items())


@pytest.fixture
def origin(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "origin"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def _unsupported(*_args: Any) -> int:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("kernel", ["works", "stutters", "refuses", "gives up", "absent"])
def test_copying_equals_putting(
    tmp_path: Path, origin: Checkpoint, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    real = os.copy_file_range
    monkeypatch.setattr(module, "_CARRY_CHUNK", 5)
    match kernel:
        case "stutters":
            monkeypatch.setattr(os, "copy_file_range", lambda s, t, n, *at: real(s, t, min(n, 3), *at))
        case "refuses":
            monkeypatch.setattr(os, "copy_file_range", _unsupported)
        case "gives up":
            monkeypatch.setattr(os, "copy_file_range", lambda *_args: 0)
        case "absent":
            monkeypatch.delattr(os, "copy_file_range")
        case _:
            pass
    files: list[bytes] = []
    for way in ("put", "copy"):
        folder = tmp_path / way
        folder.mkdir()
        writer = ShardedWriter(folder, SHARDS)
        for name in TENSORS:
            if way == "put":
                writer.put(name, TENSORS[name])
            else:
                writer.copy(name, origin.stored(name))
        writer.finish()
        files.append(b"".join((folder / shard.file_name).read_bytes() for shard in SHARDS))
    assert files[0] == files[1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_rows_one_after_the_other_give_the_whole(counts: list[int]) -> None:
    whole = torch.randn(sum(counts), 3, 2).bfloat16()
    (shard,) = lay_out(metas({"x": torch.ones(2), "whole": whole}), "w", 0)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardedWriter(Path(folder), [shard])
        for part in whole.split(counts):
            writer.put_rows("whole", part)
        writer.put("x", torch.ones(2))
        writer.finish()
        assert same(load_file(Path(folder) / "w.safetensors")["whole"], whole)


def test_rows_that_do_not_follow_the_plan(tmp_path: Path) -> None:
    (shard,) = lay_out(metas({"x": torch.ones(3, 2)}), "w", 0)
    writer = ShardedWriter(tmp_path, [shard])
    writer.put_rows("x", torch.ones(2, 2))
    for rows in (torch.ones(2, 2), torch.ones(1, 3), torch.ones(1, 2).half()):
        with pytest.raises(UnexpectedError, match=r"x: .* from row 2 on do not fit the plan"):
            writer.put_rows("x", rows)
    with pytest.raises(UnexpectedError, match="1 tensors of the plan were never written"):
        writer.finish()
    writer.put_rows("x", torch.ones(1, 2))
    with pytest.raises(UnexpectedError, match="was already written"):
        writer.put_rows("x", torch.ones(1, 2))
    writer.finish()


def test_copying_what_does_not_follow_the_plan(tmp_path: Path, origin: Checkpoint) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    with pytest.raises(UnexpectedError, match=r"a: stored as torch.bfloat16\[4, 2, 3\], the plan says torch.float32"):
        writer.copy("a", origin.stored("b"))
    turned = StoredTensor("a", torch.float32, (3, 5), origin.stored("a").file, origin.stored("a").begin, 60)
    with pytest.raises(UnexpectedError, match=r"stored as torch.float32\[3, 5\]"):
        writer.copy("a", turned)
    writer.copy("a", origin.stored("a"))
    with pytest.raises(UnexpectedError, match="already written"):
        writer.copy("a", origin.stored("a"))
    writer.close()


@pytest.mark.parametrize("damage", ["gone", "shorter", "unreadable"])
def test_a_source_that_changes_under_the_run(
    tmp_path: Path, origin: Checkpoint, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    file = origin.stored("a").file
    if damage == "gone":
        file.unlink()
    elif damage == "shorter":
        os.truncate(file, origin.stored("a").begin + 4)
    else:
        monkeypatch.setattr(os, "copy_file_range", _unsupported)
        monkeypatch.setattr(os, "pread", failing(errno.EIO))
    writer = ShardedWriter(tmp_path, SHARDS)
    writer.copy("a", origin.stored("a"))
    with pytest.raises(InvalidModelError, match=r"model\.safetensors: tensor 'a' can no longer be read") as caught:
        writer.flush()
    assert caught.value.where == str(file)
    writer.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_files_belong_to_their_owner_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        ShardedWriter(tmp_path, SHARDS).close()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in tmp_path.iterdir()} == {0o600}


def failing(number: int) -> Callable[..., int]:
    def fail(*_args: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: Checkpoint, number: int
) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    called: list[int] = []
    monkeypatch.setattr(os, "pwrite", failing(number))
    writer.put("a", TENSORS["a"])
    writer._jobs.drain()
    message = f"writing the output failed: {os.strerror(number)}.*--resume"
    for use in (
        lambda: writer.put("b", TENSORS["b"]),
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


def test_nothing_is_noted_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was queued behind the failure must not happen, above all the journal line of the unit."""
    called: list[int] = []
    writer = ShardedWriter(tmp_path, SHARDS)
    gate = threading.Event()
    writer.after_writing(lambda: called.append(2 * gate.wait(30)))
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    writer.put("a", TENSORS["a"])
    writer.after_writing(lambda: called.append(1))
    gate.set()
    with pytest.raises(EnvError):
        writer.flush()
    writer.close()
    assert called == [2]


def test_a_producer_that_waits_for_room_is_woken_by_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 64)
    writer = ShardedWriter(tmp_path, SHARDS)
    gate = threading.Event()
    monkeypatch.setattr(os, "pwrite", lambda *args: gate.wait(30) and failing(errno.ENOSPC)())
    writer.put("a", TENSORS["a"])
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(EnvError, match="No space left"):
        writer.put("b", TENSORS["b"])
    writer.close()


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("odd"), MemoryError("odd"), Odd("odd")])
def test_whatever_an_action_raises_surfaces(tmp_path: Path, error: BaseException) -> None:
    def act() -> None:
        raise error

    writer = ShardedWriter(tmp_path, SHARDS)
    writer.after_writing(act)
    with pytest.raises(UnexpectedError, match=r"the background writer failed: \w+\('odd'\)") as caught:
        writer.flush()
    assert caught.value.__cause__ is error
    with pytest.raises(UnexpectedError, match="odd"):
        writer.put("a", TENSORS["a"])
    with pytest.raises(UnexpectedError, match="odd"):
        writer.finish()
    writer.close()


def test_an_error_of_slim_passes_as_it_is(tmp_path: Path) -> None:
    error = SpecError("no such thing")

    def act() -> None:
        raise error

    writer = ShardedWriter(tmp_path, SHARDS)
    writer.after_writing(act)
    with pytest.raises(SpecError) as caught:
        writer.flush()
    assert caught.value is error
    writer.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:7]), offset))
    writer = ShardedWriter(tmp_path, SHARDS)
    for name, tensor in TENSORS.items():
        writer.put(name, tensor)
    writer.finish()
    monkeypatch.undo()
    assert all(same(Checkpoint(tmp_path).load(name), tensor) for name, tensor in TENSORS.items())


def test_a_write_that_takes_nothing_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    monkeypatch.setattr(os, "pwrite", lambda *_args: 0)
    writer.put("a", TENSORS["a"])
    with pytest.raises(EnvError, match="takes no more bytes"):
        writer.flush()
    writer.close()


def test_actions_come_after_what_was_queued_before_them(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    seen: list[tuple[str, set[str]]] = []

    def look(name: str) -> None:
        views = Checkpoint(tmp_path)
        seen.append((name, {name for name in ("a", "codes") if same(views.load(name), TENSORS[name])}))

    writer.after_writing(lambda: look("before"))
    writer.put("a", TENSORS["a"])
    writer.after_writing(lambda: look("between"))
    writer.put("codes", TENSORS["codes"])
    writer.after_writing(lambda: look("after"))
    writer.flush()
    writer.close()
    assert [name for name, _ in seen] == ["before", "between", "after"]
    assert "a" in seen[1][1]
    assert seen[2][1] == {"a", "codes"}


def test_memory_of_the_queue_is_bounded_and_large_tensors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 100)
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.int8) for i, size in enumerate([40, 5000, 60, 60, 9000, 1])}
    writer = ShardedWriter(tmp_path, lay_out(metas(tensors), "w", 0))
    high: list[int] = []
    real = module._write_all
    monkeypatch.setattr(module, "_write_all", lambda *args: high.append(writer._jobs.held_bytes) or real(*args))
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.finish()
    assert sorted(set(high) - set(range(101))) == [5000, 9000]
    assert all(torch.equal(Checkpoint(tmp_path).load(name), tensor) for name, tensor in tensors.items())


def test_several_threads_may_hand_over_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 50)
    tensors = {f"t{i}": torch.full((1 + i % 70,), i % 100, dtype=torch.int8) for i in range(200)}
    writer = ShardedWriter(tmp_path, lay_out(metas(tensors), "w", 900))
    names = list(tensors)
    threads = [
        threading.Thread(target=lambda part=names[k::4]: [writer.put(name, tensors[name]) for name in part])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    writer.finish()
    assert all(torch.equal(Checkpoint(tmp_path).load(name), tensor) for name, tensor in tensors.items())


def test_closing_twice_and_using_it_afterwards(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, SHARDS)
    writer.put("a", TENSORS["a"])
    writer.close()
    writer.close()
    writer.flush()
    assert same(Checkpoint(tmp_path).load("a"), TENSORS["a"])
    for use in (lambda: writer.put("b", TENSORS["b"]), lambda: writer.after_writing(lambda: None)):
        with pytest.raises(UnexpectedError, match="the writer is closed"):
            use()


def test_a_failed_sync_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardedWriter(tmp_path, lay_out(metas({"a": TENSORS["a"]}), "w", 0))
    writer.put("a", TENSORS["a"])
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(EnvError, match="Input/output error"):
        writer.finish()
    monkeypatch.setattr(os, "close", lambda fd, close=os.close: close(fd) or failing(errno.EIO)())
    writer.close()


@pytest.mark.parametrize("call", ["pwrite", "truncate", "open", "fchmod"])
def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    real = getattr(os, call)
    calls = iter(range(100))
    # The first file is opened as usual, the second one fails.
    monkeypatch.setattr(os, call, lambda *args: real(*args) if next(calls) == 0 else failing(errno.ENOSPC)())
    with pytest.raises(EnvError, match="No space left on device"):
        ShardedWriter(tmp_path, SHARDS)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"absent/w-00001.*: writing the output failed: No such file"):
        ShardedWriter(tmp_path / "absent", SHARDS)


def test_resuming_keeps_what_was_written(tmp_path: Path) -> None:
    first = ShardedWriter(tmp_path, SHARDS)
    done = ["a", "codes"]
    for name in done:
        first.put(name, TENSORS[name])
    first.close()
    with (tmp_path / SHARDS[-1].file_name).open("r+b") as stream:
        stream.seek(SHARDS[-1].nbytes - 1)
        stream.write(b"\xff")  # half a tensor that never was noted as done
    again = ShardedWriter(tmp_path, SHARDS, done=[*done, "of another plan"])
    with pytest.raises(UnexpectedError, match="a: the tensor was already written"):
        again.put("a", TENSORS["a"])
    for name in random.Random(1).sample(sorted(set(TENSORS) - set(done)), len(TENSORS) - len(done)):
        again.put(name, TENSORS[name])
    again.finish()
    straight = tmp_path / "straight"
    straight.mkdir()
    writer = ShardedWriter(straight, SHARDS)
    for name, tensor in TENSORS.items():
        writer.put(name, tensor)
    writer.finish()
    for shard in SHARDS:
        assert (tmp_path / shard.file_name).read_bytes() == (straight / shard.file_name).read_bytes()


def shard_of(name: str) -> Shard:
    return next(shard for shard in SHARDS if name in shard.offsets)


@pytest.mark.parametrize("damage", ["gone", "shorter", "longer", "header"])
def test_resuming_over_a_file_that_is_not_the_one_begun(tmp_path: Path, damage: str) -> None:
    ShardedWriter(tmp_path, SHARDS).close()
    file = tmp_path / shard_of("a").file_name
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
        ShardedWriter(tmp_path, SHARDS, done=["a"])
    assert shard_of("b") != shard_of("a")
    ShardedWriter(tmp_path, SHARDS, done=["b"]).close()  # a file without finished tensors is simply written again


def test_a_plan_without_tensors(tmp_path: Path) -> None:
    ShardedWriter(tmp_path, lay_out([], "w", 0)).finish()
    assert load_file(tmp_path / "w.safetensors") == {}

"""The streaming writer: the layout rule, files equal to the library's, a plan that is kept, bounded memory."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
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
from slim_core.errors import UnexpectedError

pytestmark = pytest.mark.usefixtures("no_hang")


def metas(tensors: dict[str, Tensor]) -> list[TensorMeta]:
    return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.float(), right.float())


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
@given(st.permutations(range(8)), st.sampled_from([0, 1, 60, 1000]))
def test_any_order_gives_the_files_of_the_library(tensors: dict[str, Tensor], places: list[int], limit: int) -> None:
    order = [list(tensors)[place] for place in places]
    shards = lay_out(metas(tensors), "w", limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = ShardedWriter(folder, shards)
        for tensor in order:
            writer.put(tensor, tensors[tensor])
        writer.finish()
        assert sorted(path.name for path in folder.iterdir()) == [shard.file_name for shard in shards]
        for shard in shards:
            file = folder / shard.file_name
            assert file.stat().st_size == shard.nbytes
            ours = load_file(file)
            save_file({t.name: tensors[t.name].contiguous() for t in shard.tensors}, folder / "theirs")
            theirs = load_file(folder / "theirs")
            assert ours.keys() == theirs.keys()
            assert all(same(ours[key], theirs[key]) for key in theirs)
            found = {t.name: t for t in read_header(file)}
            assert {key: found[key].begin for key in found} == shard.offsets


def test_headers_are_there_first(shards: list[Shard], tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, shards)
    try:
        for shard in shards:
            assert [t.name for t in sorted(read_header(tmp_path / shard.file_name), key=lambda t: t.name)] == sorted(
                t.name for t in shard.tensors
            )
    finally:
        writer.close()


def test_what_does_not_follow_the_plan_is_refused_and_can_be_put_right(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    writer = ShardedWriter(tmp_path, shards)
    for tensor, message in (
        (tensors["a"].half(), r"a: tensor is torch.float16\[5, 3\], the plan says torch.float32\[5, 3\]"),
        (tensors["a"].T, r"a: tensor is torch.float32\[3, 5\], the plan says"),
        (tensors["a"].flatten(), r"a: tensor is torch.float32\[15\]"),
        (tensors["a"].to("meta"), "a: the tensor has no values"),
    ):
        with pytest.raises(UnexpectedError, match=message):
            writer.put("a", tensor)
    with pytest.raises(UnexpectedError, match="unknown: the tensor is not in the plan"):
        writer.put("unknown", tensors["a"])
    writer.put("a", tensors["a"].clone().requires_grad_())
    with pytest.raises(UnexpectedError, match="a: the tensor was already written"):
        writer.put("a", tensors["a"])
    with pytest.raises(UnexpectedError, match=r"7 tensors of the plan were never written: b, codes, f8"):
        writer.finish()
    for name in set(tensors) - {"a"}:
        writer.put(name, tensors[name])
    writer.finish()
    assert all(same(Checkpoint(tmp_path).load(name), tensor) for name, tensor in tensors.items())


def _unsupported(*_args: Any) -> int:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("kernel", ["works", "stutters", "refuses", "gives up", "absent"])
def test_copying_equals_putting(
    shards: list[Shard],
    tensors: dict[str, Tensor],
    tmp_path: Path,
    origin: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
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
        writer = ShardedWriter(folder, shards)
        for name in tensors:
            if way == "put":
                writer.put(name, tensors[name])
            else:
                writer.copy(name, origin.stored(name))
        writer.finish()
        files.append(b"".join((folder / shard.file_name).read_bytes() for shard in shards))
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


def test_copying_what_does_not_follow_the_plan(shards: list[Shard], tmp_path: Path, origin: Checkpoint) -> None:
    writer = ShardedWriter(tmp_path, shards)
    with pytest.raises(UnexpectedError, match=r"a: stored as torch.bfloat16\[4, 2, 3\], the plan says torch.float32"):
        writer.copy("a", origin.stored("b"))
    turned = StoredTensor("a", torch.float32, (3, 5), origin.stored("a").file, origin.stored("a").begin, 60)
    with pytest.raises(UnexpectedError, match=r"stored as torch.float32\[3, 5\]"):
        writer.copy("a", turned)
    writer.copy("a", origin.stored("a"))
    with pytest.raises(UnexpectedError, match="already written"):
        writer.copy("a", origin.stored("a"))
    writer.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_files_belong_to_their_owner_alone(shards: list[Shard], tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        ShardedWriter(tmp_path, shards).close()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in tmp_path.iterdir()} == {0o600}


def test_short_writes_are_continued(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:7]), offset))
    writer = ShardedWriter(tmp_path, shards)
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.finish()
    monkeypatch.undo()
    assert all(same(Checkpoint(tmp_path).load(name), tensor) for name, tensor in tensors.items())


def test_actions_come_after_what_was_queued_before_them(
    shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    writer = ShardedWriter(tmp_path, shards)
    seen: list[tuple[str, set[str]]] = []

    def look(name: str) -> None:
        views = Checkpoint(tmp_path)
        seen.append((name, {name for name in ("a", "codes") if same(views.load(name), tensors[name])}))

    writer.after_writing(lambda: look("before"))
    writer.put("a", tensors["a"])
    writer.after_writing(lambda: look("between"))
    writer.put("codes", tensors["codes"])
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


def test_closing_twice_and_using_it_afterwards(shards: list[Shard], tensors: dict[str, Tensor], tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, shards)
    writer.put("a", tensors["a"])
    writer.close()
    writer.close()
    writer.flush()
    assert same(Checkpoint(tmp_path).load("a"), tensors["a"])
    for use in (lambda: writer.put("b", tensors["b"]), lambda: writer.after_writing(lambda: None)):
        with pytest.raises(UnexpectedError, match="the writer is closed"):
            use()


def test_a_plan_without_tensors(tmp_path: Path) -> None:
    ShardedWriter(tmp_path, lay_out([], "w", 0)).finish()
    assert load_file(tmp_path / "w.safetensors") == {}

"""The lazy reader: what it finds, what it refuses, and that memory follows what is in use."""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint import reader
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import LazyTensor, PassingTensor, TensorMeta
from slim_core.errors import InvalidModelError, UnexpectedError
from slim_core.memory import resident_memory

TENSORS = {
    "a": torch.randn(5, 3),
    "b": torch.randn(4, 2, 3).bfloat16(),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "nothing": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "c": torch.randn(6).half(),
}


def write_index(folder: Path, places: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    places: dict[str, str] = {}
    for number, names in enumerate((("a", "scalar"), ("b", "nothing", "flags"), ("c",)), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
        places |= dict.fromkeys(names, file)
    write_index(tmp_path, places)
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_comes_back(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    checkpoint = Checkpoint(folder)
    assert set(checkpoint) == set(TENSORS)
    assert len(checkpoint) == len(TENSORS)
    assert "a" in checkpoint
    assert "z" not in checkpoint
    assert 3 not in checkpoint
    assert checkpoint.files == sorted(folder.glob("*.safetensors"))
    for name, tensor in TENSORS.items():
        assert checkpoint.meta(name) == TensorMeta(name, tensor.dtype, tuple(tensor.shape))
        assert checkpoint.meta(name).nbytes == tensor.nbytes == checkpoint.stored(name).nbytes
        assert torch.equal(checkpoint.load(name), tensor)
        assert checkpoint.load(name).dtype == tensor.dtype
    with pytest.raises(InvalidModelError, match="there is no tensor 'z'"):
        checkpoint.load("z")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("shared")
    save_file(TENSORS, folder / "model.safetensors")
    return Checkpoint(folder)


bounds = st.integers(-7, 7)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["a", "b", "c", "nothing", "flags"]), bounds, bounds)
def test_rows_are_slices(shared: Checkpoint, name: str, start: int, stop: int) -> None:
    rows = shared.rows(name, start, stop)
    want = TENSORS[name][start:stop]
    assert rows.shape == want.shape
    assert rows.dtype == want.dtype
    assert torch.equal(rows, want)


def test_a_scalar_has_no_rows(single: Path) -> None:
    with pytest.raises(UnexpectedError, match="scalar: the tensor is a scalar"):
        Checkpoint(single).rows("scalar", 0, 1)


@pytest.mark.parametrize("padding", range(7))
def test_misaligned_tensors_of_other_writers(tmp_path: Path, padding: int) -> None:
    """Foreign writers neither pad the header nor order by element size."""
    values = {"x": torch.tensor([5], dtype=torch.uint8), "y": torch.randn(3, 2), "z": torch.randn(2).double()}
    entries: dict[str, Any] = {}
    data = b""
    for name, tensor in values.items():
        raw = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.uint8: "U8", torch.float32: "F32", torch.float64: "F64"}[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8 + padding)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    checkpoint = Checkpoint(tmp_path)
    assert sum(checkpoint.stored(name).begin % values[name].element_size() > 0 for name in values) >= 1
    for name, tensor in values.items():
        assert torch.equal(checkpoint.load(name), tensor)
        assert torch.equal(checkpoint.rows(name, 1, 3), tensor[1:3])
        assert checkpoint.load(name).data_ptr() % tensor.element_size() == 0
    checkpoint.release(values)
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in values.items())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return break_it


def index_is(text: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors.index.json").write_bytes(text)


FIRST, SECOND, THIRD = (f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))
DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda f: (f / SECOND).unlink(), rf"shard {SECOND} is missing"),
    "shard is a folder": (lambda f: (f / SECOND).unlink() or (f / SECOND).mkdir(), rf"shard {SECOND} is missing"),
    "dangling link": (
        lambda f: (f / SECOND).unlink() or (f / SECOND).symlink_to("absent"),
        rf"shard {SECOND} is missing",
    ),
    "truncated shard": (lambda f: cut(f / THIRD), rf"{THIRD}: the file is truncated"),
    "empty shard": (lambda f: os.truncate(f / THIRD, 0), rf"{THIRD}: not a safetensors file or cut off"),
    "tensor in two shards": (
        lambda f: save_file({"c": TENSORS["c"], "a": TENSORS["a"]}, f / THIRD),
        rf"{THIRD}: tensor 'a' is stored twice, also in {FIRST}",
    ),
    "index lies about a place": (edit_index(lambda m: m.update(a=SECOND)), "places tensor 'a' in .* does not hold it"),
    "index lists what is absent": (edit_index(lambda m: m.update(z=SECOND)), "places tensor 'z'"),
    "index points outside": (edit_index(lambda m: m.update(a="../x.safetensors")), "'a' is placed outside"),
    "index points to a sub-folder": (edit_index(lambda m: m.update(a=f"sub/{FIRST}")), "'a' is placed outside"),
    "index points to an absolute path": (edit_index(lambda m: m.update(a="/etc/passwd")), "'a' is placed outside"),
    "index points to the parent": (edit_index(lambda m: m.update(a="..")), "'a' is placed outside"),
    "index points to the folder": (edit_index(lambda m: m.update(a=".")), "'a' is placed outside"),
    "index points nowhere": (edit_index(lambda m: m.update(a="")), "'a' is placed outside"),
    "index holds a number": (edit_index(lambda m: m.update(a=1)), "'a' is placed outside"),
    "zero byte in a name": (edit_index(lambda m: m.update(a="x\0y")), "is missing"),
    "empty index": (edit_index(lambda m: m.clear()), "weight_map is empty or not an object"),
    "index without map": (index_is(b"{}"), "not a safetensors index: no weight_map"),
    "index is a list": (index_is(b"[1]"), "not a safetensors index: not an object"),
    "map is a list": (index_is(b'{"weight_map": ["a"]}'), "weight_map is empty or not an object"),
    "index is no JSON": (index_is(b"{"), "not a safetensors index"),
    "index is no text": (index_is(b"\xff\xfe{}"), "not a safetensors index"),
    "index names a tensor twice": (
        index_is(json.dumps({"weight_map": {"a": FIRST}}).replace("}}", f', "a": "{SECOND}"}}}}').encode()),
        "'a' appears twice",
    ),
    "several indices": (
        lambda f: write_index(f, {"a": FIRST}, "other.safetensors.index.json"),
        "several index files: model.safetensors.index.json, other.safetensors.index.json",
    ),
    "index is a folder": (
        lambda f: (f / "model.safetensors.index.json").unlink() or (f / "model.safetensors.index.json").mkdir(),
        "index.json: cannot be read: Is a directory",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_shows_at_once(sharded: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(sharded)
    with pytest.raises(InvalidModelError, match=message):
        Checkpoint(sharded)


def test_folders_without_weights(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidModelError, match="does not exist or is not a folder"):
            Checkpoint(folder)
    (tmp_path / "file").unlink()
    with pytest.raises(InvalidModelError, match=r"no safetensors weights \(point --model_path"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidModelError, match=r"only pytorch_model.bin \(convert the checkpoint"):
        Checkpoint(tmp_path)
    with pytest.raises(InvalidModelError, match="cannot be read: No such file"):
        Checkpoint(tmp_path, "model.safetensors.index.json")


def test_a_left_over_file_without_an_index(single: Path) -> None:
    save_file({"d": TENSORS["c"]}, single / "more.safetensors")
    assert set(Checkpoint(single)) == {*TENSORS, "d"}
    save_file({"c": TENSORS["c"]}, single / "more.safetensors")
    with pytest.raises(
        InvalidModelError, match=r"'c' is stored twice, also in model.safetensors .remove the left-over"
    ):
        Checkpoint(single)


def test_an_index_that_is_asked_for(sharded: Path) -> None:
    write_index(sharded, {"c": THIRD}, "quant.safetensors.index.json")
    assert set(Checkpoint(sharded, "quant.safetensors.index.json")) == {"c"}


def test_second_copies_and_hidden_files_are_no_part_of_the_model(sharded: Path) -> None:
    """Mistral ships its weights twice; macOS leaves ``._`` files behind."""
    save_file({"layers.0": TENSORS["c"]}, sharded / "consolidated.safetensors")
    write_index(sharded, {"layers.0": "consolidated.safetensors"}, "consolidated.safetensors.index.json")
    (sharded / "._model.safetensors").write_bytes(b"junk")
    assert set(Checkpoint(sharded)) == set(TENSORS)
    (sharded / "model.safetensors.index.json").unlink()
    assert set(Checkpoint(sharded)) == set(TENSORS)
    for file in sharded.glob("model*"):
        file.unlink()
    assert set(Checkpoint(sharded)) == {"layers.0"}


def test_links_into_a_cache_are_followed(single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("snapshot")
    (folder / "model.safetensors").symlink_to(single / "model.safetensors")
    assert torch.equal(Checkpoint(folder).load("a"), TENSORS["a"])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("large")
    tensors = {f"w{i}": torch.arange(i, i + (8 << 20), dtype=torch.int16) for i in range(4)}
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def test_memory_follows_what_is_in_use(large: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = large
    checkpoint = Checkpoint(folder)
    megabytes = 1 << 20
    before = resident_memory()
    views = {name: checkpoint.load(name) for name in tensors}
    assert resident_memory() - before < 4 * megabytes
    sums = {name: int(view.sum()) for name, view in views.items()}
    touched = resident_memory()
    assert touched - before > 56 * megabytes
    checkpoint.release(["w0", "w1"])
    assert 28 * megabytes < touched - resident_memory() < 40 * megabytes
    checkpoint.release(tensors)
    assert resident_memory() - before < 8 * megabytes
    assert {name: int(view.sum()) for name, view in views.items()} == sums
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in tensors.items())


def test_releasing_rows_gives_their_memory_back(tmp_path: Path) -> None:
    megabytes = 1 << 20
    save_file({"w": torch.ones(4, 16 * megabytes, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    view = checkpoint.load("w")
    assert int(view[:, ::4096].sum()) == 4 * 4096
    touched = resident_memory()
    checkpoint.release_rows("w", 1, 3)
    assert 28 * megabytes < touched - resident_memory() < 40 * megabytes
    assert int(view[:, ::4096].sum()) == 4 * 4096


def test_reading_and_releasing_one_after_the_other_leaves_nothing(tmp_path: Path) -> None:
    """The kernel maps pages around the one that is read, also those of tensors that were given back before."""
    tensors = {f"w{i:03}": torch.ones(100 << 10, dtype=torch.uint8) for i in range(160)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name in sorted(tensors):
        assert int(checkpoint.load(name).sum()) == 100 << 10
        checkpoint.release([name])
    assert resident_pages(tmp_path / "model.safetensors") <= 128 << 10


def resident_pages(file: Path) -> int:
    """Bytes of a mapped file that are in memory of this process."""
    text = Path("/proc/self/smaps").read_text("ascii")
    at = text.index(str(file))
    return int(text[at:].split("Rss:")[1].split()[0]) << 10


def test_rows_read_in_passing_are_given_back_by_the_thread_that_read_them(tmp_path: Path) -> None:
    megabyte = 1 << 20
    save_file({"w": torch.ones(8, megabyte, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    passing = PassingTensor(checkpoint, checkpoint.meta("w"))

    def read(row: int) -> int:
        return int(passing.rows(row, row + 1).sum())

    with ThreadPoolExecutor(1) as other:
        assert other.submit(read, 0).result() == megabyte
        assert [read(row) for row in range(1, 8)] == [megabyte] * 7
        held = resident_pages(tmp_path / "model.safetensors")
        assert 2 * megabyte <= held < 2.5 * megabyte  # the last row of each thread
        assert other.submit(read, 0).result() == megabyte
    passing.release()
    assert resident_pages(tmp_path / "model.safetensors") <= 128 << 10


def test_releasing_leaves_neighbours_and_unread_ones_alone(single: Path) -> None:
    checkpoint = Checkpoint(single)
    checkpoint.release(TENSORS)  # nothing is mapped yet
    kept = checkpoint.load("b")
    checkpoint.release(["a", "nothing", "scalar"])
    assert torch.equal(kept, TENSORS["b"])
    with pytest.raises(InvalidModelError, match="there is no tensor 'z'"):
        checkpoint.release(["z"])


def test_reading_ahead_asks_for_these_bytes_only(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, length, advice: asked.append((begin, length, advice)))
    checkpoint = Checkpoint(single)
    checkpoint.prefetch(["a", "nothing", "b"])
    assert checkpoint._reader is not None
    checkpoint._reader.shutdown(wait=True)
    want = [(checkpoint.stored(name).begin, TENSORS[name].nbytes, os.POSIX_FADV_WILLNEED) for name in ("a", "b")]
    assert asked == want


def test_reading_ahead_changes_nothing(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(single)
    for _ in range(3):
        checkpoint.prefetch(TENSORS)
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in TENSORS.items())
    with pytest.raises(InvalidModelError, match="there is no tensor 'z'"):
        checkpoint.prefetch(["z"])
    monkeypatch.delattr(os, "posix_fadvise")
    Checkpoint(single).prefetch(["z"])  # where the system cannot be asked, nothing is looked at


def test_use_after_close(single: Path) -> None:
    checkpoint = Checkpoint(single)
    checkpoint.close()
    view = checkpoint.load("a")
    checkpoint.prefetch(["a"])
    checkpoint.close()
    checkpoint.close()
    assert torch.equal(view, TENSORS["a"])
    checkpoint.release(["a"])
    checkpoint.prefetch(["b"])
    assert torch.equal(checkpoint.load("b"), TENSORS["b"])
    assert torch.equal(view, TENSORS["a"])


def test_a_file_that_vanishes_before_it_is_read(single: Path) -> None:
    checkpoint = Checkpoint(single)
    (single / "model.safetensors").unlink()
    with pytest.raises(InvalidModelError, match="can no longer be read: No such file"):
        checkpoint.load("a")


def test_views_warn_nobody_and_threads_share_one_mapping(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> mmap.mmap:
        made.append(1)
        return original(*args, **kwargs)

    original = mmap.mmap
    monkeypatch.setattr(reader.mmap, "mmap", counting)
    checkpoint = Checkpoint(single)
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        rows = list(pool.map(lambda i: checkpoint.rows("a", i % 5, i % 5 + 1), range(200)))
        assert warnings.filters == before
    assert not caught
    assert len(made) == 1
    assert all(torch.equal(row[0], TENSORS["a"][i % 5]) for i, row in enumerate(rows))


def test_a_lazy_tensor_reads_when_told(single: Path) -> None:
    checkpoint = Checkpoint(single)
    lazy = LazyTensor(checkpoint, checkpoint.meta("a"))
    assert (lazy.shape, lazy.dtype) == ((5, 3), torch.float32)
    assert torch.equal(lazy.load(), TENSORS["a"])
    lazy.release()
    assert torch.equal(lazy.rows(1, 3), TENSORS["a"][1:3])

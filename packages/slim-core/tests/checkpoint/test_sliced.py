"""Stacked tensors seen in slices: the same numbers as plain indexing gives, and only the bytes that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.fp8_blocks import Fp8BlockSource
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.sliced import Slice, SlicedSource
from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import InvalidModelError

EXPERTS, OUT, IN = 3, 10, 7
TENSORS: dict[str, Tensor] = {
    "stack": torch.arange(EXPERTS * OUT * IN, dtype=torch.float32).view(EXPERTS, OUT, IN),
    "biases": torch.arange(EXPERTS * OUT, dtype=torch.float64).view(EXPERTS, OUT),
    "plain": torch.arange(12, dtype=torch.bfloat16).view(4, 3),
    "scalar": torch.tensor(3.0),
}
SLICES = {
    "first": Slice("stack", 0, range(5)),
    "second": Slice("stack", 2, range(5, 10)),
    "even": Slice("stack", 1, range(0, 10, 2)),
    "turned": Slice("stack", 1, range(3), transposed=True),
    "turned-rest": Slice("stack", 1, range(3, 7), transposed=True),
    "turned-odd": Slice("stack", 2, range(1, 7, 2), transposed=True),
    "bias": Slice("biases", 1, range(5, 10)),
    "bias-odd": Slice("biases", 2, range(1, 10, 2)),
    "nothing": Slice("stack", 1, range(4, 4)),
}
WANT: dict[str, Tensor] = {
    "first": TENSORS["stack"][0, :5],
    "second": TENSORS["stack"][2, 5:],
    "even": TENSORS["stack"][1, ::2],
    "turned": TENSORS["stack"][1, :, :3].T,
    "turned-rest": TENSORS["stack"][1, :, 3:].T,
    "turned-odd": TENSORS["stack"][2, :, 1::2].T,
    "bias": TENSORS["biases"][1, 5:],
    "bias-odd": TENSORS["biases"][2, 1::2],
    "nothing": TENSORS["stack"][1, 4:4],
    "plain": TENSORS["plain"],
    "scalar": TENSORS["scalar"],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


@pytest.fixture
def view(checkpoint: Checkpoint) -> SlicedSource:
    return SlicedSource(checkpoint, SLICES)


@pytest.mark.parametrize("name", WANT)
def test_slices_hold_what_indexing_gives(view: SlicedSource, name: str) -> None:
    want, meta = WANT[name], view.meta(name)
    assert name in view
    assert (meta.name, meta.dtype, meta.shape) == (name, want.dtype, tuple(want.shape))
    assert torch.equal(view.load(name), want)
    if want.dim():
        assert torch.equal(LazyTensor(view, meta).rows(0, meta.shape[0]), want)


@pytest.mark.parametrize("name", [name for name in WANT if name != "scalar"])
def test_rows_with_any_bounds(view: SlicedSource, name: str) -> None:
    for start in range(-12, 12):
        for stop in range(-12, 12):
            rows = view.rows(name, start, stop)
            assert torch.equal(rows, WANT[name][start:stop]), (start, stop)
            assert rows.is_contiguous()


def test_stacks_disappear_and_everything_else_stays(view: SlicedSource) -> None:
    assert sorted(view) == sorted(["plain", "scalar", *SLICES])
    assert "stack" not in view
    for use in (
        view.meta,
        view.load,
        view.stored,
        lambda name: view.rows(name, 0, 1),
        lambda name: view.release([name]),
    ):
        with pytest.raises(InvalidModelError, match="no tensor 'stack': it is seen in slices"):
            use("stack")
        with pytest.raises(InvalidModelError, match="no tensor 'absent'"):
            use("absent")


@pytest.mark.parametrize("name", WANT)
def test_what_lies_in_the_file_as_it_is_read_can_be_copied_from_there(view: SlicedSource, name: str) -> None:
    stored = view.stored(name)
    if name in ("even", "turned", "turned-rest", "turned-odd", "bias-odd"):
        assert stored is None
        return
    assert stored is not None
    assert (stored.dtype, stored.shape, stored.nbytes) == (WANT[name].dtype, WANT[name].shape, WANT[name].nbytes)
    data = stored.file.read_bytes()[stored.begin : stored.begin + stored.nbytes]
    assert data == WANT[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_slice(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count, out, width = (data.draw(st.integers(1, 5)) for _ in range(3))
    stack = torch.arange(count * out * width, dtype=torch.int32).view(count, out, width)
    folder = tmp_path_factory.mktemp("any")
    save_file({"stack": stack}, folder / "model.safetensors")
    transposed = data.draw(st.booleans())
    index = data.draw(st.integers(0, count - 1))
    available = width if transposed else out
    start = data.draw(st.integers(0, available))
    outputs = range(start, data.draw(st.integers(start, available)), data.draw(st.integers(1, 3)))
    view = SlicedSource(Checkpoint(folder), {"part": Slice("stack", index, outputs, transposed)})
    want = (stack[index].T if transposed else stack[index])[list(outputs)]
    assert torch.equal(view.load("part"), want)
    first = data.draw(st.integers(0, len(outputs)))
    last = data.draw(st.integers(first, len(outputs)))
    assert torch.equal(view.rows("part", first, last), want[first:last])
    if (stored := view.stored("part")) is not None and stored.nbytes:
        content = stored.file.read_bytes()[stored.begin : stored.begin + stored.nbytes]
        assert content == want.contiguous().numpy().tobytes()


def test_views_of_the_file_where_they_can_be_and_copies_where_not(view: SlicedSource, checkpoint: Checkpoint) -> None:
    whole = checkpoint.load("stack")
    for name in ("first", "second", "turned"):
        assert view.load(name).untyped_storage().data_ptr() != 0
        assert whole.data_ptr() <= view.load(name).data_ptr() < whole.data_ptr() + whole.nbytes
    assert not whole.data_ptr() <= view.load("even").data_ptr() < whole.data_ptr() + whole.nbytes


def test_reading_ahead_asks_for_each_stack_once(view: SlicedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(view._inner, "prefetch", lambda names: seen.append(list(names)))
    view.prefetch(name for name in ("first", "plain", "even", "bias"))
    assert seen == [["stack", "plain", "biases"]]


def test_releasing_gives_back_the_entries_of_the_slices(view: SlicedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(view._inner, "release", lambda names: seen.append(list(names)))
    monkeypatch.setattr(view._inner, "release_rows", lambda *args: seen.append(args))
    view.release(["first", "even", "turned", "plain", "bias"])
    assert seen == [["plain"], ("stack", 0, 1), ("stack", 1, 2), ("biases", 1, 2)]
    seen.clear()
    view.release_rows("second", 0, 1)
    view.release_rows("plain", 1, 3)
    assert seen == [[], ("stack", 2, 3), ("plain", 1, 3)]
    monkeypatch.undo()
    turned = view.rows("turned", 0, 3)
    view.release(view)
    assert torch.equal(turned, WANT["turned"])
    assert torch.equal(view.load("turned"), WANT["turned"])


def test_an_entry_stored_by_columns_is_turned_once(view: SlicedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every block of rows, and not again for the linear that shares it."""
    turned = 0
    original = SlicedSource._entry

    def count(self: SlicedSource, part: Slice) -> Tensor:
        nonlocal turned
        turned += part.transposed
        return original(self, part)

    monkeypatch.setattr(SlicedSource, "_entry", count)
    for row in range(3):
        view.rows("turned", row, row + 1)
    view.release(["turned"])
    assert torch.equal(view.rows("turned-rest", 0, 4), WANT["turned-rest"])
    assert turned == 1
    view.rows("turned-odd", 0, 1)
    assert turned == 2
    for names in (["first"], ["first", "turned-odd"], view):
        view.rows("turned-odd", 0, 1)
        before = turned
        view.release(names)
        view.rows("turned-odd", 0, 1)
        assert turned == before + 1


def test_over_a_source_that_decodes(tmp_path: Path) -> None:
    tensors = TENSORS | {"w": torch.ones(2, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.full((1, 1), 3.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    view = SlicedSource(Fp8BlockSource(Checkpoint(tmp_path)), SLICES)
    assert torch.equal(view.load("w"), torch.full((2, 2), 3.0, dtype=torch.bfloat16))
    assert view.stored("w") is None
    assert view.stored("second") is not None
    view.release(["second", "w"])
    view.release_rows("w", 0, 1)
    assert torch.equal(view.load("second"), WANT["second"])


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"plain": Slice("stack", 0, range(5))}, "plain: is stored, and also part of 'stack'"),
        ({"a": Slice("scalar", 0, range(5))}, r"scalar: is no stack of matrices, its shape is \[\]"),
        ({"a": Slice("biases", 0, range(5), True)}, r"biases: is no stack of matrices, its shape is \[3, 10\]"),
        ({"a": Slice("stack", 3, range(5))}, r"stack: entry 3, outputs range\(0, 5\) are not inside"),
        ({"a": Slice("stack", -1, range(5))}, r"entry -1, .* are not inside its shape \[3, 10, 7\]"),
        ({"a": Slice("stack", 0, range(5, 11))}, "are not inside"),
        ({"a": Slice("stack", 0, range(5, 8), True)}, "are not inside"),
        ({"a": Slice("stack", 0, range(-1, 3))}, "are not inside"),
        ({"a": Slice("absent", 0, range(5))}, "no tensor 'absent'"),
    ],
)
def test_slices_that_cannot_be(checkpoint: Checkpoint, slices: dict[str, Slice], message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        SlicedSource(checkpoint, slices)

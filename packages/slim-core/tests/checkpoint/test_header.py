"""Headers: what we write the safetensors library reads and the other way round; what is broken is refused."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from slim_core.checkpoint.header import DTYPE_NAMES, DTYPES, build_header, parse_object, read_header
from slim_core.errors import InvalidModelError, UnexpectedError, UnsupportedError

names = st.text(max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
contents = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=8)


def noise(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=60, deadline=None)
@given(contents)
@example({"": ("F32", ()), 'ü/\n\x00"\\': ("I8", (3,)), "空": ("BF16", (0, 2)), "\U0001f600": ("C64", (1, 1))})
def test_the_library_reads_what_we_lay_out(content: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    tensors = {name: noise(DTYPES[dtype], shape) for name, (dtype, shape) in content.items()}
    header, offsets = build_header((name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
    assert len(header) % 8 == 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.safetensors")
        data = bytearray(header) + bytes(sum(t.nbytes for t in tensors.values()))
        for name, tensor in tensors.items():
            assert offsets[name] % tensor.dtype.itemsize == 0
            data[offsets[name] : offsets[name] + tensor.nbytes] = raw_bytes(tensor)
        file.write_bytes(data)
        with safe_open(file, "pt") as opened:
            assert set(opened.keys()) == set(tensors)
            assert opened.metadata() == {"format": "pt"}
            for name, tensor in tensors.items():
                assert list(opened.get_slice(name).get_shape()) == list(tensor.shape)
                if tensor.dtype == torch.float8_e8m0fnu:
                    continue  # the library knows the format's name of it, but not yet torch's
                read = opened.get_tensor(name)
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert raw_bytes(read) == raw_bytes(tensor)
        again = {stored.name: stored for stored in read_header(file)}
        assert {name: stored.begin for name, stored in again.items()} == offsets


@settings(max_examples=60, deadline=None)
@given(contents)
def test_we_read_what_the_library_writes(content: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    content = {name: entry for name, entry in content.items() if entry[0] != "F8_E8M0"}
    tensors = {name: noise(DTYPES[dtype], shape) for name, (dtype, shape) in content.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.safetensors")
        save_file(tensors, file)
        data = file.read_bytes()
        found = {stored.name: stored for stored in read_header(file)}
    assert set(found) == set(tensors)
    for name, stored in found.items():
        assert (stored.dtype, stored.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert data[stored.begin : stored.begin + stored.nbytes] == raw_bytes(tensors[name])


def write(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_sound_header_passes(tmp_path: Path) -> None:
    file = write(tmp_path / "x", {"b": entry(2, 4), "a": entry(0, 2), "e": entry(2, 2), "__metadata__": {}}, b"1234")
    assert [(t.name, t.nbytes) for t in read_header(file)] == [("b", 2), ("a", 2), ("e", 0)]


BROKEN: list[tuple[str, Any, bytes, str]] = [
    ("garbage", b"\x80\x02}q\x00", b"", "not valid JSON"),
    ("latin-1", '{"ä": 1}'.encode("latin-1"), b"", "not valid JSON"),
    ("utf-16", json.dumps({"a": entry(0, 1)}).encode("utf-16"), b"1", "not valid JSON"),
    ("cut off", b'{"a": {"dtype"', b"", "not valid JSON"),
    ("nested", b"[" * 200_000, b"", "nested too deeply"),
    ("list", [], b"", "not an object"),
    ("huge number", b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b"]}}", b"", "not valid JSON"),
    ("duplicate tensor", b'{"a": {}, "b": {}, "a": {}}', b"", "'a' appears twice"),
    ("duplicate key", b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', b"1", "twice"),
    ("overlap", {"a": entry(0, 3), "b": entry(2, 4)}, b"1234", "'b' overlaps"),
    ("contained", {"a": entry(0, 4), "b": entry(1, 2)}, b"1234", "'b' overlaps"),
    ("same place", {"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlaps"),
    ("gap", {"a": entry(0, 1), "b": entry(2, 4)}, b"1234", "'b' overlaps another one or leaves a gap"),
    ("gap at the start", {"a": entry(1, 4)}, b"1234", "'a' overlaps"),
    ("empty one inside", {"a": entry(0, 4), "b": entry(2, 2)}, b"1234", "'b' overlaps"),
    ("truncated", {"a": entry(0, 4)}, b"123", "truncated: .* bytes, expected"),
    ("longer", {"a": entry(0, 4)}, b"12345", "longer than its header says"),
    ("data without tensors", {}, b"1", "longer than its header says"),
    ("negative offset", {"a": entry(-1, 0, [1])}, b"", "'a' is malformed"),
    ("negative length", {"a": entry(0, 2, [-1, -2])}, b"12", "'a' is malformed"),
    ("backwards", {"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"1", "contradicts itself"),
    ("wrong size", {"a": entry(0, 4, [2], "F32")}, b"1234", r"contradicts itself: F32\[2\] in 4 bytes"),
    ("overflow", {"a": entry(0, 0, [0, 1 << 62, 1 << 62])}, b"", "contradicts itself"),
    ("overflowing length", {"a": entry(0, 0, [0, 1 << 63])}, b"", "malformed"),
    ("infinite", b'{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 1]}}', b"1", "malformed"),
    ("fraction", {"a": entry(0, 1, [1.0])}, b"1", "malformed"),
    ("boolean", {"a": entry(0, 1, [True])}, b"1", "malformed"),
    ("text as shape", {"a": entry(0, 1, "1")}, b"1", "malformed"),
    ("empty text as shape", {"a": entry(0, 1, "")}, b"1", "malformed"),
    ("object as shape", {"a": entry(0, 1, {})}, b"1", "malformed"),
    ("one offset", {"a": {"dtype": "U8", "shape": [], "data_offsets": [0]}}, b"1", "malformed"),
    ("unknown dtype", {"a": entry(0, 1, None, "F4")}, b"1", "unknown dtype: .*F4"),
    ("dtype is a list", {"a": entry(0, 1, None, ["U8"])}, b"1", "unknown dtype"),
    ("no dtype", {"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1", "malformed"),
    ("entry is text", {"a": "U8"}, b"1", "malformed"),
    ("entry is null", {"a": None}, b"1", "malformed"),
    ("lone surrogate", b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"1", "malformed"),
]


@pytest.mark.parametrize(("header", "data", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InvalidModelError, match=message) as caught:
        read_header(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    "content", [b"", b"\x10\0\0", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 8 + b"{}", (10**9).to_bytes(8, "little") + b"{}"]
)
def test_a_file_cut_off_inside_its_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InvalidModelError, match=rf"cut off inside its header \({len(content)} bytes\)"):
        read_header(tmp_path / "x")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("absent", "cannot be read: No such file"), ("fifo", "not a file"), (".", "not a file")):
        with pytest.raises(InvalidModelError, match=message):
            read_header(tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_raise_anything_else(content: bytes, framed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x")
        file.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
        try:
            assert isinstance(read_header(file), list)
        except InvalidModelError:
            assert content != b"{}" or not framed


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["U8", "F32", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "a"]), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional={"dtype": json_values, "shape": json_values, "data_offsets": json_values}))
def test_no_entry_raises_anything_else(content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            tensors = read_header(write(Path(folder, "x"), {"a": content}))
        except InvalidModelError as error:
            assert "'a'" in str(error) or "truncated" in str(error)  # noqa: PT017
        else:
            assert tensors[0].nbytes == 0


def test_what_cannot_be_laid_out() -> None:
    pair = ("a", torch.int8, (1,))
    with pytest.raises(UnexpectedError, match="a: two tensors"):
        build_header([pair, pair])
    with pytest.raises(UnexpectedError, match="reserved"):
        build_header([("__metadata__", torch.int8, (1,))])
    with pytest.raises(UnsupportedError, match=r"a: safetensors cannot hold torch.complex128"):
        build_header([("a", torch.complex128, (1,))])


def test_dtype_names_are_those_of_the_format() -> None:
    assert {DTYPES[name]: name for name in DTYPES} == DTYPE_NAMES
    assert parse_object(b'{"a": {"b": 1}}') == {"a": {"b": 1}}

"""The safetensors header: parsed, checked and built here, so that a shard can be laid out before it is written."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from slim_core.errors import InvalidModelError, UnexpectedError, UnsupportedError

__all__ = ["DTYPE_NAMES", "StoredTensor", "build_header", "parse_object", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 8
_LIMIT = 1 << 63
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: ``begin`` is the absolute byte offset in ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    nbytes: int


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, checked against its size, without reading any tensor data.

    Raises:
        InvalidModelError: the file is missing, truncated, longer than its header says, or its header is malformed.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelError("not a file", where=str(file), remedy=_AGAIN)
        size = status.st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise InvalidModelError(
                    f"not a safetensors file or cut off inside its header ({size} bytes)",
                    where=str(file),
                    remedy=_AGAIN,
                )
            header = parse_object(stream.read(length))
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=str(file), remedy=_AGAIN) from error
    except ValueError as error:
        raise InvalidModelError(f"its header is not valid JSON: {error}", where=str(file), remedy=_AGAIN) from error
    start = 8 + length
    tensors = [_entry(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"]
    _check_extent(file, start, size, tensors)
    return tensors


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 whose keys are all different.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return cast("dict[str, Any]", content)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} appears twice")
    return content


def _entry(file: Path, start: int, name: str, entry: Any) -> StoredTensor:
    try:
        name.encode()
        dtype = DTYPES[entry["dtype"]]
        shape = _counts(entry["shape"])
        begin, end = _counts(entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModelError(
            f"the header entry of tensor {name!r} is malformed or has an unknown dtype: {entry!r:.200}",
            where=str(file),
            remedy=_AGAIN,
        ) from error
    elements, span = 1, dtype.itemsize
    for n in shape:
        elements *= n
        span *= max(n, 1)
    if span >= _LIMIT or end - begin != elements * dtype.itemsize:
        raise InvalidModelError(
            f"the header entry of tensor {name!r} contradicts itself: "
            f"{entry['dtype']}{list(shape)} in {end - begin} bytes",
            where=str(file),
            remedy=_AGAIN,
        )
    return StoredTensor(name, dtype, shape, file, start + begin, end - begin)


def _counts(value: Any) -> tuple[int, ...]:
    """A list of lengths or offsets. Booleans, fractions and negative numbers are none."""
    if not isinstance(value, list):
        raise TypeError("not a list")
    items = cast("list[Any]", value)
    if not all(type(item) is int and 0 <= item < _LIMIT for item in items):
        raise ValueError("not lengths")
    return tuple(items)


def _check_extent(file: Path, start: int, size: int, tensors: list[StoredTensor]) -> None:
    position = start
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin != position:
            raise InvalidModelError(
                f"tensor {tensor.name!r} overlaps another one or leaves a gap before it",
                where=str(file),
                remedy=_AGAIN,
            )
        position += tensor.nbytes
    if position != size:
        state = "truncated" if size < position else "longer than its header says"
        raise InvalidModelError(
            f"the file is {state}: {size} bytes, expected {position}",
            where=str(file),
            remedy=_AGAIN,
        )


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data of a shard that holds ``tensors``, and the absolute offset of each.

    Data is ordered by element size, largest first, so that every tensor is aligned to its element size.

    Raises:
        UnsupportedError: safetensors has no such dtype.
        UnexpectedError: a name appears twice or is reserved.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: -t[1].itemsize):
        if name in entries:
            raise UnexpectedError("two tensors of the plan have this name, or it is reserved", where=name)
        if dtype not in DTYPE_NAMES:
            raise UnsupportedError(f"safetensors cannot hold {dtype}", where=name)
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= n
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        offsets[name] = position
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}

"""The safetensors header: parsed, checked and built here, so that a shard can be laid out before it is written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slim_core.errors import InvalidModelError

__all__ = ["DTYPE_NAMES", "StoredTensor", "build_header", "read_header"]

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 8


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
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise InvalidModelError(
                    f"not a safetensors file or cut off inside its header ({size} bytes)",
                    where=str(file),
                    remedy="copy or download the file again",
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise InvalidModelError(
            f"its header is not valid JSON: {error}", where=str(file), remedy="copy or download the file again"
        ) from error
    if not isinstance(header, dict):
        raise InvalidModelError("its header is not a JSON object", where=str(file))
    start = 8 + length
    tensors = [_entry(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"]
    _check_extent(file, start, size, tensors)
    return tensors


def _entry(file: Path, start: int, name: str, entry: Any) -> StoredTensor:
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModelError(
            f"the header entry of tensor {name!r} is malformed or has an unknown dtype: {entry!r:.200}", where=str(file)
        ) from error
    elements = 1
    for n in shape:
        elements *= n
    if begin < 0 or min(shape, default=0) < 0 or end - begin != elements * dtype.itemsize:
        raise InvalidModelError(
            f"the header entry of tensor {name!r} contradicts itself: {entry['dtype']}{list(shape)} in {end - begin} bytes",
            where=str(file),
        )
    return StoredTensor(name, dtype, shape, file, start + begin, end - begin)


def _check_extent(file: Path, start: int, size: int, tensors: list[StoredTensor]) -> None:
    position = start
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin != position:
            raise InvalidModelError(
                f"tensor {tensor.name!r} overlaps another one or leaves a gap before it", where=str(file)
            )
        position += tensor.nbytes
    if position != size:
        state = "truncated" if size < position else "longer than its header says"
        raise InvalidModelError(
            f"the file is {state}: {size} bytes, expected {position}",
            where=str(file),
            remedy="copy or download the file again",
        )


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data of a shard that holds ``tensors``, and the absolute offset of each.

    Data is ordered by element size, largest first, so that every tensor is aligned to its element size.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: -t[1].itemsize):
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

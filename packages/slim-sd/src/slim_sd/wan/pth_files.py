"""State dictionaries in ``.pth`` files, read without running what may be pickled in them.

The original Wan folders keep the text encoder, the VAE and the image encoder in such files. They are mapped into
memory where their container allows it (the zip of ``torch.save``), so that only what is used is read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError, SecurityError

__all__ = ["load_pth"]

_ZIP = b"PK\x03\x04"
_AGAIN = "download the file again"


def load_pth(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file by name, on the CPU, in the dtype they are stored in.

    Raises:
        InvalidModelError: the file is missing, truncated or holds something else than named dense tensors.
        SecurityError: unpickling it would call functions or build objects.
    """
    where = str(file)
    if not file.is_file():
        raise InvalidModelError("the file is missing", where=where, remedy="download the model folder again")
    try:
        content = _load(file)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise SecurityError(
                "the file holds more than tensors; unpickling it would run code, so it is refused",
                where=where,
                remedy="get the file from its publisher",
            ) from error
        raise _broken(where, error) from error
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror or error}", where=where) from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _broken(where, error) from error
    return _tensors(content, where)


def _load(file: Path) -> Any:
    # Older files, a pickle with tensors behind it, cannot be mapped; weights_only holds for them too.
    with file.open("rb") as stream:
        zipped = stream.read(len(_ZIP)) == _ZIP
    if zipped and not zipfile.is_zipfile(file):
        raise ValueError("the end of the archive is missing")
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


def _broken(where: str, error: Exception) -> InvalidModelError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return InvalidModelError(f"not a complete .pth file: {first}", where=where, remedy=_AGAIN)


def _tensors(content: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise InvalidModelError(f"holds a {type(content).__name__} instead of named tensors", where=where)
    for name, value in cast("Mapping[Any, Any]", content).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InvalidModelError(f"entry {name!r} is a {type(value).__name__}, not a tensor", where=where)
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise InvalidModelError(f"tensor {name!r} is not a plain dense one", where=where)
    return dict(cast("Mapping[str, Tensor]", content))

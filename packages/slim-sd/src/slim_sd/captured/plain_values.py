"""Arguments of a transformer's call as plain values: what a file of calibration inputs may hold."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from slim_core.errors import InvalidDatasetError, UnsupportedError

__all__ = ["DTYPES", "MAX_DEPTH", "check_numbers", "describe_type", "plain"]

MAX_DEPTH = 20
"""How deeply lists, tuples and dicts may lie in each other; a container in itself ends here too."""

DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)
"""Types that tensors of a file may have: those that ``torch.save`` writes as a typed storage."""


def plain(value: Any, where: str, on_tensor: Callable[[Tensor, str], Any], depth: int = 0) -> Any:
    """A value made of None, bool, int, float, str, list, tuple and dict, with tensors replaced by ``on_tensor``.

    Dataclasses and mappings (outputs of diffusers are both) become dicts, named tuples and ``torch.Size`` tuples,
    and subclasses of numbers and strings (those of numpy, members of enumerations) the number or the string.

    Args:
        where: what the value is, for errors; ``on_tensor`` gets it extended by keys and indices.

    Raises:
        UnsupportedError: anything else, or nested more than 20 deep.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        _check_tensor(value, where)
        return on_tensor(value, where)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if depth >= MAX_DEPTH:
        raise UnsupportedError(
            f"lists and dicts lie in each other more than {MAX_DEPTH} deep",
            where=where,
            remedy="calibration inputs are tensors, numbers, text, and flat containers of them",
        )
    if isinstance(value, (list, tuple)):
        items = [
            plain(item, f"{where}[{index}]", on_tensor, depth + 1)
            for index, item in enumerate(cast("list[Any]", value))
        ]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        entries = dict(cast("Mapping[Any, Any]", value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        raise UnsupportedError(
            f"{describe_type(value)} cannot be kept in a file of calibration inputs",
            where=where,
            remedy="only tensors, numbers, text, None, lists, tuples, dicts and dataclasses of them can",
        )
    return {_key(key, where): plain(item, f"{where}[{key!r}]", on_tensor, depth + 1) for key, item in entries.items()}


def _key(key: Any, where: str) -> str | int:
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return int(key)
    raise UnsupportedError(
        f"{describe_type(key)} is the key of a dict",
        where=where,
        remedy="keys of calibration inputs are text or whole numbers",
    )


def _check_tensor(tensor: Tensor, where: str) -> None:
    if tensor.layout is not torch.strided:
        kind = "a sparse tensor"
    elif tensor.is_quantized:
        kind = "a quantized tensor"
    elif tensor.is_meta:
        kind = "a tensor without data (device meta)"
    elif tensor.dtype not in DTYPES:
        kind = f"a tensor of type {tensor.dtype}"
    else:
        return
    raise UnsupportedError(
        f"{kind} cannot be kept in a file of calibration inputs",
        where=where,
        remedy="only dense tensors of floats, integers and bools can",
    )


def check_numbers(tensor: Tensor, where: str, parameter: str, remedy: str) -> None:
    """Refuse NaN, and infinities other than those of a mask: additive attention masks are made of them.

    Args:
        tensor: on the CPU, any shape and type; reduced without a copy.
        parameter: the argument of the forward that it belongs to.

    Raises:
        InvalidDatasetError: as said.
    """
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return
    reals = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    low, high = (float(bound) for bound in torch.aminmax(reals))
    if low != low or high != high:
        found = "NaN"
    elif "mask" not in parameter and (low == -float("inf") or high == float("inf")):
        found = "infinite values"
    else:
        return
    raise InvalidDatasetError(f"a calibration input has {found}", where=where, remedy=remedy)


def describe_type(value: Any) -> str:
    """The type of a value as text: ``numpy.ndarray``."""
    kind = cast("type[Any]", type(value))
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"

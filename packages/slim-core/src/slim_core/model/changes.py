"""Parameters that are changed for a while, to see what that does to what a block computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Change", "changed", "enlarging", "of_norm", "with_columns", "with_rows"]

_BLOCK_ELEMENTS = 1 << 19

Change = Callable[[Tensor], Tensor]
"""From a parameter to its changed value, a new tensor of the same dtype."""


def enlarging(size: int, dtype: torch.dtype) -> Tensor:
    """Equal scales that make what is divided by them far larger, as far as the dtype bears it."""
    return torch.full((size,), 2.0**-4 if dtype == torch.float16 else 2.0**-8)


@contextmanager
def changed(root: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Within this context these parameters have other values."""
    kept = {name: root.get_parameter(name) for name in values}
    try:
        for name, value in values.items():
            _set(root, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for name, parameter in kept.items():
            _set(root, name, parameter)


def of_norm(scale: Tensor, plus_one: bool, value: Tensor) -> Tensor:
    """A parameter of a norm whose output is to be multiplied by a scale."""
    shift = 1.0 if plus_one else 0.0
    return ((value.float() + shift) * scale.to(value.device) - shift).to(value.dtype)


def with_columns(scale: Tensor, value: Tensor) -> Tensor:
    """A matrix whose columns are multiplied by a scale; a few rows at a time, in float32."""
    value, scale = value.detach(), scale.to(value.device)
    result = torch.empty_like(value)
    for some in _portions(value, len(value)):
        result[some] = (value[some].float() * scale).to(value.dtype)
    return result


def with_rows(rows: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """A matrix, or a bias, of which some rows are divided by a scale; a few of them at a time, in float32."""
    value, rows = value.detach(), rows.to(value.device)
    result = value.clone()
    scale = scale.to(value.device).view(-1, *[1] * (value.dim() - 1))
    for some in _portions(value, len(rows)):
        result[rows[some]] = (value[rows[some]].float() / scale[some]).to(value.dtype)
    return result


def _portions(value: Tensor, rows: int) -> Iterator[slice]:
    """So many rows of a parameter, a few at a time."""
    step = max(1, _BLOCK_ELEMENTS // max(value[:1].numel(), 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _set(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(path), leaf, parameter)

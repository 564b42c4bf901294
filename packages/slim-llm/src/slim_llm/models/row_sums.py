"""Sums of rows in half precision, as the forwards of experts make them.

Experts add their outputs to the rows of their tokens by ``index_add_``. For bf16 and fp16 on a CPU torch does that some
hundred times slower than for float32, which makes it most of a calibration. Rows that are named once can be gathered,
added and put back, with the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["QuickRowSums"]

_HALVES = (torch.bfloat16, torch.float16)


class QuickRowSums(TorchFunctionMode):
    """While it is entered, ``index_add_`` of half precision to rows on the CPU is quick."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.index_add_ and not kwargs and len(args) == 4 and _adds_rows(*args):
            target, _, index, rows = args
            return target.index_copy_(0, index, target.index_select(0, index) + rows)
        return func(*args, **(kwargs or {}))


def _adds_rows(target: Tensor, dim: int, index: Tensor, rows: Tensor) -> bool:
    """Whether rows are added, none of them twice."""
    if target.device.type != "cpu" or target.dtype not in _HALVES or dim != 0 or target.dim() < 2:
        return False
    return rows.dtype == target.dtype and len(index.unique()) == len(index)

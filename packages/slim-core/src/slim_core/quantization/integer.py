"""Exact integer matrix products on any device, through float32 ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int8_matmul"]

# |a * b| <= 128 * 128 for int8, and float32 adds integers exactly up to 2^24.
_EXACT_TERMS = 2**24 // (128 * 128)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` with int32 accumulation, bit for bit as integer hardware computes it.

    The sum over input features is cut into runs that float32 adds exactly; the runs are added as int32.

    Args:
        x: int8 codes ``(tokens, in)``.
        weight: int8 codes ``(out, in)``.

    Returns:
        int32 ``(tokens, out)``.
    """
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], _EXACT_TERMS):
        stop = start + _EXACT_TERMS
        total += (x[:, start:stop].float() @ weight[:, start:stop].float().T).to(torch.int32)
    return total

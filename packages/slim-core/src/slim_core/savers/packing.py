"""Two four-bit codes per byte: the first in the low half, the second in the high half."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_columns", "pack_rows", "unpack_columns", "unpack_rows"]


def pack_rows(codes: Tensor) -> Tensor:
    """int8 codes in -8..7 ``(out, in)`` as int8 ``(out / 2, in)``: byte ``[r, c]`` holds rows ``2r`` and ``2r + 1``."""
    return (codes[0::2] & 0x0F) | (codes[1::2] << 4)


def unpack_rows(packed: Tensor) -> Tensor:
    """The int8 codes that :func:`pack_rows` packed."""
    codes = torch.empty(2 * packed.shape[0], packed.shape[1], dtype=torch.int8, device=packed.device)
    codes[0::2] = (packed << 4) >> 4
    codes[1::2] = packed >> 4
    return codes


def pack_columns(codes: Tensor) -> Tensor:
    """Codes of four bits ``(out, in)`` as bytes ``(out, in / 2)`` of the same dtype (int8 or uint8).

    Byte ``[r, c]`` holds columns ``2c`` and ``2c + 1``.
    """
    return (codes[:, 0::2] & 0x0F) | (codes[:, 1::2] << 4)


def unpack_columns(packed: Tensor) -> Tensor:
    """The codes that :func:`pack_columns` packed: int8 ones in -8..7, uint8 ones in 0..15."""
    codes = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=packed.dtype, device=packed.device)
    if packed.dtype == torch.uint8:
        codes[:, 0::2] = packed & 0x0F
    else:
        codes[:, 0::2] = (packed << 4) >> 4
    codes[:, 1::2] = packed >> 4
    return codes

"""Taking the weight of a norm into the linears that read it, so that what is left of the norm commutes with rotations.

A norm gives ``n(x) * g + b``; a linear with ``W``, ``c`` that reads it computes the same from ``n(x)`` alone with
``W diag(g)`` and ``c + W b``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slim_core.errors import UnsupportedError

__all__ = ["fold_norm_bias", "fuse_norm", "norm_gain"]


def norm_gain(weights: Sequence[Tensor], *, plus_one: bool = False) -> Tensor:
    """The factors that norms multiply with, side by side: float32 ``(channels,)``.

    Args:
        weights: vectors of norms whose outputs are concatenated; usually one.
        plus_one: they are norms that multiply with ``1 + w``.
    """
    gain = torch.cat([weight.float() for weight in weights])
    return gain + 1 if plus_one else gain


def fuse_norm(weight: Tensor, gain: Tensor) -> Tensor:
    """``W diag(g)``, float32 (float64 for a float64 weight).

    Args:
        weight: ``(out, in)``.
        gain: ``(in,)``, see :func:`norm_gain`. The norm's own weight becomes 1 (0 for ``1 + w`` norms).

    Raises:
        UnsupportedError: the shapes do not fit.
    """
    _check(weight, gain)
    exact = weight if weight.dtype == torch.float64 else weight.float()
    return exact * gain.to(exact.dtype)


def fold_norm_bias(weight: Tensor, norm_bias: Tensor) -> Tensor:
    """``W b``, float64 ``(out,)``, with W as it was before the norm's weight was fused into it.

    Args:
        weight: ``(out, in)``.
        norm_bias: ``(in,)``.

    Raises:
        UnsupportedError: the shapes do not fit.
    """
    _check(weight, norm_bias)
    return weight.double() @ norm_bias.double()


def _check(weight: Tensor, vector: Tensor) -> None:
    if vector.dim() != 1 or weight.dim() != 2 or len(vector) != weight.shape[1]:
        raise UnsupportedError(
            f"a norm of shape {list(vector.shape)} cannot be fused into a weight of shape {list(weight.shape)}"
        )

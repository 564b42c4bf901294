"""Which modules are linears that something else may take the place of."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["is_linear", "keep_float"]

_KEPT = "_slim_keeps_float"


def keep_float(module: nn.Module) -> None:
    """From now on this module is no linear for Slim, so no recipe can name it."""
    module.__dict__[_KEPT] = True


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W^T + b`` of its parameters and nothing more, and may be quantized.

    A class that writes the forward of :class:`torch.nn.Linear` anew is tried on numbers, with weights of its own. The
    output projection of :class:`torch.nn.MultiheadAttention` is none: it is never called, its weight is used by hand.
    """
    if not isinstance(module, nn.Linear) or module.__dict__.get(_KEPT):
        return False
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is nn.Linear.forward or _computes_a_linear(module)


def _computes_a_linear(module: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = copy(module)
    weight = torch.randn(3, 5, generator=generator)
    bias = torch.randn(3, generator=generator)
    given = torch.randn(2, 4, 5, generator=generator)
    has_bias = module._parameters.get("bias") is not None  # pyright: ignore[reportPrivateUsage]
    twin.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": nn.Parameter(bias, requires_grad=False) if has_bias else None,
    }
    twin.in_features, twin.out_features = 5, 3
    try:
        with torch.no_grad():
            output: Any = type(module).forward(twin, given)
    except Exception:  # noqa: BLE001 - code of others, which asks for more than its weight
        return False
    want = functional.linear(given, weight, bias if has_bias else None)
    return isinstance(output, Tensor) and output.shape == want.shape and bool(torch.allclose(output, want, atol=1e-5))

"""Biases of modules whose class knows of none: what a shift leaves on a norm, and on the linears behind it.

Engines keep such a bias in the model's dtype and add it to the output; so does what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.checkpoint.source import TensorSource
from slim_core.errors import UnsupportedError
from slim_core.model.skeleton import named_modules

__all__ = ["drop_bias", "expect_bias", "take_stored_biases"]

_MARK = "_slim_adds_bias"


def expect_bias(module: nn.Module, name: str) -> None:
    """From now on a module adds its parameter ``bias``, whenever it has one, to its output.

    Classes that know of a bias but were built without one (linears) do so by themselves.

    Args:
        name: the module, for errors.
    """
    if "bias" in module._parameters or _MARK in module.__dict__:  # pyright: ignore[reportPrivateUsage]
        return

    def add(module: nn.Module, _args: Any, output: Any) -> Any:
        bias = module._parameters.get("bias")  # pyright: ignore[reportPrivateUsage]
        if bias is None:
            return None
        if not isinstance(output, Tensor):
            raise UnsupportedError(
                f"it has a bias, which cannot be added to what {type(module).__name__} returns", where=name
            )
        return output + bias.to(output.dtype)

    module.__dict__[_MARK] = module.register_forward_hook(add)


def drop_bias(module: nn.Module) -> None:
    """Take the bias away that a module was given."""
    if "bias" in module._parameters:  # pyright: ignore[reportPrivateUsage]
        module._parameters["bias"] = None  # pyright: ignore[reportPrivateUsage]


def take_stored_biases(
    root: nn.Module, source: TensorSource, tensor_name: Callable[[str], str], skip: Collection[str] = ()
) -> None:
    """Give a model on ``meta`` the biases that are stored for modules which have none.

    Args:
        tensor_name: turns a parameter name into the checkpoint's name for it.
        skip: tensors to leave alone.
    """
    owned = {tensor_name(name) for name in root.state_dict(keep_vars=True)}
    for name, module in named_modules(root):
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if weight is None or module._parameters.get("bias") is not None:  # pyright: ignore[reportPrivateUsage]
            continue
        stored = tensor_name(f"{name}.weight").removesuffix("weight") + "bias"
        if stored in source and stored not in skip and stored not in owned:
            expect_bias(module, name)
            empty = torch.empty(source.meta(stored).shape, dtype=weight.dtype, device="meta")
            module.register_parameter("bias", nn.Parameter(empty, requires_grad=False))

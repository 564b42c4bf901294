"""Inputs of linears that are changed while the model runs: rotated, or multiplied by a scale for every channel.

A change stays with whatever stands in for the linear, and who watches its input sees it changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["MUL_SCALE", "change_inputs", "drop_input_scales", "is_changed", "mul_scale_of", "scale_input", "scaled"]

MUL_SCALE = ".div.mul_scale"
"""How the name of a scale ends that the input of a linear is multiplied by, one number per channel."""

_MARK = "_slim_changes_input"
_SCALED = "_slim_scaled_input"

Change = Callable[[Tensor], Tensor]
"""From an input ``(..., channels)`` to the changed one, of the same dtype."""


def mul_scale_of(linear: str) -> str:
    """The name of the scale that the input of a linear is multiplied by."""
    return linear + MUL_SCALE


def change_inputs(root: nn.Module, changes: Mapping[str, Change]) -> list[Any]:
    """From now on the inputs of these modules are changed; handles that put an end to it."""
    return [_change(root.get_submodule(name), change) for name, change in changes.items()]


def is_changed(module: nn.Module) -> bool:
    """Whether something changes the input of a module while the model runs."""
    return any(getattr(hook, _MARK, False) for hook in module._forward_pre_hooks.values())  # pyright: ignore


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """An input times a factor per channel, in the dtype of the input, as engines compute it."""
    return x * factor.to(device=x.device, dtype=x.dtype)


def scale_input(module: nn.Module, factor: Tensor | None) -> None:
    """From now on the input of a module is multiplied by this factor ``(channels,)``, and by none it had before.

    Args:
        factor: None for an input that is left as it is.
    """
    if (before := module.__dict__.pop(_SCALED, None)) is not None:
        before.remove()
    if factor is not None:
        module.__dict__[_SCALED] = _change(module, lambda x: scaled(x, factor))


def drop_input_scales(root: nn.Module, parameters: Iterable[str]) -> None:
    """Leave the inputs as they are that belong to these scales; other parameters do not matter."""
    for name in parameters:
        if name.endswith(MUL_SCALE):
            scale_input(root.get_submodule(name.removesuffix(MUL_SCALE)), None)


def _change(module: nn.Module, change: Change) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": change(kwargs["input"])}

    setattr(hook, _MARK, True)
    return module.register_forward_pre_hook(hook, with_kwargs=True)

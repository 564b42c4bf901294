"""Building a model without its weights.

Parameters are created on the ``meta`` device; buffers are real, because what a model computes in its constructor
(rotary frequencies, position tables) is in no checkpoint and must be kept.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slim_core.errors import InvalidModelError

__all__ = ["find_blocks", "named_modules", "parameters_on_meta", "stand_in"]


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_LARGE = 1 << 28
"""Elements. No model computes a table of that size, so a tensor of that size is a weight."""


class _LargeOnMeta(TorchFunctionMode):
    """Creates large tensors on ``meta``: stacked experts may be larger than the memory before they are a parameter."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            size: Any = kwargs.get("size", args)
            size = size[0] if size and isinstance(size[0], (tuple, list)) else size
            if prod(size) >= _LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Within this context every parameter that a module registers goes to ``meta`` at once, or is created there.

    Raises:
        InvalidModelError: a buffer is so large that it was taken for a parameter.
    """
    original, original_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    def register_buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and tensor.device.type == "meta":
            raise InvalidModelError(
                f"buffer {name!r} of {type(self).__name__} has {tensor.numel()} elements, too many to compute it",
                remedy="make the configuration's sizes smaller, such as max_position_embeddings",
            )
        original_buffer(self, name, tensor, persistent)

    nn.Module.register_parameter, nn.Module.register_buffer = register, register_buffer
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = original, original_buffer


def named_modules(root: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``root`` and itself, by dotted name; one that has two names only once unless asked."""
    return cast("Iterator[tuple[str, nn.Module]]", root.named_modules(remove_duplicate=remove_duplicate))


def stand_in(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another; what happens to the other's input happens to its input too.

    Returns:
        The other, to be put back by ``set_submodule``.
    """
    original = root.get_submodule(name)
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(module, hooks, getattr(original, hooks).copy())
    root.set_submodule(name, module)
    return original


def find_blocks(model: nn.Module, aside: Collection[str] = ()) -> str:
    """Dotted name of the list of decoder blocks: the ``ModuleList`` that holds the most parameters.

    Lists inside another list (experts inside a block) do not count.

    Args:
        aside: modules that are known to hold no decoder blocks, such as the tower of another modality.

    Raises:
        InvalidModelError: the model has no such list.
    """
    candidates: dict[str, int] = {}
    for name, module in named_modules(model):
        inside = any(name == other or name.startswith(f"{other}.") for other in (*candidates, *aside))
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            candidates[name] = sum(parameter.numel() for parameter in module.parameters())
    if not candidates or not max(candidates.values()):
        raise InvalidModelError(
            f"{type(model).__name__} has no list of decoder blocks", remedy="write an adapter that names it"
        )
    return max(candidates, key=lambda name: candidates[name])

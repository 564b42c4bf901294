"""Running parts of a model in float32, whatever they are stored in, with one of their matrices in memory at a time.

What two forms of a model compute can be compared closely only in a dtype that rounds little, but a copy of a block in
float32 may be more than fits. So a linear is given its weight when it is called, and loses it when it has answered. At
other times it has a weight that is made when something computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slim_core.checkpoint.source import LazyTensor
from slim_core.model.suspended import BlockCall

__all__ = ["OnDemand", "hidden_of", "widened", "with_hidden"]


class OnDemand(nn.Parameter):
    """The weight of a linear that is not running. It has a shape and a dtype; who computes with it gets the values.

    Some models do so without calling the linear. With a plain tensor on ``meta`` they would not fail: products of
    ``meta`` and the CPU read memory that nobody has written.
    """

    make: Callable[[], Tensor]

    @classmethod
    def of(cls, shape: tuple[int, ...], make: Callable[[], Tensor]) -> OnDemand:
        """A weight of this shape, in float32, and what makes its values."""
        weight = cls(torch.empty(shape, device="meta"), requires_grad=False)
        weight.make = make
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asked = getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore
            if asked in _OUTWARD:
                return func(*args, **(kwargs or {}))
            return func(*_values(args), **_values(kwargs or {}))


_OUTWARD = frozenset(
    [
        *("shape", "size", "dim", "ndim", "numel", "dtype", "layout", "is_floating_point"),
        *("requires_grad", "is_leaf", "grad", "grad_fn", "_backward_hooks"),
    ]
)
"""What can be said of a weight without its values."""


def _values(given: Any) -> Any:
    return tree_map_only(OnDemand, lambda weight: weight.make(), given)


@contextmanager
def widened(
    root: nn.Module, values: Mapping[str, LazyTensor], first_rows: Mapping[str, int] | None = None
) -> Generator[None]:
    """Within this context parameters and buffers of a model are float32.

    Args:
        values: by parameter name, where the values are.
        first_rows: parameters of which only so many rows are needed; that is then their length.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    paddings: list[tuple[nn.Embedding, int]] = []
    handles: list[Any] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            module = root.get_submodule(path)
            kept.append((module, leaf, getattr(module, leaf)))
            count = (first_rows or {}).get(name)
            if isinstance(module, nn.Embedding) and count is not None and (module.padding_idx or 0) >= count:
                paddings.append((module, module.padding_idx or 0))
                module.padding_idx = None  # pyright: ignore[reportAttributeAccessIssue]
            if leaf == "weight" and isinstance(module, nn.Linear):
                handles += _on_call(module, value, count)
            else:
                _assign(module, leaf, _wide(value, count))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, leaf, before in kept:
            setattr(module, leaf, before)
        for embedding, padding in paddings:
            embedding.padding_idx = padding


def _on_call(linear: nn.Linear, value: LazyTensor, count: int | None) -> list[Any]:
    """Hooks that give a linear its weight while it runs."""
    shape = value.shape if count is None else (min(count, value.shape[0]), *value.shape[1:])
    empty = OnDemand.of(tuple(shape), lambda: _wide(value, count))
    linear.weight = empty

    def give(_module: nn.Module, _args: Any) -> None:
        _assign(linear, "weight", _wide(value, count))

    def take(_module: nn.Module, _args: Any, _output: Any) -> None:
        linear.weight = empty
        value.release()

    return [linear.register_forward_pre_hook(give), linear.register_forward_hook(take)]


def _wide(value: LazyTensor, count: int | None) -> Tensor:
    stored = value.rows(0, value.shape[0] if count is None else count) if value.shape else value.load()
    return stored.float() if stored.is_floating_point() else stored


def _assign(module: nn.Module, leaf: str, value: Tensor) -> None:
    before = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value)


def with_hidden(call: BlockCall, hidden: Callable[[Tensor], Tensor]) -> BlockCall:
    """The same call in float32, with its hidden states replaced; they are the first thing that a block is given."""
    args, kwargs = _floats(call.args), _floats(call.kwargs)
    if args:
        return replace(call, args=(hidden(args[0]), *args[1:]), kwargs=kwargs)
    return replace(call, kwargs={**kwargs, "hidden_states": hidden(kwargs["hidden_states"])})


def hidden_of(call: BlockCall) -> Tensor | None:
    """The hidden states that a block is called with, None if they are not where they should be."""
    found = call.args[0] if call.args else call.kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def _floats(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)

"""Building a model without its weights.

Parameters are created on the ``meta`` device; buffers are real, because what a model computes in its constructor
(rotary frequencies, position tables) is in no checkpoint and must be kept.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from slim_core.errors import InvalidModelError

__all__ = ["find_blocks", "named_modules", "parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Within this context every parameter that a module registers goes to ``meta`` at once."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def named_modules(root: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``root`` and itself, by dotted name; one that has two names only once unless asked."""
    return cast("Iterator[tuple[str, nn.Module]]", root.named_modules(remove_duplicate=remove_duplicate))


def find_blocks(model: nn.Module) -> str:
    """Dotted name of the list of decoder blocks: the ``ModuleList`` that holds the most parameters.

    Lists inside another list (experts inside a block) do not count.

    Raises:
        InvalidModelError: the model has no such list.
    """
    candidates: dict[str, int] = {}
    for name, module in named_modules(model):
        inside = any(name.startswith(f"{other}.") for other in candidates)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            candidates[name] = sum(parameter.numel() for parameter in module.parameters())
    if not candidates or not max(candidates.values()):
        raise InvalidModelError(
            f"{type(model).__name__} has no list of decoder blocks", remedy="write an adapter that names it"
        )
    return max(candidates, key=lambda name: candidates[name])

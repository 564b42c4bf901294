"""Feed-forward parts of blocks, given some tokens at a time, so that what is wide inside them never gets long.

A part counts if what it makes of a token depends on nothing else: that is tried on numbers once its weights are there.
Portions are of one size on every device of a kind, whatever the memory, so that results do not depend on that; beside
a forward in one piece they may differ in the last bit, where a library adds products up in another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.model.units import LinearInfo

__all__ = ["FeedForward", "Portions", "feed_forwards", "portion_tokens"]

_BYTES, _DEVICE_BYTES = 16 << 20, 256 << 20
_TOKENS, _SOME = 24, 11
# Far above what rounding to bfloat16 does to a sum of products, far below what a missing half of the tokens does.
_TOLERANCE = 2.0**-5


@dataclass(frozen=True)
class FeedForward:
    """A module of a block that looks like a function of single tokens.

    Args:
        name: of the module.
        width: channels of its input.
        widest: channels of the widest input or output of its linears.
        linears: their names.
    """

    name: str
    width: int
    widest: int
    linears: frozenset[str]


def feed_forwards(
    root: nn.Module, unit: str, linears: Iterable[LinearInfo], apart: Collection[str]
) -> list[FeedForward]:
    """The modules of a unit, itself left out, that are given one tensor and widen it; the outermost such ones.

    Args:
        apart: linears that must not be in them, such as those of experts, to whom tokens are handed one by one anyway.
    """
    mixed = {parent for name in apart for parent in _parents(name, unit)}
    inside: dict[str, list[LinearInfo]] = {}
    for info in linears:
        for parent in _parents(info.name, unit) if info.name not in apart else ():
            inside.setdefault(parent, []).append(info)
    found: list[FeedForward] = []
    for name, own in sorted(inside.items(), key=lambda item: len(item[0])):
        width, widest = own[0].in_features, max(max(info.in_features, info.out_features) for info in own)
        if name in mixed or len(own) < 2 or widest <= width:
            continue
        if any(name.startswith(f"{part.name}.") for part in found) or not _takes_one(root.get_submodule(name)):
            continue
        found.append(FeedForward(name, width, widest, frozenset(info.name for info in own)))
    return found


def _parents(linear: str, unit: str) -> Generator[str]:
    """The modules between a unit and a linear; none if it is not inside the unit."""
    parts = linear.split(".") if linear.startswith(f"{unit}.") else []
    return (".".join(parts[:end]) for end in range(unit.count(".") + 2, len(parts)))


def _takes_one(module: nn.Module) -> bool:
    """Whether it can be called with one tensor."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    try:
        signature = inspect.signature(type(module).forward)
        signature.bind(module, torch.empty(0))
    except (TypeError, ValueError):
        return False
    return True


def portion_tokens(widest: int, device: str) -> int:
    """How many tokens a part is given at a time: what takes 16 MiB on the CPU, elsewhere 256, in half precision."""
    return max(1, (_BYTES if device == "cpu" else _DEVICE_BYTES) // (widest * 2))


class Portions:
    """The parts of blocks that were tried, and what they were found to be.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._tried: dict[tuple[Any, ...], frozenset[int]] = {}
        self._parts: list[tuple[FeedForward, frozenset[int]]] = []

    def choose(self, parts: Iterable[FeedForward]) -> None:
        """Settle which parts of a block, whose weights are loaded, are given portions, and with how many dimensions.

        What it is given does not matter, so that it is the same for whoever runs whichever samples.
        """
        self._parts = []
        for part in parts:
            module = self._root.get_submodule(part.name)
            key = type(module), part.width, part.widest
            if key not in self._tried:
                self._tried[key] = frozenset(d for d in (2, 3) if _sees_single_tokens(module, part.width, d))
            if self._tried[key]:
                self._parts.append((part, self._tried[key]))

    @contextmanager
    def given(self) -> Generator[None]:
        """Within this context the chosen parts are given some tokens at a time."""
        modules = [(self._root.get_submodule(part.name), part, dims) for part, dims in self._parts]
        shadowed = [vars(module).get("forward") for module, *_ in modules]
        for module, part, dims in modules:
            module.forward = _in_portions(module.forward, part.widest, dims)  # shadows the method of the class
        try:
            yield
        finally:
            for (module, *_), forward in zip(modules, shadowed, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _in_portions(real: Callable[..., Any], widest: int, dims: Collection[int]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dim() not in dims or torch.is_grad_enabled():
            return real(*args, **kwargs)
        step = max(1, portion_tokens(widest, x.device.type) // max(x.shape[:-2].numel(), 1))
        if x.shape[-2] <= step:
            return real(x)
        some: Tensor = real(x[..., :step, :])
        result = some.new_empty(*x.shape[:-1], some.shape[-1])
        result[..., :step, :] = some
        for start in range(step, x.shape[-2], step):
            del some  # before the next one is made
            some = real(x[..., start : start + step, :])
            result[..., start : start + step, :] = some
        return result

    return forward


def _sees_single_tokens(module: nn.Module, width: int, dims: int) -> bool:
    """Whether some of the tokens, in another order, give what they give among all."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(module.parameters())
    x = torch.randn(*[1] * (dims - 2), _TOKENS, width, generator=generator).to(parameter.device, parameter.dtype)
    some = torch.randperm(_TOKENS, generator=generator)[:_SOME]
    try:
        with torch.no_grad():
            whole: Any = module(x)
            part: Any = module(x[..., some, :])
    except Exception:  # noqa: BLE001 - code of others, which may ask for more than numbers
        return False
    if not isinstance(whole, Tensor) or not isinstance(part, Tensor) or whole.shape[:-1] != x.shape[:-1]:
        return False
    want = whole[..., some, :]
    if part.shape != want.shape:
        return False
    error = (part.float() - want.float()).square().sum()
    return bool(error <= _TOLERANCE**2 * want.float().square().sum())

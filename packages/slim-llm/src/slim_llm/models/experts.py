"""Mixtures of experts whose weights transformers stacks into 3-D parameters, taken apart into linears.

The experts module stays what it is: its class, its other parameters, its own forward. Only the stacked parameters go,
and in their place stand objects that compute ``x @ W[expert]`` with the linears of that expert. So routing, activation,
clamping, weighting and summing are the library's code, whatever the family, and the linears are ordinary ones: named
as the checkpoint and the engines name them, found by recipes, observed, quantized and simulated like all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim_core.checkpoint.stacked import is_transposed
from slim_core.errors import UnsupportedError
from slim_core.model.linears import keep_float
from slim_core.model.skeleton import named_modules
from slim_llm.models.expert_stacks import Biases, Matrices, Stack, run_expert_by_expert
from slim_llm.models.row_sums import QuickRowSums

__all__ = ["ExpertsApart", "Spelling", "experts_apart", "find_experts", "take_experts_apart"]

Spelling = Callable[[str, int], Sequence[str] | None]
"""Given the full name of a stacked parameter and how many linears are fused in it: what the checkpoint calls them."""
_Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ExpertsApart:
    """What was taken apart: the stacks of a module and how many experts have weights."""

    count: int
    stacks: tuple[Stack, ...]


def take_experts_apart(model: nn.Module, spelling: Spelling) -> None:
    """Replace the stacked parameters of every experts module by linears on ``meta``, and mark the routers beside them.

    Raises:
        UnsupportedError: a module of stacked experts has a structure that is not known.
    """
    for name, module in list(named_modules(model)):
        found = find_experts(name, module, spelling)
        if found is not None:
            _take_apart(module, found)
        parent, _, leaf = name.rpartition(".")
        if found is not None or leaf == "experts":
            _mark_routers(model.get_submodule(parent), ("gate", "router"))
        elif leaf.endswith("router"):
            _mark_routers(module, ("",))


def experts_apart(model: nn.Module) -> Iterator[tuple[str, ExpertsApart]]:
    """The modules that were taken apart, by name."""
    for name, module in named_modules(model):
        if isinstance(module, _Apart):
            yield name, module.apart


def find_experts(name: str, module: nn.Module, spelling: Spelling) -> ExpertsApart | None:
    """What the stacked parameters of a module mean, None if it is no module of stacked experts.

    Known are a gated pair ``gate_up_proj`` and ``down_proj``, a plain pair ``up_proj`` and ``down_proj``, also with a
    ``gate_proj`` of its own, and a single ``weight`` of a class of parallel experts. Which way round the matrices lie
    follows from their shapes.

    Raises:
        UnsupportedError: it holds stacked experts of another structure; says the class and the parameter.
    """
    own = dict(module.named_parameters(recurse=False))
    shapes = {key: cast("_Shape", tuple(value.shape)) for key, value in own.items() if value.dim() == 3}
    if not shapes or isinstance(module, _Apart):
        return None
    fused = _linears(module, shapes)
    if fused is None:
        if "expert" in f"{type(module).__name__}.{name.rpartition('.')[2]}".lower():
            raise _unknown(name, module, next(iter(shapes)), shapes)
        return None
    turned, last = _is_turned(module, shapes), list(fused)[-1]
    count = shapes[last][0]
    # Identity experts have no weights; one family gives them rows in the first parameter all the same.
    surplus = [key for key, shape in shapes.items() if shape[0] != count]
    if turned is None or (surplus and not (_has_identities(module) and all(shapes[key][0] > count for key in surplus))):
        raise _unknown(name, module, last, shapes)
    stacks: list[Stack] = []
    for key, linears in fused.items():
        bias = f"{key}_bias" if f"{key}_bias" in own else None
        if bias and own[bias].shape != (shapes[key][0], shapes[key][2 if turned else 1]):
            raise _unknown(name, module, bias, {bias: tuple(own[bias].shape)} | shapes)
        spelt = tuple(spelling(f"{name}.{key}", len(linears)) or linears)
        interleaved = len(linears) > 1 and getattr(module, "is_concatenated", True) is False
        stacks.append(Stack(key, shapes[key], spelt, own[key].dtype, turned, interleaved, bias))
    return ExpertsApart(count, tuple(stacks))


def _linears(module: nn.Module, shapes: dict[str, _Shape]) -> dict[str, tuple[str, ...]] | None:
    """The linears that are fused in each stacked parameter, None if the parameters are not known ones."""
    cls = type(module).__name__
    match sorted(shapes):
        case ["down_proj", "gate_up_proj"]:
            return {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        case ["down_proj", "up_proj"] | ["down_proj", "gate_proj", "up_proj"] if "Experts" in cls:
            return {key: (key,) for key in ("gate_proj", "up_proj", "down_proj") if key in shapes}
        case ["weight"] if "Experts" in cls and getattr(module, "num_experts", None) == shapes["weight"][0]:
            return {"weight": ("",)}
        case _:
            return None


def _is_turned(module: nn.Module, shapes: dict[str, _Shape]) -> bool | None:
    """Whether the matrices are ``(in, out)``, None if they do not fit together or the class says otherwise."""
    said: bool | None = getattr(module, "is_transposed", None)
    if "gate_up_proj" in shapes:
        turned = is_transposed(shapes["gate_up_proj"][1:], shapes["down_proj"][1:])
        return turned if said in (None, turned) else None
    ways_in = [shapes[key] for key in ("gate_proj", "up_proj") if key in shapes]
    if any(shape[1:] != shapes["down_proj"][:0:-1] for shape in ways_in):
        return None
    return bool(said)


def _has_identities(module: nn.Module) -> bool:
    return bool(getattr(module, "zero_expert_num", 0)) and any(isinstance(m, nn.Identity) for m in module.children())


def _unknown(name: str, module: nn.Module, parameter: str, shapes: dict[str, Any]) -> UnsupportedError:
    sizes = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
    return UnsupportedError(
        f"{type(module).__name__} stacks its experts in a way that is not known here, see parameter {parameter!r} "
        f"({sizes})",
        where=name,
        remedy="use a version of Slim that knows this family, or report it",
    )


class _Apart:
    """Mixed into the class of a module that was taken apart."""

    apart: ExpertsApart


def _take_apart(module: nn.Module, found: ExpertsApart) -> None:
    for expert in range(found.count):
        parts = {linear: _linear(stack) for stack in found.stacks for linear in stack.linears}
        holder = parts.pop("", None) or nn.Module()
        for linear, part in parts.items():
            holder.add_module(linear, part)
        module.add_module(str(expert), holder)
    # Where the library may swap the forward for a kernel over all experts, it wraps it, and leaves its settings here.
    module.__class__ = _class_apart(type(module), swapped=hasattr(module, "is_concatenated"))
    module.__dict__["apart"] = found
    for stack in found.stacks:
        delattr(module, stack.parameter)
        module.__dict__[stack.parameter] = Matrices(module, stack)
        if stack.bias is not None:
            delattr(module, stack.bias)
            module.__dict__[stack.bias] = Biases(module, stack)


def _linear(stack: Stack) -> nn.Linear:
    """A linear on ``meta``, made without drawing random numbers: there may be tens of thousands."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = stack.in_features, stack.out_features
    shapes = {"weight": (stack.out_features, stack.in_features), "bias": (stack.out_features,)}
    for key, shape in shapes.items():
        empty = None
        if key == "weight" or stack.bias is not None:
            empty = nn.Parameter(torch.empty(shape, dtype=stack.dtype, device="meta"), requires_grad=False)
        linear.register_parameter(key, empty)
    return linear


@cache
def _class_apart(cls: type[nn.Module], *, swapped: bool) -> type[nn.Module]:
    """The class of an experts module, with the forward that its author wrote: indexing the stacks expert by expert."""
    written: Callable[..., Any] = getattr(cls.forward, "__wrapped__", cls.forward) if swapped else cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with QuickRowSums():
            return written(self, *args, **kwargs)

    def forward_in_turn(self: Any, hidden_states: Tensor) -> Tensor:
        return run_expert_by_expert(self, written, self.apart.count, hidden_states)

    takes_all_tokens = len(inspect.signature(written).parameters) == 2  # self and the hidden states, no routing
    return type(f"{cls.__name__}Apart", (_Apart, cls), {"forward": forward_in_turn if takes_all_tokens else forward})


def _mark_routers(root: nn.Module, called: Collection[str]) -> None:
    """Keep the routers among the linears of a mixture of experts as they are; known by what they are called.

    Engines want them in floating point, and a small error in one picks another expert.

    Args:
        called: the name of a module, or of one that holds it, if it routes; an empty one stands for the root.
    """
    for name, module in named_modules(root):
        parts = name.split(".")
        routes = "" in called or not set(called).isdisjoint(parts) or parts[-1].endswith("_gate")
        if routes and isinstance(module, nn.Linear):
            keep_float(module)

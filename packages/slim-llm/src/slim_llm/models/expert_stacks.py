"""What stands in the place of stacked expert parameters, so that the forward that indexes them runs the linears that
they were taken apart into.

The forward of an experts module reads ``linear(x, self.gate_up_proj[expert])``. Here ``gate_up_proj`` hands out an
object that answers to torch's functions (``__torch_function__``): a product with it calls the linears of that expert
and puts their outputs together as the stacked matrix would have. Any other use is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slim_core.errors import UnsupportedError

__all__ = ["Biases", "Matrices", "Stack", "run_expert_by_expert"]

_MATMULS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)
_SUMS = (torch.add, Tensor.add, Tensor.__add__)


@dataclass(frozen=True)
class Stack:
    """One stacked parameter.

    Args:
        parameter: its name in the module.
        shape: as transformers has it: ``(experts, out, in)``, or ``(experts, in, out)`` if transposed.
        linears: those that are fused in its output features, in order; an empty name stands for the expert itself.
        interleaved: their output features alternate instead of lying side by side.
        bias: name of the stacked biases ``(experts, out)``, None if there are none.
    """

    parameter: str
    shape: tuple[int, int, int]
    linears: tuple[str, ...]
    dtype: torch.dtype
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None

    @property
    def in_features(self) -> int:
        return self.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        """Of each of the linears."""
        return self.shape[2 if self.transposed else 1] // len(self.linears)


class _StandIn:
    """What stands for a tensor of a stack, or for a stack; refuses what its kinds do not allow.

    Args:
        module: the experts module.
        stack: which of its stacks.
    """

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        self._module = module
        self._stack = stack

    def _cannot(self, what: Any) -> UnsupportedError:
        cls = type(self._module).__name__.removesuffix("Apart")
        text = f"{cls} uses {self._stack.parameter!r} in a way that is not known here ({what})"
        return UnsupportedError(text, remedy="use a version of Slim that knows this family, or report it")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else self._cannot(name)

    def _refuse(self, *_: Any) -> Any:
        raise self._cannot("arithmetic")

    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __neg__ = _refuse

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function of torch, None if it is not allowed."""
        return None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, _StandIn)]
        for one in given:
            if (answer := one._answer(func, args, kwargs)) is not None:
                return answer
        raise given[0]._cannot(getattr(func, "__name__", func)) if given else TypeError(func)


class Matrices(_StandIn):
    """Stands where a stacked parameter stood."""

    def __init__(self, module: nn.Module, stack: Stack, only: int | None = None, *, turned: bool = False) -> None:
        super().__init__(module, stack)
        self._only = only
        self._turned = turned
        count, *matrix = stack.shape
        self.shape = torch.Size((count if only is None else 1, *(matrix[::-1] if turned else matrix)))
        self.dtype = stack.dtype

    def dim(self) -> int:
        return len(self.shape)

    def only(self, expert: int) -> Matrices:
        """A stack of this expert alone."""
        return Matrices(self._module, self._stack, expert, turned=self._turned)

    def transpose(self, dim0: int, dim1: int) -> Matrices:
        """The stack with all its matrices transposed."""
        if {dim0 % 3, dim1 % 3} != {1, 2}:
            raise self._cannot(f"transpose({dim0}, {dim1})")
        return Matrices(self._module, self._stack, self._only, turned=not self._turned)

    def __getitem__(self, expert: Any) -> _Matrix:
        if self._turned:
            raise self._cannot("one matrix of the transposed stack")
        return _Matrix(self._module, self._stack, int(expert))

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in _MATMULS or len(args) != 2 or args[1] is not self:
            return None
        if self._only is not None:
            return self._matrix(self._only).multiply(args[0], transposed=not self._turned)
        x = args[0]
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[0] != self.shape[0]:
            return None
        # Every expert is given all tokens, and its own: none is routed (shared experts).
        parts = [self._matrix(expert).multiply(rows, transposed=not self._turned) for expert, rows in enumerate(x)]
        return torch.stack(parts)

    def _matrix(self, expert: int) -> _Matrix:
        return _Matrix(self._module, self._stack, expert)


class _Matrix(_StandIn):
    """The matrix of one expert."""

    def __init__(self, module: nn.Module, stack: Stack, expert: int) -> None:
        super().__init__(module, stack)
        self._expert = expert

    def multiply(self, x: Tensor, *, transposed: bool) -> Tensor:
        """``x @ W`` if the matrix is stored transposed, else ``x @ W.T``; with the biases, if there are any."""
        stack = self._stack
        if transposed is not stack.transposed:
            raise self._cannot("a product with its transpose")
        if not x.numel():
            return x.new_empty(*x.shape[:-1], stack.out_features * len(stack.linears))
        expert = self._module.get_submodule(str(self._expert))
        outputs = [(expert.get_submodule(linear) if linear else expert)(x) for linear in stack.linears]
        if len(outputs) == 1:
            return outputs[0]
        return torch.stack(outputs, -1).flatten(-2) if stack.interleaved else torch.cat(outputs, -1)

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) < 2 or args[1] is not self or not isinstance(args[0], Tensor):
            return None
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if func is functional.linear and (bias is None or isinstance(bias, _Bias)):
            return self.multiply(args[0], transposed=False)
        return self.multiply(args[0], transposed=True) if func in _MATMULS and len(args) == 2 else None


class Biases(_StandIn):
    """Stands where stacked biases stood."""

    def __getitem__(self, expert: Any) -> _Bias:
        return _Bias(self._module, self._stack)


class _Bias(_StandIn):
    """The bias of one expert: adding it does nothing, because the linears have added it."""

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if func in _SUMS and len(args) == 2 and isinstance(args[0], Tensor) and not kwargs else None


class _OneExpert:
    """An experts module that has a single expert."""

    def __init__(self, module: nn.Module, expert: int) -> None:
        self._module = module
        self._expert = expert

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return found.only(self._expert) if isinstance(found, Matrices) else found


def run_expert_by_expert(
    module: nn.Module, forward: Callable[..., Tensor], count: int, hidden_states: Tensor
) -> Tensor:
    """Run a forward that gives every expert all tokens, those that are not routed to it multiplied by zero (Llama 4).

    Such rows come out as zeros, since there are no biases; only the others are computed.

    Args:
        forward: of the experts module, as its author wrote it.
        hidden_states: ``(count * tokens, hidden)``.
    """
    given = hidden_states.view(count, -1, hidden_states.shape[-1])
    outputs = torch.zeros_like(given)
    for expert, rows in enumerate(given):
        hit = (rows != 0).any(-1).nonzero().flatten()
        if len(hit):
            outputs[expert, hit] = forward(_OneExpert(module, expert), rows[hit])
    return outputs.view_as(hidden_states)

"""Tokens that pass a layer of experts, kept to be shown to experts that the router did not choose for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.logging import get_logger
from slim_core.model.experts import ExpertLayer

__all__ = ["RoutedTokens"]

_logger = get_logger(__name__)
_Call = Callable[[int, Tensor], Any]
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


class RoutedTokens:
    """Evenly spread over all tokens that pass, some are kept with the experts they went to.

    A layer can be asked to compute one expert alone if it is called with tokens, chosen experts and their weights; if
    it was taken apart and is called with all tokens once for every expert; or if its experts are modules that take
    tokens and nothing else. With others nothing is kept, and :meth:`route` does nothing.

    Args:
        wanted: how many tokens to keep, at least, if so many pass.
        total: how many will pass.
    """

    def __init__(self, model: nn.Module, layer: ExpertLayer, wanted: int, total: int) -> None:
        self.layer = layer
        self._wanted = wanted
        self._stride = max(1, total // (2 * wanted))  # twice as many, because some have been to the expert that asks
        self._passed = 0
        self._rows: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._call: _Call | None = None
        self._module = model.get_submodule(layer.name)
        self._handles: list[Any] = []
        if type(self._module).forward is not nn.Module.forward:
            self._handles.append(self._module.register_forward_pre_hook(self._see_layer, with_kwargs=True))
        else:
            for number in layer.experts:
                expert = self._module.get_submodule(str(number))
                if _takes_tokens_alone(expert):
                    see = partial(self._see_expert, number)
                    self._handles.append(expert.register_forward_pre_hook(see))

    def stop(self) -> None:
        """Keep no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        hidden = next((key for key, value in tensors.items() if value.is_floating_point()), None)
        if hidden is None or tensors[hidden].dim() != 2:
            return
        rows = tensors.pop(hidden)
        if not tensors and hasattr(module, "apart") and len(given) == 1:
            self._see_all(rows)
            return
        index = next((key for key, value in tensors.items() if not value.is_floating_point()), None)
        if index is None or len(tensors) != 2 or any(t.dim() != 2 or len(t) != len(rows) for t in tensors.values()):
            return
        chosen = tensors.pop(index)
        weights, values = next(iter(tensors.items()))
        experts = max(max(self.layer.experts) + 1, int(chosen.max()) + 1 if chosen.numel() else 0)
        went = torch.zeros(len(rows), experts, dtype=torch.bool, device=rows.device)
        went.scatter_(1, chosen.clamp(min=0).long(), True)
        if self._call is None:
            whole = values.shape[1] if values.shape[1] != chosen.shape[1] else None  # weights of all experts
            given |= {hidden: None, index: chosen[:1, :1].clone(), weights: values[:1, :1].clone()}
            self._call = partial(_call_layer, module, given, hidden, index, weights, whole)
        self._keep(rows, went)

    def _see_all(self, rows: Tensor) -> None:
        """The layer is given all tokens once for every expert, those of other experts as zeros."""
        count = len(self.layer.experts)
        if len(rows) % count:
            return
        given = rows.view(count, -1, rows.shape[-1])
        went = (given != 0).any(-1).T
        best = given.abs().sum(-1, dtype=torch.float32).argmax(0)
        if self._call is None:
            self._call = partial(_call_with_zeros, self._module, list(self.layer.experts))
        self._keep(given[best, torch.arange(given.shape[1], device=rows.device)], went)

    def _see_expert(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        rows = args[0].reshape(-1, args[0].shape[-1])
        went = torch.zeros(len(rows), max(self.layer.experts) + 1, dtype=torch.bool, device=rows.device)
        went[:, number] = True
        self._call = partial(_call_expert, self._module)
        self._keep(rows, went)

    def _keep(self, rows: Tensor, went: Tensor) -> None:
        first = min(-self._passed % self._stride, len(rows))
        picked = torch.arange(first, len(rows), self._stride, device=rows.device)
        self._passed += len(rows)
        if len(picked):
            self._rows.append(rows[picked].detach().clone())
            self._chosen.append(went[picked])

    def route(self, expert: int, count: int) -> None:
        """Run an expert on so many of the tokens kept that did not go to it, or on all of them if there are fewer."""
        if self._call is None or not self._rows:
            return
        widest = max(part.shape[1] for part in self._chosen)
        chosen = torch.cat([nn.functional.pad(part, (0, widest - part.shape[1])) for part in self._chosen])
        others = (~chosen[:, expert]).nonzero().flatten()
        if len(others) > count:  # evenly spread again
            others = others[torch.arange(count, device=others.device) * len(others) // count]
        if not len(others):
            return
        try:
            self._call(expert, torch.cat(self._rows)[others])
        except _REFUSALS as error:  # it is code of others, asked for what it was perhaps not made for
            _logger.warning("%s cannot be asked to compute one expert alone: %s", self.layer.name, error)
            self._call = None


def _call_layer(
    module: nn.Module,
    given: dict[int | str, Any],
    hidden: int | str,
    index: int | str,
    weights: int | str,
    whole: int | None,
    expert: int,
    rows: Tensor,
) -> None:
    if whole is None:
        values = torch.ones_like(given[weights]).repeat(len(rows), 1)
    else:
        values = torch.zeros_like(given[weights]).repeat(len(rows), whole)
        values[:, expert] = 1
    chosen = torch.full_like(given[index], expert).repeat(len(rows), 1)
    full = {**given, hidden: rows, index: chosen, weights: values}
    keywords = {key: value for key, value in full.items() if isinstance(key, str)}
    module(*(value for key, value in full.items() if isinstance(key, int)), **keywords)


def _call_with_zeros(module: nn.Module, experts: list[int], expert: int, rows: Tensor) -> None:
    given = rows.new_zeros(len(experts), *rows.shape)
    given[experts.index(expert)] = rows
    module(given.flatten(0, 1))


def _call_expert(module: nn.Module, expert: int, rows: Tensor) -> None:
    module.get_submodule(str(expert))(rows)


def _takes_tokens_alone(expert: nn.Module) -> bool:
    """Whether a module can be called with a tensor and nothing else; a single linear knows nothing of what follows."""
    if isinstance(expert, nn.Linear) or type(expert).forward is nn.Module.forward:
        return False
    parameters = inspect.signature(expert.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1

"""The weights of routed experts, in memory only while their expert is at work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.memory import give_back_freed_memory
from slim_core.model.experts import ExpertLayer, expert_layers
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit
from slim_core.model.weights import UnitWeights

__all__ = ["ExpertsOnCall", "ReadInTurn", "loaded", "parameters_of_experts"]

_Key = tuple[str, int]
# Experts after which the C library is told to return what it keeps of the activations that were freed.
_TRIMMED_AFTER = 64


def parameters_of_experts(layers: Iterable[ExpertLayer], known: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The parameters of the linears of routed experts: whose they are, as the name of the layer and a number.

    Args:
        known: the parameters of the unit.
    """
    owner = {
        name: (layer.name, number)
        for layer in layers
        for number, linears in layer.experts.items()
        for name in linears.values()
    }
    found = ((name, owner.get(name.rpartition(".")[0])) for name in known)
    return {name: key for name, key in found if key is not None}


class ExpertsOnCall:
    """A context in which the linears of an expert get their parameters when the first of them is called, and lose them
    when a linear of another expert is called: one expert at a time is in memory.

    Nothing that is computed changes. Experts are to be unloaded when this begins, and are so again when it ends.

    Args:
        layers: the layers of experts of a unit.
        parameters: the parameters of that unit, those that it was given in addition included.
        device: where the block computes.
    """

    def __init__(
        self, model: StreamedModel, layers: Iterable[ExpertLayer], parameters: Iterable[str], device: torch.device
    ) -> None:
        self._model = model
        self._layers = tuple(layers)
        self._device = device
        self.owners = parameters_of_experts(self._layers, parameters)
        """All parameters that come and go: whose they are."""
        self._members: dict[_Key, list[str]] = {}
        for name, key in self.owners.items():
            self._members.setdefault(key, []).append(name)
        self._now: _Key | None = None
        self._left = 0
        self._handles: list[Any] = []
        self.weights: UnitWeights | None = None
        """Where the parameters are as processors left them, once there is such a thing."""
        self._changes: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def __enter__(self) -> ExpertsOnCall:
        for layer in self._layers:
            for number, linears in layer.experts.items():
                for name in linears.values():
                    enter = partial(self._enter, (layer.name, number))
                    linear = self._model.module.get_submodule(name)
                    self._handles.append(linear.register_forward_pre_hook(enter, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.leave()

    def _enter(self, key: _Key, module: nn.Module, args: Any, kwargs: Any) -> None:
        # What stands in for a quantized linear needs no weight.
        if key != self._now and isinstance(module, nn.Linear):
            self.leave()
            self._now = key
            self._load(self._members.get(key, ()))

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            path = name.rpartition(".")[0]
            if not isinstance(self._model.module.get_submodule(path), nn.Linear):
                continue
            if self.weights is not None and name in self.weights and self.weights[name].edited:
                self.weights.hand_over(name)
            else:
                self._model.load((name,), self._device)
            if (change := self._changes.get(name)) is not None:
                value = change(self._model.module.get_parameter(name))
                setattr(self._model.module.get_submodule(path), name.rpartition(".")[2], nn.Parameter(value, False))

    @contextmanager
    def changed(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Generator[None]:
        """Within this context parameters are changed when they are read."""
        self.leave()
        self._changes = changes
        try:
            yield
        finally:
            self.leave()
            self._changes = {}

    def leave(self) -> None:
        """Give back the expert that was called last."""
        if self._now is not None:
            root = self._model.module
            held = [n for n in self._members.get(self._now, ()) if isinstance(root.get_submodule(_path(n)), nn.Linear)]
            self._now = None
            self._model.unload(held)
            self._left += 1
            if not self._left % _TRIMMED_AFTER:
                give_back_freed_memory()


@contextmanager
def loaded(
    model: StreamedModel, unit: Unit, device: torch.device, *, by_expert: bool
) -> Generator[ExpertsOnCall | None]:
    """Within this context a block has its parameters, those of routed experts while they are called if that is asked.

    Yields:
        Its experts on call; None if it has none, or nobody asked.
    """
    layers = expert_layers(model.module, unit.linears) if by_expert else []
    with ExpertsOnCall(model, layers, unit.parameters, device) as on_call:
        now = [name for name in unit.parameters if name not in on_call.owners]
        model.load(now, device)
        try:
            yield on_call if layers else None
        finally:
            model.unload(now)


class ReadInTurn:
    """A source that has the tensors of one expert at a time in memory: reading those of another gives them back.

    Args:
        owners: by tensor, whose it is; all others are read as ever.
    """

    def __init__(self, inner: TensorSource, owners: Mapping[str, tuple[str, int]]) -> None:
        self._inner = inner
        self._owners = owners
        self._members: dict[_Key, list[str]] = {}
        for name, key in owners.items():
            self._members.setdefault(key, []).append(name)
        self._now: _Key | None = None
        self._lock = threading.Lock()

    def _turn_to(self, name: str) -> None:
        key = self._owners.get(name)
        with self._lock:
            before, self._now = self._now, key or self._now
        if key is not None and before not in (None, key):
            self._inner.release(self._members[before])

    def __contains__(self, name: object) -> bool:
        return name in self._inner

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def meta(self, name: str) -> TensorMeta:
        return self._inner.meta(name)

    def load(self, name: str) -> Tensor:
        self._turn_to(name)
        return self._inner.load(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self._turn_to(name)
        return self._inner.rows(name, start, stop)

    def stored(self, name: str) -> StoredTensor | None:
        return self._inner.stored(name)

    def prefetch(self, names: Iterable[str]) -> None:
        self._inner.prefetch(names)

    def release(self, names: Iterable[str]) -> None:
        self._inner.release(names)

    def release_rows(self, name: str, start: int, stop: int) -> None:
        self._inner.release_rows(name, start, stop)


def _path(name: str) -> str:
    return name.rpartition(".")[0]

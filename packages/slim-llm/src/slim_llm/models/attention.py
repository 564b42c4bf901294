"""The attentions of a transformers model, found by their structure, and the way to their states while they run.

Two places show the states. Attentions of today ask ``AttentionInterface`` for the function that computes them and hand
it query, key and value; that function is wrapped, for attentions that have a tap and for as long as a context lasts.
Older ones are given an empty cache, whose ``update`` shows key and value. Masks and all else stay as they are.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface

from slim_core.errors import SpecError
from slim_core.model.attention import AttentionInfo, States, Tap
from slim_core.model.skeleton import named_modules
from slim_llm.models.attention_info import describe_attention, takes_cache

__all__ = ["Attentions"]

_MARK = "_slim_watch"


class Attentions:
    """The attentions of a model: an :class:`~slim_core.model.attention.AttentionAccess`.

    Args:
        module: the model; its parameters may be on ``meta``.
        tensor_name: turns a parameter name into the checkpoint's name for it.
    """

    def __init__(self, module: nn.Module, tensor_name: Callable[[str], str] = str) -> None:
        self._module = module
        found = [describe_attention(name, child, module, tensor_name) for name, child in named_modules(module)]
        self._infos = {info.name: info for info in found if info is not None}

    @property
    def attentions(self) -> Sequence[AttentionInfo]:
        return tuple(self._infos.values())

    @contextmanager
    def tapped(self, taps: Mapping[str, Tap]) -> Generator[None]:
        """See :meth:`AttentionAccess.tapped`. May be entered by several threads, each with a model of its own.

        Raises:
            SpecError: an attention cannot be reached, or hands on other states than its structure says.
        """
        with ExitStack() as stack:
            for name, tap in taps.items():
                info = self._infos[name]
                if info.problem:
                    raise SpecError(info.problem, where=name, remedy="exclude this attention")
                watch = _Watch(info, tap, self._module.get_submodule(name))
                stack.callback(watch.detach)
                watch.attach()
            if taps:
                stack.enter_context(_interface.wrapped())
            yield


class _Watch:
    """One attention under watch: sees to it that every run of the module passes its tap."""

    def __init__(self, info: AttentionInfo, tap: Tap, module: nn.Module) -> None:
        self.info = info
        self._tap = tap
        self._module = module
        self._handles: list[Any] = []
        self._fired = False
        self._latent: Tensor | None = None

    def attach(self) -> None:
        module = self._module
        module.__dict__[_MARK] = self
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]
        if self.info.latent:
            expand = cast(nn.Module, module.kv_b_proj)
            self._handles.append(expand.register_forward_pre_hook(self._see_latent))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._module.__dict__.pop(_MARK, None)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._fired = False
        if self.info.sees_query:
            return None
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        argument = takes_cache(type(module))
        if argument is not None and call.arguments.get(argument) is None:
            call.arguments[argument] = _EmptyCache(self)
        return call.args, call.kwargs

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._latent = None
        if not self._fired:
            raise SpecError(
                "the attention ran without handing its query, key and value to transformers' attention interface or "
                "to a cache, so they cannot be quantized",
                where=self.info.name,
                remedy="exclude this attention",
            )

    def _see_latent(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        latent: Tensor = args[0]
        self._latent = latent if latent.dim() == 4 else latent.unsqueeze(1)

    def show(self, query: Tensor | None, key: Tensor, value: Tensor) -> States | None:
        """Let the tap see states, once their shapes are known to be those that were promised."""
        self._fired = True
        info = self.info
        wanted = [(key, info.kv_heads, info.key_dim), (value, info.kv_heads, info.value_dim)]
        wanted += [] if query is None else [(query, info.heads, info.key_dim)]
        for state, heads, dim in wanted:
            if state.dim() != 4 or state.shape[1] != heads or state.shape[3] != dim:
                raise SpecError(
                    f"its states have the shape {list(state.shape)}, where {heads} heads of {dim} channels were "
                    "expected (batch, heads, tokens, channels)",
                    where=info.name,
                    remedy="exclude this attention",
                )
        return self._tap(query, key, value)

    def attend(
        self, function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Call the attention function of this module with the states that the tap lets through."""
        if self.info.latent:
            return self._attend_latent(function, query, key, value, *args, **kw)
        states = self.show(query, key, value) or (query, key, value)
        return function(self._module, *states, *args, **kw)

    def _attend_latent(
        self, function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Attend as engines do: in the space of the latent, where keys and values are one head that all share.

        ``score = (q_nope W_UK) c^T + q_rope k_rope^T`` and ``output = (softmax(score) c) W_UV^T``.
        """
        latent = self._latent
        if latent is None:
            return function(self._module, query, key, value, *args, **kw)
        up_key, up_value = self._expansions(query)
        nope = up_key.shape[1]
        states = self.show(query[..., :nope] @ up_key, latent, latent)
        if states is None:
            return function(self._module, query, key, value, *args, **kw)
        absorbed, keys, values = states
        assert absorbed is not None
        every = (-1, key.shape[1], -1, -1)
        output, weights = function(
            self._module,
            torch.cat([absorbed, query[..., nope:]], -1),
            torch.cat([keys.expand(every), key[..., nope:]], -1),
            values.expand(every),
            *args,
            **kw,
        )
        return torch.einsum("bshr,hvr->bshv", output, up_value), weights

    def _expansions(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """``W_UK`` ``(heads, nope, latent)`` and ``W_UV`` ``(heads, value, latent)`` in the dtype of the query."""
        expand = cast(Any, self._module.kv_b_proj)
        nope = cast(int, self._module.qk_nope_head_dim)
        parts = expand.weight.to(query).view(self.info.heads, -1, self.info.key_dim)
        return parts[:, :nope], parts[:, nope:]


class _EmptyCache(DynamicCache):
    """A cache that keeps nothing and shows what it is given."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        states = self._watch.show(None, key_states, value_states)
        return (key_states, value_states) if states is None else states[1:]


class _Interface:
    """Wraps what transformers' attention interface gives, once for all threads and until the last of them is done.

    The wrapped functions look for a watch on the module that calls them; modules without one notice nothing.
    """

    _METHODS = ("get_interface", "__getitem__")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._own: dict[str, Any] = {}

    @contextmanager
    def wrapped(self) -> Generator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._wrap()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def _wrap(self) -> None:
        self._own = {name: vars(AttentionInterface).get(name) for name in self._METHODS}
        for name in self._METHODS:
            setattr(AttentionInterface, name, _watching_result(getattr(AttentionInterface, name)))

    def _restore(self) -> None:
        for name, own in self._own.items():
            if own is None:
                delattr(AttentionInterface, name)
            else:
                setattr(AttentionInterface, name, own)
        self._own.clear()


_interface = _Interface()


def _watching_result(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def found(*args: Any, **kwargs: Any) -> Any:
        function = method(*args, **kwargs)
        return function if isinstance(function, _Watching) else _Watching(function)

    return found


class _Watching:
    """An attention function that goes through the watch of the module it computes for, if there is one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch: _Watch | None = module.__dict__.get(_MARK)
        if watch is None or not watch.info.sees_query:
            return self._function(module, query, key, value, *args, **kwargs)
        return watch.attend(self._function, query, key, value, *args, **kwargs)

"""The attentions of a diffusers transformer, found by their structure, and the way to their states while they run.

Whatever a processor of diffusers does before (norms, rotary embedding, joining text and image), it ends in one call of
``torch.nn.functional.scaled_dot_product_attention`` with ``(batch, heads, tokens, channels)``: by itself, or through
diffusers' dispatcher and its default backend, which brings its own ``(batch, tokens, heads, channels)`` into that
order. There the states are seen, and others put in their place; masks and all else stay as they are.

What counts are attentions of tokens to themselves, with those of a text or without. That is what kernels for quantized
attention compute; a cross attention, whose few keys come from a text alone, stays in floating point in all engines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slim_core.errors import SpecError
from slim_core.model.attention import AttentionInfo, States, Tap
from slim_core.model.skeleton import named_modules

__all__ = ["Attentions"]

_KERNEL = torch.nn.functional.scaled_dot_product_attention
_CALLED = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})
_QUERY = ("to_q", "to_query")
_KEY = ("to_k", "to_key")
_FUSED = ("to_qkv", "to_qkv_mlp_proj", "img_attn_qkv", "img_qkv_proj")
# MindIE-SD's Qwen-Image attends in the code of a block, so it looks for what belongs to an attention under that name.
_NAMED_AFTER_BLOCK = frozenset({"QwenImageTransformerBlock"})


class Attentions:
    """The attentions of a transformer: an :class:`~slim_core.model.attention.AttentionAccess`.

    Args:
        module: the transformer; its parameters may be on ``meta``.
        tensor_name: turns the name of a module into the one that the output has for it.
        other_name: gives another name of a module that recipes may use for it.
    """

    def __init__(
        self,
        module: nn.Module,
        tensor_name: Callable[[str], str] = str,
        other_name: Callable[[str], str] | None = None,
    ) -> None:
        self._module = module
        self._infos: dict[str, AttentionInfo] = {}
        for name, child in named_modules(module):
            if _attends_to_itself(child):
                owner = name.rpartition(".")[0]
                after_block = type(module.get_submodule(owner)).__name__ in _NAMED_AFTER_BLOCK
                prefix = tensor_name(owner if after_block else name)
                also = (other_name(name),) if other_name is not None else ()
                self._infos[name] = _describe(name, prefix, child, also)

    @property
    def attentions(self) -> Sequence[AttentionInfo]:
        return tuple(self._infos.values())

    @contextmanager
    def tapped(self, taps: Mapping[str, Tap]) -> Generator[None]:
        """See :meth:`AttentionAccess.tapped`. May be entered by several threads, each with a model of its own.

        Raises:
            SpecError: an attention cannot be reached, or hands on other states than its structure says.
        """
        if not taps:
            yield
            return
        watched = _Watched()
        try:
            for name, tap in taps.items():
                info = self._infos[name]
                if info.problem:
                    raise SpecError(info.problem, where=name, remedy="exclude this attention")
                watched.attach(self._module.get_submodule(name), info, tap)
            with watched:
                yield
        finally:
            watched.detach()


class _Watched(TorchFunctionMode):
    """While it is entered, the kernel is called with the states that the tap of the attention at work lets through."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []
        self._at_work: list[_Run] = []

    def attach(self, module: nn.Module, info: AttentionInfo, tap: Tap) -> None:
        def begin(_module: nn.Module, _args: Any) -> None:
            self._at_work.append(_Run(info, tap))

        def end(_module: nn.Module, _args: Any, output: Any) -> None:
            run = self._at_work.pop()
            if not run.calls and output is not None:
                raise SpecError(
                    "the attention ran without handing its query, key and value to scaled_dot_product_attention, so "
                    "they cannot be quantized",
                    where=info.name,
                    remedy="unset DIFFUSERS_ATTN_BACKEND if it is set, or exclude this attention",
                )

        # Ahead of all other hooks, and called in any case, so that what begins also ends.
        self._handles.append(module.register_forward_pre_hook(begin, prepend=True))
        self._handles.append(module.register_forward_hook(end, always_call=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _KERNEL or not self._at_work:
            return func(*args, **kwargs)
        call = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        states = self._at_work[-1].show(call["query"], call["key"], call["value"])
        if states is None:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value"), states, strict=True))
        return func(*given.values(), *args[3:], **{name: x for name, x in kwargs.items() if name not in given})


class _Run:
    """One run of an attention."""

    def __init__(self, info: AttentionInfo, tap: Tap) -> None:
        self._info = info
        self._tap = tap
        self.calls = 0

    def show(self, query: Tensor, key: Tensor, value: Tensor) -> States | None:
        """Let the tap see states, once their shapes are known to be those that were promised."""
        info = self._info
        self.calls += 1
        if self.calls > 1:
            raise SpecError(
                "the attention attends more than once in a run, and engines have one set of scales for it",
                where=info.name,
                remedy="exclude this attention",
            )
        for state, heads, dim in (
            (query, info.heads, info.key_dim),
            (key, info.kv_heads, info.key_dim),
            (value, info.kv_heads, info.value_dim),
        ):
            if state.dim() != 4 or state.shape[1] != heads or state.shape[3] != dim:
                raise SpecError(
                    f"its states have the shape {list(state.shape)}, where {heads} heads of {dim} channels were "
                    "expected (batch, heads, tokens, channels)",
                    where=info.name,
                    remedy="exclude this attention",
                )
        return self._tap(query, key, value)


def _attends_to_itself(module: nn.Module) -> bool:
    """Whether it projects the keys from what the queries come from, and hands them to the kernel."""
    query, key = _child(module, _QUERY), _child(module, _KEY)
    if query is None and _child(module, _FUSED) is None:
        return False
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return False
    if query is not None and (key is None or key.in_features != query.in_features):
        return False
    return any(not _CALLED.isdisjoint(function.__code__.co_names) for function in _functions(module))


def _child(module: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Linear)), None)


def _functions(module: nn.Module) -> Iterator[Any]:
    """What a run of it may execute: the functions of its own class and of its processor's."""
    processor: Any = getattr(module, "processor", None)
    for kind in (type(module), type(processor)):
        for name in dir(kind):
            function: Any = inspect.unwrap(found) if callable(found := getattr(kind, name, None)) else None
            if inspect.isfunction(function) and found is not getattr(nn.Module, name, None):
                yield function


def _describe(name: str, prefix: str, module: nn.Module, also: tuple[str, ...]) -> AttentionInfo:
    heads = _positive(module, "heads", "num_heads", "num_attention_heads")
    query, key = _child(module, _QUERY), _child(module, _KEY)
    dim = _positive(module, "head_dim", "dim_heads")
    if dim is None and heads and query is not None and query.out_features % heads == 0:
        dim = query.out_features // heads
    if heads is None or dim is None:
        problem = f"{type(module).__name__} does not say how many heads it has, or how large they are"
        return AttentionInfo(name, prefix, 0, 0, 0, 0, problem=problem, also_called=also, cached=False)
    kv_heads = heads if key is None else key.out_features // dim
    return AttentionInfo(name, prefix, heads, kv_heads, dim, dim, also_called=also, cached=False)


def _positive(module: nn.Module, *names: str) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)

"""Attention modules: what must be known of them, and how their states are reached while they run.

The states of an attention are its query, key and value as they enter the attention function, after rotary embedding:
``(batch, heads, tokens, head_dim)``. Whoever opens a model knows its library and says how to get at them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["AttentionAccess", "AttentionInfo", "States", "Tap"]

States = tuple[Tensor | None, Tensor, Tensor]
"""Query ``(B, heads, S, key_dim)``, key ``(B, kv_heads, S, key_dim)`` and value ``(B, kv_heads, S, value_dim)``.

The query is None where only what enters the cache can be seen.
"""

Tap = Callable[[Tensor | None, Tensor, Tensor], States | None]
"""Is shown the states of an attention; returns those that go on in their place, or None to leave them alone."""


@dataclass(frozen=True)
class AttentionInfo:
    """An attention module.

    Args:
        name: dotted module name.
        prefix: the name that the checkpoint has for it.
        heads, kv_heads: heads of the query, and of key and value.
        key_dim, value_dim: channels of a head of query and key, and of value.
        latent: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): key and value are the compressed latent,
            one head that all share, and the query is the part without rotary embedding, absorbed into that space.
        sees_query: whether a tap is shown the query.
        problem: why its states cannot be reached; empty if they can.
        shared: whether later layers attend to its keys and values too, with queries of their own.
        rotated: whether query and key are rotated by one matrix that is written for engines, before they are seen.
        also_called: further names that recipes may use for it.
        cached: whether engines keep its keys and values for the tokens that follow.
    """

    name: str
    prefix: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    sees_query: bool = True
    problem: str = ""
    shared: bool = False
    rotated: bool = False
    also_called: tuple[str, ...] = ()
    cached: bool = True


class AttentionAccess(Protocol):
    """The attentions of a model and the way to their states."""

    @property
    def attentions(self) -> Sequence[AttentionInfo]:
        """Those that compare queries with keys; linear attention is none of them."""
        ...

    def tapped(self, taps: Mapping[str, Tap]) -> AbstractContextManager[None]:
        """Within this context the states of the named attentions pass through their taps; afterwards all is as before.

        An attention that runs without handing its states to its tap raises SpecError.
        """
        ...

"""Scales that make the channels of keys alike, moved to the queries: ``K' = K / s``, ``Q' = Q s``.

Every product of query and key stays what it was. This is SmoothAttention (QServe, arXiv 2405.04532), with a free
exponent and without letting the queries grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.model.query_keys import QueryKey
from slim_core.model.weights import Edit, UnitWeights

__all__ = ["LARGEST", "key_edits", "key_scale"]

LARGEST = 2.0**10
"""The largest scale, and one over the smallest: with it weights of usual size stay finite in float16."""


def key_scale(absmax: Tensor, place: QueryKey, factor: float) -> Tensor:
    """``s = A^factor`` over its geometric mean in a head, with ``A`` the largest key of the channels sharing a scale.

    With ``factor`` 1 all channels that rotary embedding does not mix reach equally far, as far as they did in the
    geometric mean, so that the queries grow no more than they shrink. Channels that are always zero are left alone (1)
    and count for nothing. Scales are clamped to 1 / :data:`LARGEST` .. :data:`LARGEST`.

    Args:
        absmax: float32 ``(kv_heads * dim,)``, the largest magnitude of every channel of the key.

    Returns:
        float32 ``(scales,)``.
    """
    channels = place.channels
    reach = torch.zeros(place.scales, dtype=torch.float64).scatter_reduce(0, channels, absmax.double(), "amax")
    alive = reach > 0
    log = torch.where(alive, torch.log2(reach.clamp(min=1e-300)) * factor, torch.zeros_like(reach))
    head = _heads(place)
    heads = int(head.max()) + 1
    members = alive[channels].double()  # a mean over channels, not over scales
    total = torch.zeros(heads, dtype=torch.float64).scatter_add(0, head[channels], log[channels] * members)
    count = torch.zeros(heads, dtype=torch.float64).scatter_add(0, head[channels], members)
    log = log - (total / count.clamp(min=1))[head]
    scale = torch.exp2(log).clamp(1 / LARGEST, LARGEST)
    return torch.where(alive, scale, torch.ones_like(scale)).float()


def _heads(place: QueryKey) -> Tensor:
    """The head of every scale, int64 ``(scales,)``; all one where heads share their scales."""
    every = torch.arange(len(place.channels)) // place.dim
    first = torch.full((place.scales,), len(every)).scatter_reduce(0, place.channels, every, "amin")
    last = torch.zeros(place.scales, dtype=torch.int64).scatter_reduce(0, place.channels, every, "amax")
    return first if torch.equal(first, last) else torch.zeros_like(first)


def key_edits(place: QueryKey, scale: Tensor, weights: UnitWeights) -> list[Edit]:
    """The edits that divide the keys and multiply the queries.

    Args:
        scale: float32 ``(scales,)``.
    """
    edits: list[Edit] = []
    for side, channels in ((place.key, 1 / place.of_keys(scale)), (place.query, place.of_queries(scale))):
        for part in ("weight", "bias"):
            name = f"{side.module}.{part}"
            if name not in weights:
                continue
            if side.norm:
                edits.append(Edit(name, value=side.multiplied(part, weights[name].load(), channels)))
            else:
                factor = torch.ones(weights[name].shape[0])
                factor[side.rows] = channels
                edits.append(Edit(name, rows=factor))
    return edits

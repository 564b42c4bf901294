"""Scales of keys: what they even out, what they leave alone, and that rotary embedding lets them pass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from slim_core.model.query_keys import QueryKey, Side
from slim_core.smoothing.keys import LARGEST, key_scale

HEADS, KV_HEADS, DIM = 4, 2, 8
HALF = torch.arange(DIM // 2).repeat(2)
INTERLEAVED = torch.arange(DIM // 2).repeat_interleave(2)
PARTIAL = torch.tensor([0, 1, 0, 1, 2, 3, 4, 5])


def place(pairing: Tensor = HALF, *, shared: bool = False, kv_heads: int = KV_HEADS) -> QueryKey:
    count = int(pairing.max()) + 1
    heads = torch.zeros(kv_heads, dtype=torch.int64) if shared else torch.arange(kv_heads)
    channels = (heads[:, None] * count + pairing).reshape(-1)
    key, query = Side("k", torch.arange(kv_heads * DIM)), Side("q", torch.arange(HEADS * DIM))
    return QueryKey("attention", key, query, kv_heads, HEADS, DIM, channels)


RANGES = hnp.arrays("float32", KV_HEADS * DIM, elements=st.floats(2.0**-4, 2.0**4, width=32))
PAIRINGS = st.sampled_from([HALF, INTERLEAVED, PARTIAL, torch.arange(DIM)])


def reach(graph: QueryKey, absmax: Tensor) -> Tensor:
    """The largest key of the channels that share a scale."""
    return torch.stack([absmax[graph.channels == scale].max() for scale in range(graph.scales)])


@given(RANGES, PAIRINGS, st.booleans())
def test_with_factor_one_all_pairs_reach_equally_far(values: object, pairing: Tensor, shared: bool) -> None:
    graph, absmax = place(pairing, shared=shared), torch.tensor(values)
    scale = key_scale(absmax, graph, 1.0)
    after = reach(graph, absmax) / scale
    groups = [after] if shared else after.view(KV_HEADS, -1)
    for group in groups:
        assert torch.allclose(group, group[0], rtol=1e-5)


@given(RANGES, PAIRINGS, st.booleans(), st.sampled_from([0.25, 0.5, 1.0]))
def test_queries_do_not_grow(values: object, pairing: Tensor, shared: bool, factor: float) -> None:
    graph = place(pairing, shared=shared)
    scale = key_scale(torch.tensor(values), graph, factor)
    logs = graph.of_queries(scale).double().log2().view(HEADS, DIM)
    assert torch.allclose(logs.mean() if shared else logs.mean(1), torch.zeros(()).double(), atol=1e-5)


@given(RANGES, st.sampled_from([0.25, 0.5, 1.0]), st.floats(0.125, 8.0, width=32))
def test_the_size_of_all_keys_together_does_not_matter(values: object, factor: float, size: float) -> None:
    absmax = torch.tensor(values)
    assert torch.allclose(key_scale(absmax * size, place(), factor), key_scale(absmax, place(), factor), rtol=1e-5)


@given(RANGES, st.permutations(range(DIM // 2)))
def test_pairs_may_come_in_any_order(values: object, order: list[int]) -> None:
    absmax = torch.tensor(values)
    turned = absmax.view(KV_HEADS, 2, DIM // 2)[:, :, order].reshape(-1)
    scale = key_scale(absmax, place(), 1.0).view(KV_HEADS, DIM // 2)
    assert torch.allclose(key_scale(turned, place(), 1.0).view(KV_HEADS, -1), scale[:, order], rtol=1e-6)


@given(RANGES, st.floats(0.125, 3.0))
def test_the_factor_is_an_exponent(values: object, factor: float) -> None:
    absmax = torch.tensor(values)
    one, scale = key_scale(absmax, place(), 1.0).double(), key_scale(absmax, place(), factor).double()
    expected = (one**factor).clamp(1 / LARGEST, LARGEST)
    assert torch.allclose(scale, expected, rtol=1e-4)


def test_dead_channels_are_left_alone_and_count_for_nothing() -> None:
    absmax = torch.tensor([1.0, 0, 4, 2, 1, 0, 4, 0.5] + [0.0] * 8)
    scale = key_scale(absmax, place(), 1.0)
    mean = (1 * 4 * 2) ** (1 / 3)
    assert torch.allclose(scale, torch.tensor([1 / mean, 1, 4 / mean, 2 / mean, 1, 1, 1, 1]))


def test_scales_are_bounded() -> None:
    absmax = torch.tensor([1e-30, 1, 1, 1e30] * 2 + [1.0, 2, 3, 4] * 2)
    scale = key_scale(absmax, place(), 1.0)
    assert scale.tolist()[0] == 1 / LARGEST
    assert scale.tolist()[3] == LARGEST
    assert bool(torch.isfinite(key_scale(absmax, place(), 50.0)).all())


def test_one_norm_for_all_heads_looks_at_the_largest_of_them() -> None:
    one, other = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1]), torch.tensor([1.0, 1, 1, 16, 1, 1, 1, 1])
    scale = key_scale(torch.cat([one, other]), place(shared=True), 1.0)
    mean = (4 * 16) ** 0.25
    assert torch.allclose(scale, torch.tensor([4.0, 1, 1, 16]) / mean)


def rotated(x: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Rotary embedding ``(heads, tokens, dim)`` of these pairs of channels, in float64."""
    y, tokens = x.clone(), torch.arange(x.shape[1]).double()
    for number, (i, j) in enumerate(pairs):
        angle = tokens * math.pi / (3 + number)
        y[..., i] = x[..., i] * angle.cos() - x[..., j] * angle.sin()
        y[..., j] = x[..., j] * angle.cos() + x[..., i] * angle.sin()
    return y


def products(query: Tensor, key: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    keys = rotated(key, pairs).repeat_interleave(HEADS // KV_HEADS, 0)
    return torch.softmax(rotated(query, pairs) @ keys.transpose(1, 2), -1)


LAYOUTS = {
    "half": (HALF, [(i, i + 4) for i in range(4)]),
    "interleaved": (INTERLEAVED, [(2 * i, 2 * i + 1) for i in range(4)]),
    "partial": (PARTIAL, [(0, 2), (1, 3)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("assumed", LAYOUTS)
def test_rotary_embedding_lets_scales_of_pairs_pass_and_no_others(layout: str, assumed: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 6, DIM, generator=generator, dtype=torch.float64) for heads in (HEADS, KV_HEADS))
    pairs, graph = LAYOUTS[layout][1], place(LAYOUTS[assumed][0])
    scale = key_scale(key.abs().amax(1).reshape(-1).float() * torch.arange(1, 17), graph, 1.0).double()
    keys, queries = graph.of_keys(scale).view(KV_HEADS, 1, DIM), graph.of_queries(scale).view(HEADS, 1, DIM)
    before, after = products(query, key, pairs), products(query * queries, key / keys, pairs)
    commutes = torch.allclose(rotated(key / keys, pairs), rotated(key, pairs) / keys, atol=1e-12)
    same = torch.allclose(before, after, atol=1e-12)
    assert (commutes, same) == (layout == assumed,) * 2

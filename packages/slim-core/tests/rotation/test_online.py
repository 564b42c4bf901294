"""Rotations at run time: the factorisation, its equivalence, and which ranks can work alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.rotation.hadamard import constructible
from slim_core.rotation.online import down_rotation, heads_rotation, kronecker_orders, shard_refusal

PUBLISHED = {
    12288: (96, 128),
    17408: (128, 136),
    25600: (160, 160),
    6144: (64, 96),
    9728: (76, 128),
    27648: (144, 192),
    29568: (168, 176),
    18944: (128, 148),
    1: (1, 1),
    4: (2, 2),
    16: (4, 4),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", PUBLISHED)
def test_orders(n: int) -> None:
    assert kronecker_orders(n) == PUBLISHED[n]


def test_another_pair_where_an_order_cannot_be_constructed() -> None:
    """64 x 172 would be closer, but there is no matrix of order 172 here."""
    assert kronecker_orders(11008) == (32, 344)


@given(st.integers(-3, 40_000))
def test_orders_are_the_closest_that_the_rule_gives(n: int) -> None:
    closer = [(i, n // i) for i in range(1, math.isqrt(max(n, 0)) + 1) if n % i == 0 and _fits(i, n // i)]
    if not closer:
        with pytest.raises(UnsupportedError, match=f"{n} cannot be written as a product"):
            kronecker_orders(n)
        return
    n1, n2 = kronecker_orders(n)
    assert (n1, n2) == next((pair for pair in reversed(closer) if pair[1] <= 256), closer[-1])
    a, b = (n1 + n2) // 2, (n2 - n1) // 2
    assert (a - b, a + b, a * a - n) == (n1, n2, b * b)


def _fits(n1: int, n2: int) -> bool:
    """Orders that the reference allows, as far as there is a matrix of order n2 here."""
    known = all(order in (1, 2) or order % 4 == 0 for order in (n1, n2))
    return known and (n1 + n2) % 2 == 0 and constructible(n2)


@pytest.mark.parametrize("n", [0, -4, 7, 3 * 5, 2 * 92 * 23, 6])
def test_sizes_without_a_pair(n: int) -> None:
    with pytest.raises(UnsupportedError, match=f"{n} cannot be written as .*leave out down_proj_online_layers"):
        kronecker_orders(n)


@given(st.sampled_from([(768, 4), (128, 2), (768, 1), (6144, 4)]), st.integers(0, 99))
def test_the_input_is_rotated_along_both_sides(case: tuple[int, int], seed: int) -> None:
    n, block = case
    rotation = down_rotation(n, block)
    n1, n2 = kronecker_orders(n)
    first, second = rotation.outer.dense(), rotation.inner.dense()
    assert (first.shape, second.shape) == ((n1, n1), (n2, n2))
    assert bool(((first != 0).sum(1) == block).all())
    x, weight = normal(3, n, seed=seed), normal(5, n, seed=seed + 1)
    reshaped = first.T @ x.reshape(3, n1, n2) @ second
    assert torch.allclose(rotation.right(x), reshaped.reshape(3, n), atol=1e-11)
    assert torch.allclose(rotation.right(x) @ rotation.right(weight).T, x @ weight.T, atol=1e-9)


def test_heads() -> None:
    heads, head_dim = 12, 5
    rotation = heads_rotation(heads, head_dim, 4)
    matrix = rotation.outer.dense()
    x, weight = normal(3, heads * head_dim), normal(7, heads * head_dim, seed=1)
    want = torch.einsum("hk,thd->tkd", matrix, x.reshape(3, heads, head_dim)).reshape(3, -1)
    assert torch.allclose(rotation.right(x), want, atol=1e-12)
    assert torch.allclose(rotation.right(x) @ rotation.right(weight).T, x @ weight.T, atol=1e-11)
    with pytest.raises(UnsupportedError, match="a block size of 8 does not divide 12"):
        heads_rotation(12, 64, 8)


@given(st.integers(1, 130), st.sampled_from([1, 2, 4, 8]))
def test_a_share_is_accepted_exactly_if_every_rank_can_work_alone(heads: int, size: int) -> None:
    if heads % size:
        assert shard_refusal("heads", heads, size)
        return
    rotation = heads_rotation(heads, 2, size)
    x = normal(1, heads * 2)
    whole = rotation.right(x)
    alone = True
    for ranks in (1 << i for i in range(int(math.log2(size)) + 1)):
        share = heads // ranks
        if heads % ranks or share % size:
            alone = False
            continue
        for rank in range(ranks):
            part = slice(rank * share * 2, (rank + 1) * share * 2)
            mine = heads_rotation(share, 2, size).right(x[:, part])
            assert torch.allclose(mine, whole[:, part], atol=1e-12)
    assert (shard_refusal("heads", heads, size) is None) == alone


def test_what_a_refusal_says() -> None:
    assert shard_refusal("heads", 64, 4) is None
    assert shard_refusal("heads", 40, 4) == (
        "with 4 ranks there are 10 heads per rank, which is no multiple of the rotation's block of 4",
        "use max_tp_size 2",
    )
    assert shard_refusal("heads", 6, 4) == (
        "with 1 rank there are 6 heads per rank, which is no multiple of the rotation's block of 4",
        "rotate offline only, without online: true",
    )

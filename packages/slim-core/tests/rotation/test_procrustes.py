"""The polar factor and the alternation built on it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.rotation.dense import orthogonality_error
from slim_core.rotation.procrustes import fake_quantize, learn_rotation, polar_factor

EXACT = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 999))
def test_the_polar_factor_of_any_rank(n: int, rank: int, seed: int) -> None:
    rank = min(rank, n)
    matrix = normal(n, rank, seed=seed) @ normal(rank, n, seed=seed + 1)
    factor = polar_factor(matrix)
    assert orthogonality_error(factor) <= 1e-12
    nuclear = torch.linalg.svdvals(matrix).sum()
    assert torch.allclose((factor.T @ matrix).trace(), nuclear, atol=1e-9)
    for other in range(3):
        assert float((orthogonal(n, seed + other).T @ matrix).trace()) <= float(nuclear) + 1e-9
    assert torch.allclose(factor.T @ matrix, (factor.T @ matrix).T, atol=1e-9)


@given(st.integers(1, 10), st.integers(0, 10), st.integers(0, 999))
def test_where_nothing_was_seen_nothing_turns(n: int, rank: int, seed: int) -> None:
    """A symmetric matrix leaves its null space alone; no matrix at all gives the identity."""
    basis = orthogonal(n, seed)[:, : min(rank, n)]
    spread = torch.linspace(1, 2, basis.shape[1], dtype=EXACT)
    assert torch.allclose(polar_factor(basis @ torch.diag(spread) @ basis.T), torch.eye(n, dtype=EXACT), atol=1e-9)


@given(st.integers(2, 9), st.integers(0, 999))
def test_the_completion_has_the_largest_trace(n: int, seed: int) -> None:
    matrix = normal(n, 1, seed=seed) @ normal(1, n, seed=seed + 1)
    factor = polar_factor(matrix)
    u, _, vh = torch.linalg.svd(matrix)
    for other in range(5):
        turned = u @ torch.block_diag(torch.eye(1, dtype=EXACT), orthogonal(n - 1, seed + other)) @ vh
        assert float(turned.trace()) <= float(factor.trace()) + 1e-9


def naive_quantize(tokens: Tensor, bits: int) -> Tensor:
    out = torch.empty_like(tokens)
    top = 2 ** (bits - 1) - 1
    for i, row in enumerate(tokens.tolist()):
        scale = max(max(abs(value) for value in row) / top, 1e-5)
        for j, value in enumerate(row):
            out[i, j] = max(min(round(value / scale), top), -top - 1) * scale
    return out


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([4, 8]), st.integers(0, 99), st.sampled_from([1.0, 1e-6]))
def test_quantizing_per_token(rows: int, columns: int, bits: int, seed: int, size: float) -> None:
    tokens = normal(rows, columns, seed=seed) * size
    tokens[0, 0] = 0.0
    before = tokens.clone()
    assert torch.allclose(fake_quantize(tokens, bits), naive_quantize(tokens, bits), atol=1e-12)
    assert torch.equal(tokens, before)


def outliers(count: int, width: int, seed: int = 0) -> Tensor:
    tokens = normal(count, width, seed=seed)
    tokens[:, 1] *= 30
    tokens[:, width // 2] = 12 + tokens[:, width // 2] / 10
    return tokens


def loss(tokens: Tensor, rotation: Tensor, bits: int = 4) -> float:
    rotated = tokens.double() @ rotation
    return float((rotated - naive_quantize(rotated, bits)).norm()) / len(tokens)


@settings(max_examples=25)
@given(st.integers(2, 16), st.integers(1, 40), st.sampled_from(["int4", "int8"]), st.integers(0, 99))
def test_never_worse_than_where_it_began(width: int, count: int, quant_dtype: str, seed: int) -> None:
    """Fewer tokens than channels, as many, and more; also channels that are always zero."""
    tokens = outliers(count, width, seed)
    tokens[:, 0] = 0.0
    learned = learn_rotation([tokens], quant_dtype=quant_dtype, steps=8)  # pyright: ignore
    bits = int(quant_dtype[3:])
    assert orthogonality_error(learned.matrix) <= 1e-12
    assert math.isclose(
        learned.losses[0], loss(tokens, torch.eye(width, dtype=EXACT), bits), rel_tol=1e-9, abs_tol=1e-15
    )
    assert learned.losses[learned.best] == min(learned.losses) <= learned.losses[0]
    assert math.isclose(learned.losses[learned.best], loss(tokens, learned.matrix, bits), rel_tol=1e-6, abs_tol=1e-15)
    assert learned.gain <= 1


def test_a_hidden_rotation_is_found() -> None:
    """Tokens that lie on the grid of int4, slightly turned: the way back is learned, and helps unseen ones as well."""
    grid = torch.randint(-7, 8, (400, 6), generator=torch.Generator().manual_seed(0)).double()
    grid[:, 0] = 7.0
    skew = normal(6, 6)
    hidden = torch.matrix_exp(0.01 * (skew - skew.T))
    learned = learn_rotation([grid[:200] @ hidden], steps=60)
    assert learned.gain < 0.1
    assert torch.allclose(hidden @ learned.matrix, torch.eye(6, dtype=EXACT), atol=0.01)
    unseen = grid[200:] @ hidden
    assert loss(unseen, learned.matrix) < 0.1 * loss(unseen, torch.eye(6, dtype=EXACT))


def test_other_tokens_decide() -> None:
    """Noise has nothing to teach: learned by heart, it does not help tokens that were not seen."""
    tokens, unseen = normal(40, 16), normal(400, 16, seed=1)
    by_heart = learn_rotation([tokens])
    assert by_heart.gain < 0.95
    honest = learn_rotation([tokens], deciding=[unseen])
    assert math.isclose(honest.losses[honest.best], loss(unseen, honest.matrix), rel_tol=1e-9)
    assert loss(unseen, honest.matrix) <= loss(unseen, torch.eye(16, dtype=EXACT))
    assert loss(unseen, honest.matrix) < loss(unseen, by_heart.matrix)


def test_deterministic_and_independent_of_how_tokens_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = outliers(101, 12).bfloat16()
    torch.manual_seed(1)
    one = learn_rotation([tokens])
    torch.manual_seed(2)
    again = learn_rotation([tokens])
    assert torch.equal(one.matrix, again.matrix)
    monkeypatch.setattr("slim_core.rotation.procrustes._CHUNK", 7)
    parts = learn_rotation([tokens[:40], tokens[40:40], tokens[40:]], steps=1)
    assert torch.allclose(parts.matrix, learn_rotation([tokens], steps=1).matrix, atol=1e-9)


def test_steps() -> None:
    tokens = outliers(50, 8)
    assert len(learn_rotation([tokens], steps=3).losses) == 4
    stopped = learn_rotation([tokens], steps=1000)
    assert 7 <= len(stopped.losses) < 1001
    assert len(stopped.losses) - 1 - stopped.best >= 5
    exact = torch.eye(8, dtype=EXACT) * 7  # quantized without loss: nothing to do
    done = learn_rotation([exact])
    assert done.losses == (0.0,)
    assert done.gain == 1.0
    assert torch.equal(done.matrix, torch.eye(8, dtype=EXACT))


def test_bad_tokens() -> None:
    with pytest.raises(UnsupportedError, match="there are no tokens to learn a rotation from"):
        learn_rotation([])
    with pytest.raises(UnsupportedError, match="there are no tokens"):
        learn_rotation([torch.zeros(0, 4)])
    with pytest.raises(UnsupportedError, match=r"tokens of different widths, \[4, 8\], cannot share"):
        learn_rotation([torch.ones(2, 8), torch.ones(2, 4)])
    with pytest.raises(InvalidModelError, match="tokens hold NaN or infinity"):
        learn_rotation([torch.ones(2, 4), torch.full((1, 4), math.inf)])

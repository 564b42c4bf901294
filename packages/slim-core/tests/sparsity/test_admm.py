"""Pruning by ADMM, against a naive float64 implementation with an explicit inverse, and against what it must beat."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.sparsity import admm
from slim_core.sparsity.admm import InputMetric, prune

SEEDS = range(4)


def inputs(seed: int, channels: int = 48, tokens: int = 600) -> Tensor:
    """Correlated activations whose channels differ in size."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, channels + 1).float() ** -0.7
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=g))[0]
    x = (torch.randn(tokens, channels, generator=g) * spectrum.sqrt()) @ basis.T
    return x * torch.exp(0.5 * torch.randn(channels, generator=g))


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def weights(seed: int, rows: int = 64, channels: int = 48) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(100 + seed)) * 0.02


def metric(x: Tensor) -> InputMetric:
    found = InputMetric.of(second_moment(x), "layer")
    assert found is not None
    return found


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """Relative error of the output."""
    y = x.double() @ weight.double().T
    return float((x.double() @ other.double().T - y).norm() / y.norm())


def dropped(state: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(state.size, dtype=bool)
    mask[np.argsort(np.abs(state).ravel(), kind="stable")[:count]] = True
    return mask.reshape(state.shape)


def naive(weight: Tensor, moment: Tensor, ratio: float) -> np.ndarray:
    """The iteration as published, with two states and the inverse."""
    h, w = moment.double().numpy(), weight.double().numpy()
    d = np.sqrt(np.diag(h))
    d = d + 1e-8 * np.sqrt(np.mean(d**2))
    a = h / np.outer(d, d)
    a = a + 0.1 * np.mean(np.diag(a)) * np.eye(len(d))
    v, u = w * d, np.zeros_like(w)
    goal, inverse = v @ a, np.linalg.inv(a + np.eye(len(d)))
    mask = np.zeros_like(w, dtype=bool)
    for t in range(20):
        if t < 15:
            mask = dropped(v + u, round(round(w.size * ratio) * (1 - (1 - (t + 1) / 15) ** 3)))
        z = np.where(mask, 0, v + u)
        u = u + v - z
        v = (goal + z - u) @ inverse
    return np.where(mask, 0, v + u) / d


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_equals_the_published_iteration(seed: int, ratio: float) -> None:
    x, weight = inputs(seed), weights(seed)
    found, want = prune(weight, ratio, metric(x), "w").numpy(), naive(weight, second_moment(x), ratio)
    same = (found == 0) == (want == 0)
    assert same.mean() > 0.999  # float32 may swap two that are all but equal
    assert np.abs(found - want)[same].max() < 1e-5


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(1, 48), (64, 48), (7, 48)])
def test_the_number_of_zeros_is_exact(ratio: float, shape: tuple[int, int]) -> None:
    weight = weights(0, *shape)
    for m in (metric(inputs(0)), None):
        found = prune(weight, ratio, m, "w")
        assert int((found == 0).sum()) == round(ratio * weight.numel())
        assert found.dtype == torch.float32
        assert bool(torch.isfinite(found).all())


def test_the_ends() -> None:
    weight = weights(0)
    for m in (metric(inputs(0)), None):
        assert torch.equal(prune(weight, 0.0, m, "w"), weight)
        assert prune(weight, 0.0, m, "w") is not weight
        assert not prune(weight, 1.0, m, "w").any()
        assert prune(torch.empty(0, 48), 0.5, m, "w").shape == (0, 48)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_better_than_magnitude_and_than_magnitude_times_input(seed: int, ratio: float) -> None:
    x, weight = inputs(seed), weights(seed)
    count = round(ratio * weight.numel())
    found = output_error(weight, prune(weight, ratio, metric(x), "w"), x)
    by_size = weight.masked_fill(torch.from_numpy(dropped(weight.numpy(), count)), 0)
    by_input = weight.masked_fill(torch.from_numpy(dropped((weight * metric(x).scale).numpy(), count)), 0)
    assert found < 0.7 * output_error(weight, by_size, x)
    assert found < 0.9 * output_error(weight, by_input, x)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_gradual_schedule_pays(seed: int, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better than to drop all from the first iteration on; at ratios of 0.7 and more it is about even."""
    x, weight = inputs(seed), weights(seed)
    gradual = output_error(weight, prune(weight, ratio, metric(x), "w"), x)
    monkeypatch.setattr(admm, "_ramp", lambda _iteration: 1.0)
    assert gradual < output_error(weight, prune(weight, ratio, metric(x), "w"), x)


def test_the_schedule_is_cubic_and_ends_at_the_target() -> None:
    shares = [admm._ramp(i) for i in range(15)]  # pyright: ignore[reportPrivateUsage]
    assert shares[-1] == 1
    assert shares[0] == pytest.approx(1 - (14 / 15) ** 3)
    assert all(a < b for a, b in pairwise(shares))


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_weight_that_is_sparse_enough_is_left_alone(ratio: float) -> None:
    x, weight = inputs(1), weights(1)
    once = prune(weight, ratio, metric(x), "w")
    for m in (metric(x), None):
        assert torch.equal(prune(once, ratio, m, "w"), once)
        assert torch.equal(prune(once, ratio / 2, m, "w"), once)


def test_without_inputs_the_smallest_go_and_the_others_stay() -> None:
    weight = weights(2)
    found = prune(weight, 0.4, None, "w")
    mask = torch.from_numpy(dropped(weight.numpy(), round(0.4 * weight.numel())))
    assert torch.equal(found, weight.masked_fill(mask, 0))


def test_channels_that_are_never_used_go_first() -> None:
    x = inputs(3)
    x[:, 5] = 0
    weight = weights(3)
    found = prune(weight, 0.3, metric(x), "w")
    assert not found[:, 5].any()
    assert int((found == 0).sum()) == round(0.3 * weight.numel())


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens(tokens: int) -> None:
    x, weight = inputs(0, tokens=tokens), weights(0)
    found = prune(weight, 0.5, metric(x), "w")
    assert bool(torch.isfinite(found).all())
    assert float((found - weight)[found != 0].abs().max()) < 0.1  # damping keeps what no token speaks of


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_the_size_of_inputs_does_not_matter(factor: float) -> None:
    x, weight = inputs(0), weights(0)
    found = prune(weight, 0.5, metric(x * factor), "w")
    assert torch.allclose(found, prune(weight, 0.5, metric(x), "w"), atol=1e-6)


def test_rows_do_not_meet_in_the_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(0), weights(0)
    before = weight.clone()
    whole = prune(weight, 0.5, metric(x), "w")
    monkeypatch.setattr(admm, "_BLOCK_ELEMENTS", 5 * 48)
    assert torch.allclose(prune(weight, 0.5, metric(x), "w"), whole, atol=1e-6)
    assert torch.equal(weight, before)


def test_inputs_of_zeros_say_nothing() -> None:
    assert InputMetric.of(torch.zeros(4, 4), "layer") is None


def test_float64_helps_where_float32_rounds_too_much() -> None:
    """Its determinant is 2, next to a product of 25 million."""
    matrix = torch.tensor([[3.0, 5021.0], [5021.0, 8403481.0]])
    assert int(torch.linalg.cholesky_ex(matrix)[1])
    factor = admm._cholesky(matrix, "layer")  # pyright: ignore[reportPrivateUsage]
    assert factor.dtype == torch.float64
    assert torch.allclose(factor @ factor.T, matrix.double(), rtol=1e-12)
    rows = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    solved = InputMetric(torch.ones(2), factor).solve(rows)
    assert solved.dtype == torch.float32
    assert torch.allclose(solved.double(), torch.linalg.solve(matrix.double(), rows.double().T).T, rtol=1e-5)


def test_what_is_no_second_moment_is_an_error() -> None:
    with pytest.raises(InvalidModelError, match=r"^layer: the second moment of its inputs is not positive definite"):
        InputMetric.of(torch.tensor([[1.0, -9.0], [-9.0, 1.0]]), "layer")


def test_weights_that_float32_cannot_square_with_their_inputs() -> None:
    weight = weights(0) * 2.0**128
    x = inputs(0) * 2.0**30
    with pytest.raises(InvalidModelError, match=r"^w: its weights are too large"):
        prune(weight, 0.5, metric(x), "w")

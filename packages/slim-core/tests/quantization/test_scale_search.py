"""The search for scales of least squared error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.affine import EPSILON, affine_parameters
from slim_core.quantization.scale_search import grouped, search_matrix, search_scales


def draws(kind: str, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    match kind:
        case "heavy":  # Student t with three degrees of freedom
            return x / (torch.randn(3, *shape, generator=generator).square().mean(0)).sqrt()
        case "skewed":
            return x.exp() - 0.3
        case _:
            return x


def errors(rows: Tensor, scale: Tensor, offset: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Weighted squared errors of rows, in float64, with a loop's worth of plain arithmetic."""
    half = 2 ** (bits - 1)
    codes = torch.clamp(torch.round(rows.double() / scale.double() + offset.double()), -half, half - 1)
    squares = ((codes - offset.double()) * scale.double() - rows.double()) ** 2
    return (squares if importance is None else squares * importance.double()).sum(-1)


@pytest.mark.parametrize("kind", ["gauss", "heavy"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [32, 300])
def test_close_to_an_exhaustive_search(kind: str, bits: int, weighted: bool, width: int) -> None:
    rows = draws(kind, 2, 20, width)
    importance = draws("gauss", 2, 1, width, seed=1).square() if weighted else None
    scale, offset = search_scales(rows, bits=bits, symmetric=True, importance=importance)
    assert not bool(offset.any())
    plain, _ = affine_parameters(rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True), bits, symmetric=True)
    best = torch.full(rows.shape[:2], float("inf"), dtype=torch.float64)
    for ratio in torch.linspace(0.2, 1.1, 1200):
        best = torch.minimum(best, errors(rows, plain * ratio, offset, bits, importance))
    found = errors(rows, scale, offset, bits, importance)
    # Eight bits over a few columns have so many narrow minima that no quick search finds the best of each row.
    assert float(found.sum()) <= float(best.sum()) * (1.01 if bits == 4 else 1.15)
    assert float(found.sum()) < (0.9 if bits == 4 else 0.99) * float(
        errors(rows, plain, offset, bits, importance).sum()
    )


@pytest.mark.parametrize("kind", ["gauss", "heavy", "skewed"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("thorough", [True, False])
def test_more_steps_are_never_worse_and_none_is_worse_than_the_extremes(
    kind: str, bits: int, symmetric: bool, thorough: bool
) -> None:
    rows = draws(kind, 1, 50, 96)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    before = errors(rows, *affine_parameters(low, high, bits, symmetric), bits)
    plain = float(before.sum())
    for steps in (0, 1, 2, 5, 50):
        found = search_scales(rows, bits=bits, symmetric=symmetric, steps=steps, thorough=thorough)
        after = errors(rows, *found, bits)
        assert bool((after <= before * (1 + 1e-5)).all())  # the search adds in float32
        before = after
    assert float(before.sum()) < 0.995 * plain


@pytest.mark.parametrize("symmetric", [True, False])
@given(power=st.integers(-9, 80), seed=st.integers(0, 5))
def test_powers_of_two(symmetric: bool, power: int, seed: int) -> None:
    rows = draws("heavy", 2, 3, 40, seed=seed)
    plain = search_scales(rows, bits=4, symmetric=symmetric)
    scaled = search_scales(rows * 2.0**power, bits=4, symmetric=symmetric)
    assert torch.equal(scaled[0], plain[0] * 2.0**power)
    assert torch.equal(scaled[1], plain[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_row_is_on_its_own(symmetric: bool) -> None:
    rows = draws("heavy", 3, 17, 64)
    whole = search_scales(rows, bits=4, symmetric=symmetric)
    for row in (0, 5, 16):
        alone = search_scales(rows[:, row : row + 1].contiguous(), bits=4, symmetric=symmetric)
        for one, all_ in zip(alone, whole, strict=True):
            assert torch.allclose(one, all_[:, row : row + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_tiny_rows_get_the_least_scale(symmetric: bool, bits: int) -> None:
    rows = torch.stack(
        [torch.zeros(1, 8), torch.full((1, 8), 1e-30), torch.tensor([[1e-30, 0, 0, 0, 0, 0, 0, -1e-38]])]
    )
    scale, offset = search_scales(rows, bits=bits, symmetric=symmetric)
    assert torch.equal(scale, torch.full_like(scale, EPSILON))
    assert bool(torch.isfinite(offset).all())


def test_importance_of_nothing_counts_as_the_same_for_all() -> None:
    rows = draws("heavy", 2, 5, 32)
    importance = torch.ones(2, 1, 32)
    importance[1] = 0
    found = search_scales(rows, bits=4, symmetric=True, importance=importance)
    assert torch.equal(found[0], search_scales(rows, bits=4, symmetric=True)[0])


@pytest.mark.parametrize("group_size", [0, 4, 12])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_matrix_is_searched_by_rows_and_groups(
    group_size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slim_core.quantization.scale_search.rows_per_block", lambda *_: 7)
    matrix, importance = draws("heavy", 20, 24), draws("gauss", 24, seed=3).square().double() * 1e30
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        scale, offset = search_matrix(
            matrix, bits=4, symmetric=False, group_size=group_size, importance=importance, steps=5
        )
    finally:
        torch.set_num_threads(before)
    size = group_size or 24
    assert scale.shape == offset.shape == (20, 24 // size)
    for group in range(24 // size):
        columns = slice(group * size, (group + 1) * size)
        alone = search_scales(
            matrix[None, :, columns].contiguous(),
            bits=4,
            symmetric=False,
            importance=(importance[None, None, columns] / 1e30).float(),
            steps=5,
        )
        assert torch.allclose(scale[:, group], alone[0].flatten(), rtol=1e-5)
        assert torch.allclose(offset[:, group], alone[1].flatten())


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.integers(1, 5))
def test_grouped(rows: int, groups: int, size: int) -> None:
    matrix = torch.arange(rows * groups * size).reshape(rows, groups * size).float()
    found = grouped(matrix, size)
    assert found.shape == (groups, rows, size)
    assert found.is_contiguous()
    for g in range(groups):
        assert torch.equal(found[g], matrix[:, g * size : (g + 1) * size])
    assert torch.equal(grouped(matrix, 0), matrix[None])

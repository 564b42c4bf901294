"""Sums over samples: the same bits in whatever order, and however they are divided over processes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.statistics import ChannelStatistics, Hessian, InputObserver, Need, hessian_bytes
from slim_core.quantization.statistics.sums import shortened

WIDTHS = (1, 5, 64, 75, 300)  # below, at and above the rows of a strip


def samples(count: int, width: int, seed: int) -> list[Tensor]:
    """Samples whose sizes differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (3 * torch.rand(count, generator=generator) - 1.5)
    return [torch.randn(7, width, generator=generator) * size for size in sizes]


def hessian(parts: list[Tensor]) -> Hessian:
    made = Hessian()
    for part in parts:
        made.update(part)
    return made


def channels(parts: list[Tensor]) -> ChannelStatistics:
    made = ChannelStatistics()
    for part in parts:
        made.update(part)
    return made


@given(st.sampled_from(WIDTHS), st.integers(0, 99), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_neither_order_nor_division_counts(width: int, seed: int, ranks: int) -> None:
    parts = samples(40, width, seed)
    mixed = random.Random(seed).sample(parts, len(parts))
    whole, sums = hessian(parts), channels(parts)
    divided, summed = Hessian(), ChannelStatistics()
    for rank in range(ranks):
        divided.merge(hessian(mixed[rank::ranks]))
        summed.merge(channels(mixed[rank::ranks]))
    sums.settle()
    summed.settle()
    assert whole.tokens == divided.tokens == 7 * len(parts)
    assert torch.equal(whole.total, divided.total)
    for name in ("minimum", "maximum", "total", "magnitude", "square"):
        assert torch.equal(getattr(sums, name), getattr(summed, name)), name


def test_float32_alone_would_depend_on_the_order() -> None:
    """So the samples above are such that it matters."""
    parts = samples(40, 150, 0)
    sums = [torch.zeros(150, 150), torch.zeros(150, 150)]
    for total, order in zip(sums, (parts, parts[::-1]), strict=True):
        for part in order:
            total.addmm_(part.T, part)
    assert not torch.equal(*sums)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_hessian_is_that_of_all_tokens(width: int) -> None:
    parts = samples(9, width, 3)
    exact = torch.cat(parts).double()
    found = hessian(parts).total
    assert found is not None
    assert torch.allclose(found.double(), exact.T @ exact, rtol=1e-5, atol=1e-5 * float(exact.square().sum()))
    assert torch.equal(found, found.T)


def test_more_may_be_seen_after_it_was_looked_at() -> None:
    parts = samples(8, 150, 5)
    looked_at = hessian(parts[:4])
    assert looked_at.total is not None
    for part in parts[4:]:
        looked_at.update(part)
    exact = hessian(parts).total
    assert torch.allclose(looked_at.total, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))  # pyright: ignore


@pytest.mark.parametrize("width", [1024, 4096])
def test_memory_is_hardly_more_than_that_of_the_matrix(width: int) -> None:
    assert hessian_bytes(width) < 1.07 * 4 * width**2
    made = hessian([torch.ones(1, width)])
    assert sum(strip.numel() * strip.element_size() for strip in made.parts(width, torch.device("cpu"))) == (
        hessian_bytes(width)
    )


@given(st.floats(allow_nan=False, width=64))
def test_shortened(value: float) -> None:
    """24 bits, to nearest; a large number may become infinite, as any that has no room for them."""
    found = float(shortened(torch.tensor([value], dtype=torch.float64)))
    if abs(value) < 1e300:
        assert abs(found - value) <= 2.0**-24 * abs(value) + 1e-308
        again = shortened(torch.tensor([found], dtype=torch.float64))
        assert float(again) == found
    else:
        assert found == pytest.approx(value, rel=1e-6) or found in (float("inf"), float("-inf"))


def test_not_a_number_stays_that() -> None:
    odd = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=torch.float64)
    assert torch.equal(shortened(odd), odd) or bool(shortened(odd)[0].isnan())
    assert shortened(odd)[1:].tolist() == [float("inf"), float("-inf")]


def test_an_observer_rounds_its_sums_when_all_has_been_seen() -> None:
    linear = torch.nn.Linear(3, 2)
    observer = InputObserver()
    observer.watch("a", linear, (Need.CHANNELS,))
    for part in samples(5, 3, 1):
        linear(part)
    total = observer.settled()["a"].channels.total
    assert total is not None
    assert torch.equal(total, total.float().double())

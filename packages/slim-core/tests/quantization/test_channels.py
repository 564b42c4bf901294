"""Statistics of input channels, against plain sums over everything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import InvalidModelError
from slim_core.quantization.statistics import ChannelStatistics, InputStatistics, Need


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_the_statistics_of_the_concatenation(tokens: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(tokens))
    parts = [torch.randn(1, count, 3, generator=generator).to(dtype) for count in tokens]
    updated, merged = ChannelStatistics(), ChannelStatistics()
    for part in parts:
        updated.update(part)
        alone = ChannelStatistics()
        alone.update(part)
        merged.merge(alone)
    x = torch.cat(parts, 1)[0].double()
    for found in (updated, merged):
        assert found.tokens == len(x)
        if not len(x):
            assert found.mean_square("a") is None
            continue
        assert torch.equal(found.minimum, x.amin(0).float())  # pyright: ignore
        assert torch.equal(found.maximum, x.amax(0).float())  # pyright: ignore
        for sums, exact in ((found.total, x), (found.magnitude, x.abs()), (found.square, x.square())):
            assert sums is not None
            assert sums.dtype == torch.float64
            assert bool(((sums - exact.sum(0)).abs() <= 2.0**-23 * exact.abs().sum(0)).all())
        assert torch.allclose(found.mean_square("a"), x.square().mean(0), rtol=2.0**-23)  # pyright: ignore


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity(bad: float) -> None:
    seen = InputStatistics(frozenset({Need.CHANNELS}))
    seen.update(torch.tensor([[1.0, bad]]))
    seen.update(torch.ones(1, 2))
    with pytest.raises(InvalidModelError, match=r"^layers\.0\.up: its activations hold NaN or infinity"):
        seen.channels.mean_square("layers.0.up")


def test_wide_activations_and_those_in_float64_stay_as_they_are() -> None:
    x = torch.randn(700, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = x.clone()
    seen = ChannelStatistics()
    seen.update(x)
    assert torch.equal(x, before)
    for sums, exact in ((seen.total, x), (seen.magnitude, x.abs()), (seen.square, x.square())):
        assert sums is not None
        assert bool(((sums - exact.sum(0)).abs() <= 2.0**-23 * exact.abs().sum(0)).all())

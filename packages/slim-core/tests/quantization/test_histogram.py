"""Histograms of activations: exact counts, however the calibration set is cut and ordered."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import InvalidModelError, SpecError
from slim_core.quantization.statistics import Histogram, InputStatistics, Need
from slim_core.quantization.statistics import histogram as module
from slim_core.quantization.statistics.histogram import BINS

VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.floats(-4, 4, width=16)
SAMPLES = st.lists(st.lists(st.one_of(VALUES, SMALL), min_size=1, max_size=5), min_size=1, max_size=6)


def counted(parts: list[list[float]]) -> Histogram:
    found = Histogram()
    for part in parts:
        found.update(torch.tensor(part))
    return found


def same(one: Histogram, other: Histogram) -> bool:
    assert one.counts is not None
    assert other.counts is not None
    fields = [(h.start, h.exponent, h.minimum, h.maximum, h.finite) for h in (one, other)]
    return torch.equal(one.counts, other.counts) and fields[0] == fields[1]


def naive(values: list[float], found: Histogram) -> dict[int, int]:
    """Counts by the index of the bin, with exact fractions."""
    width, counts = Fraction(2) ** found.exponent, {}
    for value in values:
        index = math.floor(Fraction(value) / width)
        counts[index] = counts.get(index, 0) + 1
    return counts


@settings(max_examples=60)
@given(SAMPLES)
def test_counts_are_exact(samples: list[list[float]]) -> None:
    found = counted(samples)
    values = [value for sample in samples for value in sample]
    assert found.counts is not None
    assert found.counts.dtype == torch.int64
    assert {int(i) + found.start: int(found.counts[i]) for i in found.counts.nonzero()} == naive(values, found)
    assert (found.minimum, found.maximum) == (min(values), max(values))
    assert len(found.counts) <= BINS
    assert int(found.counts[0]) > 0
    assert int(found.counts[-1]) > 0


@settings(max_examples=60)
@given(SAMPLES, st.data())
def test_order_batches_and_ranks_do_not_matter(samples: list[list[float]], data: st.DataObject) -> None:
    whole = counted([[value for sample in samples for value in sample]])
    assert same(counted(samples), whole)
    shuffled = data.draw(st.permutations(samples))
    cut = data.draw(st.integers(0, len(samples)))
    left, right = counted(shuffled[:cut]), counted(shuffled[cut:])
    before = right.counts.clone() if right.counts is not None else None
    left.merge(right)
    assert same(left, whole)
    assert before is None or torch.equal(right.counts, before)  # pyright: ignore


@settings(max_examples=60)
@given(SAMPLES, st.sampled_from([2, 3, 16, 100, 2048, BINS]))
def test_fewer_bins_are_those_that_would_have_been_counted(samples: list[list[float]], bins: int) -> None:
    values = [value for sample in samples for value in sample]
    coarse = counted(samples).seen("a", bins)
    assert coarse.counts is not None
    assert len(coarse.counts) <= bins
    assert {int(i) + coarse.start: int(coarse.counts[i]) for i in coarse.counts.nonzero()} == naive(values, coarse)
    if bins > 2 and min(values) < max(values) and coarse.exponent > module._LEAST_EXPONENT:
        size = max(map(abs, values))
        finer = coarse.exponent - 1  # half the width must not have fitted, or be finer than the numbers themselves
        fits = math.floor(math.ldexp(max(values), -finer)) - math.floor(math.ldexp(min(values), -finer)) < bins
        assert not fits or finer < math.frexp(size)[1] - 24


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=30), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_that_of_the_float32_upcast(bits: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.where(x.isfinite(), x, torch.zeros_like(x))
    half, full = Histogram(), Histogram()
    half.update(x)
    full.update(x.float())
    assert same(half, full)


def test_many_values_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    whole, parts = Histogram(), Histogram()
    whole.update(x)
    monkeypatch.setattr(module, "_CHUNK", 7)
    parts.update(x.reshape(4, 10, 50).transpose(0, 1))  # not contiguous
    assert same(whole, parts)
    assert whole.counts is not None
    assert int(whole.counts.sum()) == 2000
    assert len(whole.counts) > BINS // 4


def test_a_hundred_million_values_are_counted_in_integers() -> None:
    found = counted([[1.0, 2.0]])
    assert found.counts is not None
    found.counts *= 10**8
    found.update(torch.tensor([1.0]))
    assert int(found.counts[0]) == 10**8 + 1


@pytest.mark.parametrize("value", [0.0, -0.0, 1.7, -3.0, 1e-45, 3e38, -1e-20])
def test_a_constant_has_one_bin(value: float) -> None:
    x = torch.full((3, 4), value)
    found = Histogram()
    found.update(x)
    found.update(x)
    assert found.counts is not None
    assert found.counts.tolist() == [24]
    assert found.edges().tolist() == [float(x[0, 0]), float(x[0, 0])]


def test_no_values_are_no_observation() -> None:
    found = counted([[1.0, 3.0]])
    before = found.seen("a")
    found.update(torch.empty(0, 4))
    found.merge(Histogram())
    assert same(found, before)
    with pytest.raises(SpecError, match=r"^layers\.0\.up: no calibration sample reached this linear"):
        Histogram().seen("layers.0.up")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity(bad: float, position: int, dtype: torch.dtype) -> None:
    parts: list[Tensor] = [torch.randn(3, 2).to(dtype) for _ in range(3)]
    parts[position][1, 1] = bad
    found = Histogram()
    for part in parts:
        found.update(part)
    merged = counted([[1.0]])
    merged.merge(found)
    for histogram in (found, merged):
        with pytest.raises(InvalidModelError, match=r"^layers\.0\.up: its activations hold NaN or infinity"):
            histogram.seen("layers.0.up")


def test_edges_are_drawn_in_to_the_extremes() -> None:
    found = counted([[-1.3, 0.2, 5.1]]).seen("a", 8)
    edges = found.edges()
    assert found.counts is not None
    assert len(edges) == len(found.counts) + 1
    assert float(edges[0]) == pytest.approx(-1.3)
    assert float(edges[-1]) == pytest.approx(5.1)
    assert bool((edges.diff()[1:-1] == 2.0**found.exponent).all())


def test_statistics_count_on_request() -> None:
    x = torch.randn(2, 3, 4)
    seen, plain = InputStatistics(frozenset({Need.HISTOGRAM})), InputStatistics(frozenset({Need.RANGE}))
    seen.update(x)
    plain.update(x)
    assert plain.histogram.counts is None
    assert seen.histogram.counts is not None
    other = InputStatistics(frozenset({Need.HISTOGRAM}))
    other.update(x * 2)
    other.merge(seen)
    assert int(other.histogram.seen("a").counts.sum()) == 48  # pyright: ignore
    assert other.range.maximum == other.histogram.maximum

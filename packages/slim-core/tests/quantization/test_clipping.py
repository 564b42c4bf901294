"""Clipping ranges of static activations, against brute force over every range."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import InvalidModelError, SpecError
from slim_core.quantization import clipping
from slim_core.quantization.activations import HistogramOptions, static_parameters
from slim_core.quantization.affine import EPSILON, quantize, stored_parameters
from slim_core.quantization.building import build_layer, needs_of
from slim_core.quantization.clipping import clipping_range
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import MixedInt8, StaticInt8
from slim_core.quantization.statistics import Histogram, InputStatistics, Need
from slim_core.quantization.weights import QuantizedWeight
from slim_core.recipe.qconfig import ActConfig, LinearQConfig

SIDES = [True, False]
DTYPES = [None, torch.bfloat16, torch.float16]
Ends = tuple[float, float]


def draws(kind: str, count: int = 30_000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    match kind:
        case "outliers":
            return torch.where(torch.rand(count, generator=generator) < 1e-4, 60 * x, x)
        case "heavy":
            return x / torch.randn(3, count, generator=generator).square().mean(0).sqrt()
        case "laplace":
            return x.abs() * x
        case "one-sided":
            return x.exp()
        case "negative":
            return -x.exp()
        case "relu":
            return x.relu()
        case "far":
            return x + 30
        case _:
            return x


KINDS = ["gauss", "outliers", "heavy", "laplace", "one-sided", "negative", "relu", "far"]


def histogram(x: Tensor, bins: int) -> Histogram:
    found = Histogram()
    found.update(x)
    return found.seen("a", bins)


def grid(symmetric: bool, dtype: torch.dtype | None = None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda low, high: stored_parameters(low, high, 8, symmetric, dtype)


def scheme(ends: Ends, symmetric: bool, dtype: torch.dtype | None) -> tuple[float, float]:
    scale, offset = stored_parameters(*(torch.tensor([end]) for end in ends), 8, symmetric, dtype)
    return float(scale), float(offset)


def naive_error(seen: Histogram, scale: float, offset: float) -> float:
    """Squared error with values spread evenly over bins: every bin cut by every cell, and integrated."""
    assert seen.counts is not None
    a, b = seen.edges().numpy()[:-1, None], seen.edges().numpy()[1:, None]
    counts = seen.counts.numpy()[:, None]
    levels = (np.arange(-128, 128) - offset) * scale
    borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    low, high = np.maximum(a, borders[:-1]), np.minimum(b, borders[1:])
    cubes = np.where(high > low, ((high - levels) ** 3 - (low - levels) ** 3) / 3, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(b > a, cubes / (b - a), 0)
    point = np.where(b > a, 0, np.min((a - levels) ** 2, axis=1, keepdims=True) / len(levels))
    return float((counts * (spread + point)).sum())


def ranges(seen: Histogram, symmetric: bool) -> list[Ends]:
    """Every range whose ends are borders of bins, or zero."""
    edges = [float(edge) for edge in seen.edges()]
    if symmetric:
        return [(-abs(edge), abs(edge)) for edge in (0.0, *edges)]
    return [(low, high) for low in (0.0, *edges) for high in (0.0, *edges) if low <= 0 <= high]


def data_error(x: Tensor, ends: tuple[Tensor, Tensor], symmetric: bool, dtype: torch.dtype | None = None) -> float:
    scale, offset = stored_parameters(*ends, 8, symmetric, dtype)
    back = (quantize(x, scale, offset, 8).double() - offset.double()) * scale.double()
    return float((back - x.double()).square().mean())


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.min().reshape(1).float(), x.max().reshape(1).float()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=16), min_size=1, max_size=12),
    st.sampled_from(SIDES),
    st.sampled_from(DTYPES),
    st.integers(2, 14),
)
def test_equals_brute_force_on_small_histograms(
    values: list[float], symmetric: bool, dtype: torch.dtype | None, bins: int
) -> None:
    seen = histogram(torch.tensor(values), bins)
    low, high = clipping_range(seen, grid(symmetric, dtype), symmetric=symmetric)
    assert low.shape == high.shape == (1,)
    assert low.dtype == high.dtype == torch.float32
    assert float(low) <= 0 <= float(high)
    found = naive_error(seen, *scheme((float(low), float(high)), symmetric, dtype))
    best = min(naive_error(seen, *scheme(ends, symmetric, dtype)) for ends in ranges(seen, symmetric))
    assert found == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", SIDES)
def test_large_histograms_are_searched_nearly_as_well(
    kind: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = histogram(draws(kind), 256)
    found = clipping_range(seen, grid(symmetric), symmetric=symmetric)
    monkeypatch.setattr(clipping, "_EXHAUSTIVE", 1 << 20)
    best = clipping_range(seen, grid(symmetric), symmetric=symmetric)
    errors = [
        naive_error(seen, *(float(p) for p in stored_parameters(*ends, 8, symmetric, None))) for ends in (found, best)
    ]
    assert errors[0] <= 1.002 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", SIDES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bins", [2, 100, 1000])
def test_never_worse_than_the_extremes(kind: str, symmetric: bool, dtype: torch.dtype | None, bins: int) -> None:
    x = draws(kind, 5000)
    seen = histogram(x, bins)
    found = clipping_range(seen, grid(symmetric, dtype), symmetric=symmetric)
    errors = [
        naive_error(seen, *(float(p) for p in stored_parameters(*ends, 8, symmetric, dtype)))
        for ends in (found, extremes(x))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    if bins > 2:
        plain = data_error(x, extremes(x), symmetric, dtype)
        assert data_error(x, found, symmetric, dtype) <= plain * (1.05 if bins > 100 else 1.1)


@pytest.mark.parametrize(("kind", "gain"), [("outliers", 0.95), ("heavy", 0.95), ("laplace", 0.95), ("gauss", 0.95)])
@pytest.mark.parametrize("symmetric", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_pays_on_heavy_tails(kind: str, gain: float, symmetric: bool, dtype: torch.dtype) -> None:
    x = draws(kind).to(dtype)
    found = clipping_range(histogram(x, 8192), grid(symmetric), symmetric=symmetric)
    assert float(found[1]) < float(x.max())
    assert data_error(x.float(), found, symmetric) < gain * data_error(x.float(), extremes(x), symmetric)


@pytest.mark.parametrize("symmetric", SIDES)
@pytest.mark.parametrize("metric", ["mse", "percentile", "entropy"])
@pytest.mark.parametrize("value", [0.0, 2.5, -3.0, 1e-30, 1e30])
def test_a_single_value_is_represented_exactly(symmetric: bool, metric: clipping.Metric, value: float) -> None:
    x = torch.full((5,), value)
    ends = clipping_range(histogram(x, 64), grid(symmetric), symmetric=symmetric, metric=metric)
    scale, offset = stored_parameters(*ends, 8, symmetric, None)
    back = (quantize(x, scale, offset, 8).float() - offset) * scale
    assert bool(((back - x).abs() <= 1e-6 * x.abs() + EPSILON).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentile(kind: str, percentile: float) -> None:
    x = draws(kind, 20_000)
    seen = histogram(x, 8192)
    for symmetric in SIDES:
        low, high = clipping_range(
            seen, grid(symmetric), symmetric=symmetric, metric="percentile", percentile=percentile
        )
        assert not symmetric or float(low) == -float(high)
        width, wanted = 2.0**seen.exponent, percentile / 100 * len(x)
        if symmetric:
            assert int((x.abs() < high - width).sum()) <= wanted <= int((x.abs() <= high + width).sum()) + 1
            continue
        tail = (len(x) - wanted) / 2
        for end, values in ((high, x), (-low, -x)):
            if float(values.max()) <= 0:
                assert float(end) == 0
            elif float(end) > 0:
                assert int((values > end + width).sum()) <= tail <= int((values >= end - width).sum()) + 1
    if percentile == 100:
        assert float(high) == max(0.0, float(x.max()))


def naive_divergence(counts: np.ndarray, borders: np.ndarray) -> float:
    """Kullback-Leibler divergence, bin by bin; ``borders`` are the cells of the levels in bins."""
    first, last = borders[0], borders[-1]
    inside = np.flatnonzero(counts[first:last]) + first
    if not len(inside):
        return math.inf
    reference = np.zeros(len(counts))
    reference[first:last] = counts[first:last]
    reference[inside[0]] += counts[:first].sum()
    reference[inside[-1]] += counts[last:].sum()
    represented = np.zeros(len(counts))
    for start, stop in pairwise(borders):
        filled = counts[start:stop] > 0
        if filled.any():
            represented[start:stop][filled] = counts[start:stop].sum() / filled.sum()
    p, q = reference / reference.sum(), represented / represented.sum()
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("kind", ["gauss", "heavy", "far"])
@pytest.mark.parametrize("count", [300, 20_000])
def test_entropy_equals_brute_force(kind: str, count: int) -> None:
    seen = histogram(draws(kind, count), 600)
    assert seen.counts is not None
    counts, zero = seen.counts.numpy().astype(float).copy(), -seen.start
    if 0 < zero < len(counts) - 1:
        counts[zero] = min(counts[zero], max(counts[zero - 1], counts[zero + 1]))
    costs: dict[float, float] = {}
    for _, end in ranges(seen, symmetric=True):
        scale = max(end / 127, EPSILON)
        borders = np.round((np.arange(-128, 129) - 0.5) * np.float64(np.float32(scale)) / 2.0**seen.exponent)
        borders = np.clip(borders - seen.start, 0, len(counts)).astype(int)
        if counts[borders[0] : borders[-1]].sum() == counts.sum() or borders[-1] - borders[0] >= 256:
            costs[end] = naive_divergence(counts, borders)
    _, high = clipping_range(seen, grid(True), symmetric=True, metric="entropy")
    found = min(costs, key=lambda end: abs(end - float(high)))
    assert found == pytest.approx(float(high), rel=1e-6)
    assert costs[found] <= min(costs.values()) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", SIDES)
def test_entropy_keeps_the_bulk(kind: str, symmetric: bool) -> None:
    x = draws(kind)
    low, high = clipping_range(histogram(x, 8192), grid(symmetric), symmetric=symmetric, metric="entropy")
    kept = (x >= low) & (x <= high)
    assert float(kept.float().mean()) > 0.98


def statistics(*parts: Tensor) -> InputStatistics:
    seen = InputStatistics(frozenset({Need.HISTOGRAM}))
    for part in parts:
        seen.update(part)
    return seen


def act(symmetric: bool = False, scope: str = "per_tensor", **ext: object) -> ActConfig:
    return ActConfig.model_validate({"scope": scope, "symmetric": symmetric, "method": "histogram", "ext": ext})


@pytest.mark.parametrize("symmetric", SIDES)
@pytest.mark.parametrize("metric", ["mse", "percentile", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_and_batches_of_samples_do_not_matter(symmetric: bool, metric: str, dtype: torch.dtype | None) -> None:
    """The reference tool takes the range of the last sample."""
    x = draws("heavy", 6000).reshape(6, 100, 10)
    x[3] *= 20
    config = act(symmetric, metric=metric)
    whole = static_parameters(config, statistics(x), "a", dtype)
    constant, empty = torch.full((1, 4, 10), 0.5), torch.empty(1, 0, 10)
    for parts in (list(x.split(1)), list(x.flip(0).split(1)), list(x.split(4)), [*x.split(1), empty]):
        assert static_parameters(config, statistics(*parts), "a", dtype) == whole
    ends = [static_parameters(config, statistics(*p), "a", dtype) for p in ([constant, x], [x, constant])]
    assert ends[0] == ends[1]
    assert float(ends[0][0]) == pytest.approx(float(whole[0]), rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", SIDES)
def test_the_layer_clips(dtype: torch.dtype | None, symmetric: bool) -> None:
    x = draws("outliers", 40_000).reshape(1, -1, 8)
    config, seen = act(symmetric), statistics(x)
    weight = QuantizedWeight(torch.eye(8, dtype=torch.int8), torch.ones(8, 1), torch.zeros(8, 1), 0.0)
    layer = build_layer(LayerForm(LayerKind.W8A8), weight, config, seen=seen, bias=None, name="a", dtype=dtype)
    assert isinstance(layer, StaticInt8)
    scale, offset = layer.input_scale, layer.input_offset
    assert dtype is None or torch.equal(scale.to(dtype).float(), scale)
    assert float(offset) == round(float(offset))
    assert (float(offset) == 0) == symmetric
    y, limits = layer.simulate(x), [float((code - offset) * scale) for code in (-128, 127)]
    assert limits[0] * (1 + 1e-6) <= float(y.min()) < float(y.max()) <= limits[1] * (1 + 1e-6)
    clipped = (x < limits[0]) | (x > limits[1])
    assert 0 < int(clipped.sum()) < 20
    assert torch.allclose(y[clipped], x[clipped].clamp(*limits))
    plain = static_parameters(config.model_copy(update={"method": "minmax", "ext": {}}), seen, "a", dtype)
    assert float((y - x).square().mean()) < 0.97 * data_error(x, extremes(x), symmetric, dtype)
    assert float(scale) < float(plain[0])


def test_mixed_layers_clip_too() -> None:
    seen = statistics(draws("outliers", 40_000).reshape(1, -1, 8))
    weight = QuantizedWeight(torch.eye(8, dtype=torch.int8), torch.ones(8, 1), torch.zeros(8, 1), 0.0)
    form = LayerForm(LayerKind.W8A8_MIX)
    layer = build_layer(form, weight, act(scope="pd_mix"), seen=seen, bias=None, name="a", dtype=None)
    assert isinstance(layer, MixedInt8)
    assert torch.equal(layer.static.input_scale, static_parameters(act(), seen, "a", None)[0])


def test_nothing_observed_nan_and_infinity() -> None:
    with pytest.raises(SpecError, match=r"^a: no calibration sample reached"):
        static_parameters(act(), statistics(), "a", None)
    with pytest.raises(SpecError, match=r"^a: no calibration sample reached"):
        static_parameters(act(), statistics(torch.empty(1, 0, 4)), "a", None)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(InvalidModelError, match=r"^a: its activations hold NaN or infinity"):
            static_parameters(act(), statistics(torch.tensor([[1.0, bad]]), torch.ones(1, 2)), "a", None)


def test_settings_of_the_recipe() -> None:
    assert HistogramOptions.of(act().ext) == HistogramOptions(8192, "mse", 99.99)
    given_ = act(bins=64, metric="percentile", percentile=90)
    assert HistogramOptions.of(given_.ext) == HistogramOptions(64, "percentile", 90)
    assert needs_of(LinearQConfig(act=act(), weight={})) == {Need.HISTOGRAM}  # pyright: ignore
    seen = statistics(draws("heavy").reshape(1, -1, 10))
    scales = {
        (metric, bins): float(static_parameters(act(True, metric=metric, bins=bins), seen, "a", None)[0])
        for metric in ("mse", "percentile", "entropy")
        for bins in (300, 8192)
    }
    assert len(set(scales.values())) == 6
    wide = static_parameters(act(True, metric="percentile", percentile=100), seen, "a", None)
    assert float(wide[0]) == pytest.approx(float(draws("heavy").abs().max()) / 127)

"""Activation ranges: the same however the calibration set is cut and ordered."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slim_core.errors import InvalidModelError, SpecError
from slim_core.quantization.statistics import InputObserver, TensorRange, observe_range

SAMPLE = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6).filter(lambda values: len(values) % 2 == 0)
SAMPLES = st.lists(SAMPLE, min_size=1, max_size=6)


def tensors(samples: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(sample).reshape(1, -1, 2) for sample in samples]


def merged(parts: list[TensorRange]) -> TensorRange:
    total = TensorRange()
    for part in parts:
        total.merge(part)
    return total


@given(SAMPLES, st.data())
def test_order_does_not_matter(samples: list[list[float]], data: st.DataObject) -> None:
    parts = [observe_range(x) for x in tensors(samples)]
    shuffled = data.draw(st.permutations(parts))
    assert merged(parts).bounds("max", "x") == merged(shuffled).bounds("max", "x")
    mean, other = merged(parts).bounds("mean", "x"), merged(shuffled).bounds("mean", "x")
    assert torch.allclose(torch.cat(mean), torch.cat(other), rtol=1e-6, atol=1e-8)


@given(SAMPLES)
def test_equals_the_range_of_the_concatenation(samples: list[list[float]]) -> None:
    parts = tensors(samples)
    low, high = merged([observe_range(x) for x in parts]).bounds("max", "x")
    everything = torch.cat([x.flatten() for x in parts])
    assert low.shape == high.shape == (1,)
    assert (low, high) == (everything.min(), everything.max())


@given(SAMPLES)
def test_mean_of_the_extremes_of_each_sample(samples: list[list[float]]) -> None:
    low, high = merged([observe_range(x) for x in tensors(samples)]).bounds("mean", "x")
    assert float(low) == pytest.approx(math.fsum(map(min, samples)) / len(samples), rel=1e-6, abs=1e-6)
    assert float(high) == pytest.approx(math.fsum(map(max, samples)) / len(samples), rel=1e-6, abs=1e-6)


def test_a_batch_is_as_many_samples_as_it_has_rows() -> None:
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0)) * 1e3
    batch, single = observe_range(x), merged([observe_range(row[None]) for row in x])
    assert batch == single
    assert batch.samples == 5
    assert batch.tokens == 35


def test_a_matrix_is_one_sample() -> None:
    found = observe_range(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    assert (found.minimum, found.maximum, found.samples, found.tokens) == (-2.0, 3.0, 1, 2)


@pytest.mark.parametrize("shape", [(0, 8), (1, 0, 8), (0, 5, 8)])
def test_no_tokens_are_no_observation(shape: tuple[int, ...]) -> None:
    assert observe_range(torch.empty(shape)) == TensorRange()
    seen = observe_range(torch.ones(1, 2, 2))
    before = seen.bounds("mean", "x")
    seen.merge(observe_range(torch.empty(shape)))
    assert seen.bounds("mean", "x") == before


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_nothing_observed(aggregation: str) -> None:
    with pytest.raises(SpecError, match=r"^layers\.0\.up: no calibration sample reached this linear"):
        TensorRange().bounds(aggregation, "layers.0.up")


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity(aggregation: str, bad: float, position: int, dtype: torch.dtype) -> None:
    parts = [torch.randn(1, 3, 2).to(dtype) for _ in range(3)]
    parts[position][0, 1, 1] = bad
    total = merged([observe_range(x) for x in parts])
    with pytest.raises(InvalidModelError, match=r"^layers\.0\.up: its activations hold NaN or infinity"):
        total.bounds(aggregation, "layers.0.up")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.down = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.q(x) + self.k(input=x))


def test_observer_sees_inputs_however_they_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, observer = Pair(), InputObserver()
    calls: list[Tensor] = []

    def counted(x: Tensor) -> TensorRange:
        calls.append(x)
        return observe_range(x)

    monkeypatch.setattr("slim_core.quantization.statistics.inputs.observe_range", counted)
    for name in ("q", "k", "down"):
        observer.watch(name, block.get_submodule(name))
    inputs = [torch.randn(1, 3, 4), torch.randn(1, 5, 4)]
    for x in inputs:
        block(x)
    assert len(calls) == 4  # q and k share their input
    assert observer.statistics["q"] is observer.statistics["k"]
    assert observer.statistics["q"].range == merged([observe_range(x) for x in inputs])
    assert observer.statistics["down"].tokens == 8
    observer.stop()
    block(torch.full((1, 1, 4), 1e6))
    assert observer.statistics["q"].range.maximum < 1e6


def test_observer_tells_apart_tensors_that_follow_each_other() -> None:
    linear, observer = nn.Linear(1, 1), InputObserver()
    observer.watch("x", linear)
    for value in range(50):
        linear(torch.full((1, 1, 1), float(value)))  # may reuse the memory of the one before
    assert observer.statistics["x"].range.maximum == 49
    assert observer.statistics["x"].range.samples == 50

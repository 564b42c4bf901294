"""The state of a weight that is being learned, and the linear that stands in meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import by_groups
from slim_core.quantization.autoround.inputs import DynamicInput, FloatInput, InputRounding, StaticInput
from slim_core.quantization.autoround.rounding import WeightGrid, fake_quantized
from slim_core.quantization.autoround.start import searched_factors
from slim_core.quantization.autoround.tuned import TunedLinear, TunedWeight
from slim_core.quantization.building import build_layer
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import StaticInt8
from slim_core.quantization.methods.ssz import ssz_weight
from slim_core.quantization.statistics import InputStatistics, observe_range
from slim_core.quantization.weights import InMemory
from slim_core.recipe.qconfig import ActConfig

FOUR, EIGHT = WeightGrid(4), WeightGrid(8)
GRIDS = [WeightGrid(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tuned(weight: Tensor, grid: WeightGrid = FOUR, group_size: int = 0) -> TunedWeight:
    return TunedWeight(weight, grid, group_size, "a.weight")


def push(one: TunedWeight, lr: float, minmax_lr: float, gradient: Tensor) -> None:
    one.value.grad = gradient
    one.step(lr, minmax_lr)


@given(st.integers(0, 1000), st.sampled_from([0, 4]), st.sampled_from(GRIDS), st.integers(1, 12))
def test_parameters_stay_in_their_bounds(seed: int, group_size: int, grid: WeightGrid, steps: int) -> None:
    """Whatever the gradients, v moves a weight to one of its neighbours at four bits, to the next but one at eight."""
    weight = random(3, 8, seed=seed)
    one = tuned(weight, grid, group_size)
    for step in range(steps):
        push(one, 0.4, 0.3, random(3, 8, seed=seed + step))
    assert one.shift is not None
    bound = 0.5 if grid.bits == 4 else 1.0
    assert float(one.shift.abs().max()) <= bound
    for factor in (one.span.alpha, one.span.beta):
        assert float(factor.min()) >= 0
        assert float(factor.max()) <= 1
    one.keep()
    codes = one.best().codes
    assert int(codes.min()) >= grid.lowest
    assert int(codes.max()) <= grid.highest


@pytest.mark.parametrize(("grid", "most"), [(FOUR, 1.0), (EIGHT, 1.5)], ids=str)
def test_rounding_alone_goes_to_a_neighbour(grid: WeightGrid, most: float) -> None:
    weight = random(16, 32)
    one = tuned(weight, grid)
    nearest = one.best()
    for _ in range(30):
        push(one, 0.1, 0.0, random(16, 32, seed=7))  # the same way every time: as far as it goes
    one.keep()
    moved = one.best()
    assert torch.equal(moved.scale, nearest.scale)
    assert float((weight / moved.scale - moved.codes).abs().max()) <= most + 1e-4
    assert bool((moved.codes != nearest.codes).any())


def test_a_step_lowers_a_loss() -> None:
    weight, wanted = random(4, 16), random(4, 16, seed=1)
    one = tuned(weight)

    def loss() -> Tensor:
        return ((one.value - wanted) ** 2).sum()

    before = float(loss().detach())
    for _ in range(20):
        loss().backward()
        one.step(0.05, 0.02)
    assert float(loss().detach()) < 0.98 * before
    assert one.value.grad is None


def test_without_a_gradient_nothing_happens() -> None:
    one = tuned(random(4, 16))
    before = one.value.detach().clone()
    one.step(0.5, 0.5)
    assert torch.equal(one.value, before)
    assert one.shift is None


@pytest.mark.parametrize(("lr", "minmax_lr"), [(0.1, 0.0), (0.0, 0.1)])
def test_what_has_no_rate_stays(lr: float, minmax_lr: float) -> None:
    one = tuned(random(4, 16), group_size=4)
    for seed in range(3):
        push(one, lr, minmax_lr, random(4, 16, seed=seed))
    assert (one.shift is None) == (lr == 0)
    assert bool((one.span.alpha < 1).any() or (one.span.beta < 1).any()) == (minmax_lr > 0)


def test_momentum_keeps_a_share_of_the_gradient() -> None:
    """Two steps with momentum are those along the first gradient and along the sum."""
    one, other = tuned(random(4, 16)), tuned(random(4, 16))
    first, second = random(4, 16, seed=1), random(4, 16, seed=2)
    push(one, 0.1, 0.1, first.clone())
    push(one, 0.1, 0.1, first * 0.5 + second)
    other.value.grad = first.clone()
    other.step(0.1, 0.1, 0.5)
    assert torch.equal(other.value.grad, first * 0.5)
    other.value.grad += second
    other.step(0.1, 0.1, 0.5)
    assert torch.equal(one.value, other.value)


def test_momentum_does_not_keep_what_is_no_number() -> None:
    one = tuned(random(1, 3))
    one.value.grad = torch.tensor([[float("nan"), float("inf"), 2.0]])
    one.step(0.1, 0.1, 0.5)
    assert one.value.grad.tolist() == [[0.0, 0.0, 1.0]]


def test_memory() -> None:
    one = tuned(random(64, 128))
    push(one, 0.1, 0.1, random(64, 128))
    one.value.grad = random(64, 128)
    parts = [one.shift, one.value, one.value.grad, one._best[0]]
    assert sum(part.nbytes for part in parts if part is not None) == TunedWeight.BYTES * 64 * 128
    assert one._weight.untyped_storage().data_ptr() == tuned(one._weight.flatten(1))._weight.data_ptr()  # no copy


def test_gradients_that_are_no_numbers_say_nothing() -> None:
    one = tuned(random(1, 8))
    before = one.value.detach().clone()
    push(one, 0.1, 0.1, torch.full((1, 8), float("nan")))
    assert torch.equal(one.value, before)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group_size", [0, 4])
def test_best_is_the_state_that_was_kept(grid: WeightGrid, group_size: int) -> None:
    one = tuned(random(5, 8), grid, group_size)
    push(one, 0.3, 0.2, random(5, 8, seed=1))
    one.keep()
    value = one.value.detach().clone()
    push(one, 0.3, 0.2, random(5, 8, seed=2))
    assert not torch.equal(one.value, value)
    best = one.best()
    assert torch.equal(best.dequantized(), value)
    noise, signal = float((value - random(5, 8)).square().sum()), float(random(5, 8).square().sum())
    assert 10 ** (best.sqnr_db / 10) == pytest.approx(signal / noise, rel=1e-4)


def test_the_value_follows_the_state() -> None:
    weight = random(6, 8)
    one = tuned(weight, WeightGrid(4, False, torch.bfloat16), 4)
    for seed in range(4):
        push(one, 0.2, 0.1, random(6, 8, seed=seed))
        want = fake_quantized(by_groups(weight, 2), one.span, one.shift, one.grid)
        assert torch.equal(one.value, want.flatten(1))
    one.restart(torch.full((6, 2, 1), 0.5), torch.full((6, 2, 1), 0.25))
    assert one.shift is None
    assert torch.equal(one.value, fake_quantized(by_groups(weight, 2), one.span, None, one.grid).flatten(1))


@pytest.mark.parametrize("width", [3, 300_000])
def test_blocks_of_rows_do_not_matter(width: int) -> None:
    """The wider matrix is worked on row by row."""
    weight, upstream = random(3, width), random(3, width, seed=1)
    whole = tuned(weight)
    push(whole, 0.1, 0.1, upstream.clone())
    for row in range(3):
        single = tuned(weight[row : row + 1])
        push(single, 0.1, 0.1, upstream[row : row + 1].clone())
        assert torch.equal(single.value[0], whole.value[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number(bad: float) -> None:
    weight = random(4, 8)
    weight[2, 5] = bad
    with pytest.raises(InvalidModelError, match=r"^a\.weight: the weight holds NaN or infinity in row 2"):
        tuned(weight)


def test_a_scale_that_its_precision_cannot_hold() -> None:
    weight = torch.full((2, 4), 1e7)
    with pytest.raises(InvalidModelError, match=r"^a\.weight: a scale .* too large for float16 \(use ext\.scale_dtype"):
        tuned(weight, WeightGrid(4, True, torch.float16))
    tuned(weight, WeightGrid(4, True, torch.bfloat16))


@pytest.mark.parametrize("weight", [torch.zeros(2, 4), torch.full((2, 4), -3.0), torch.ones(1, 1), torch.ones(3, 1)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_odd_weights(weight: Tensor, grid: WeightGrid) -> None:
    one = tuned(weight, grid)
    push(one, 0.1, 0.1, torch.ones_like(weight))
    one.restart(*searched_factors(one.exact, one.span, grid, torch.ones(weight.shape[1]), 0))
    one.keep()
    assert torch.isfinite(one.best().dequantized()).all()
    assert float((one.best().dequantized() - weight).abs().max()) <= 0.01 * float(weight.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mapped_file_is_only_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """The mapping is read-only: writing to a view of it would end the process."""
    weight = random(8, 16).to(dtype)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    one = tuned(Checkpoint(tmp_path).load("w"), group_size=4)
    one.restart(*searched_factors(one.exact, one.span, one.grid, torch.ones(16), 4))
    push(one, 0.1, 0.1, random(8, 16, seed=1))
    one.keep()
    one.best()
    assert torch.equal(Checkpoint(tmp_path).load("w"), weight)


def error(weight: Tensor, value: Tensor, energy: Tensor, groups: int) -> Tensor:
    return by_groups((weight - value).double().square() * energy, groups).sum(2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group_size", [0, 8])
def test_the_searched_start_is_better_than_the_extremes(grid: WeightGrid, group_size: int) -> None:
    weight = random(24, 32) ** 3
    energy = random(32, seed=3) ** 2
    one = tuned(weight, grid, group_size)
    nearest = one.value.detach().clone()
    one.restart(*searched_factors(one.exact, one.span, grid, energy, group_size))
    before, after = (error(weight, value, energy, one.groups) for value in (nearest, one.value.detach()))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.95 * float(before.sum())


@pytest.mark.parametrize("grid", [WeightGrid(8, True, torch.bfloat16), WeightGrid(4, False, torch.float16)], ids=str)
def test_the_searched_start_knows_the_precision_of_scales(grid: WeightGrid) -> None:
    """A scale found by search and rounded may be worse than the plain one; then the plain one stays."""
    weight, energy = random(64, 32), torch.ones(32)
    one = tuned(weight, grid, 8)
    nearest = one.value.detach().clone()
    one.restart(*searched_factors(one.exact, one.span, grid, energy, 8))
    assert bool((one.span.alpha == 1).any())
    before, after = (error(weight, value, energy, 4) for value in (nearest, one.value.detach()))
    assert bool((after <= before * (1 + 1e-5)).all())


def test_factors_stay_below_where_they_began() -> None:
    one = tuned(random(6, 8), group_size=4)
    start = torch.full((6, 2, 1), 0.9).index_fill(0, torch.tensor([2]), 1.25)
    one.restart(start.clone(), start.clone())
    for seed in range(8):
        push(one, 0.0, 0.3, random(6, 8, seed=seed))
        for factor in (one.span.alpha, one.span.beta):
            assert bool((factor <= start.clamp(min=1.0)).all())
            assert float(factor.min()) >= 0
    assert bool((one.span.alpha != start).any())


def test_the_searched_start_is_that_of_ssz() -> None:
    weight = random(16, 32)
    one = tuned(weight)
    one.restart(*searched_factors(one.exact, one.span, one.grid, torch.ones(32), 0))
    one.keep()
    found, want = one.best(), ssz_weight(InMemory(weight), bits=4, name="w")
    assert torch.allclose(found.scale, want.scale, rtol=1e-6)
    assert float((found.codes != want.codes).float().mean()) < 0.01  # ties that the last bit of a scale decides


KINDS: list[tuple[LayerKind, int, bool, dict[str, Any] | None]] = [
    (LayerKind.W8A16, 0, True, None),
    (LayerKind.W8A16, 8, False, None),
    (LayerKind.W4A16, 8, False, None),
    (LayerKind.W8A8_DYNAMIC, 0, True, {"dtype": "int8", "scope": "per_token"}),
    (LayerKind.W8A8_DYNAMIC, 8, True, {"dtype": "int8", "scope": "per_token"}),
    (LayerKind.W4A8_DYNAMIC, 0, True, {"dtype": "int8", "scope": "per_token"}),
    (LayerKind.W4A8_DYNAMIC, 8, True, {"dtype": "int8", "scope": "per_token"}),
    (LayerKind.W4A4_DYNAMIC, 0, False, {"dtype": "int4", "scope": "per_token"}),
    (LayerKind.W4A4_DYNAMIC, 8, True, {"dtype": "int4", "scope": "per_token"}),
    (LayerKind.W8A8, 0, True, {"dtype": "int8", "scope": "per_tensor", "symmetric": False}),
]


@pytest.mark.parametrize(("kind", "group_size", "symmetric", "act"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_computes_what_the_quantized_layer_computes(
    kind: LayerKind,
    group_size: int,
    symmetric: bool,
    act: dict[str, Any] | None,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    """What is trained is what is written."""
    x, bias = random(3, 5, 32, seed=5).to(dtype), random(12, seed=6).to(dtype) if with_bias else None
    one = tuned(random(12, 32), WeightGrid(kind.weight_bits, symmetric, torch.bfloat16), group_size)
    push(one, 0.3, 0.1, random(12, 32, seed=1))
    one.keep()
    config = ActConfig.model_validate(act) if act else None
    seen = InputStatistics(range=observe_range(x))
    layer = build_layer(
        LayerForm(kind, group_size, symmetric), one.best(), config, seen=seen, bias=bias, name="a", dtype=dtype
    )
    inputs: InputRounding = FloatInput() if act is None else DynamicInput(4 if act["dtype"] == "int4" else 8)
    if isinstance(layer, StaticInt8):
        inputs = StaticInput(layer.input_scale, layer.input_offset)
    linear = TunedLinear(one, inputs, bias, None if act is None else torch.float32)
    with torch.no_grad():
        found, want = linear(x), layer.simulate(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    atol = tolerance * float(want.abs().max())
    if isinstance(layer, StaticInt8):  # rounds its bias to an integer
        atol += 0.5 * float(layer.deq_scale.max())
    assert torch.allclose(found, want, rtol=tolerance, atol=atol)
    if kind is LayerKind.W8A16:
        assert torch.equal(found, want)
    assert linear.tokens == 15


def test_watching_adds_up_squares() -> None:
    linear = TunedLinear(tuned(random(4, 8)), FloatInput(), None)
    linear.watching = True
    x = random(6, 8)
    for part in (x[:2], x[2:]):
        linear(part)
    linear.watching = False
    linear(x)
    assert linear.energy is not None
    assert torch.allclose(linear.energy, x.square().sum(0))
    assert linear.tokens == 12


@pytest.mark.parametrize(
    "grid", [WeightGrid(bits, sym, torch.bfloat16) for bits in (4, 8) for sym in (True, False)], ids=str
)
def test_codes_are_chosen_for_the_rounded_scale(grid: WeightGrid) -> None:
    weight = random(8, 64)
    best = tuned(weight, grid).best()
    assert torch.equal(best.scale.bfloat16().float(), best.scale)
    inside = (best.codes > grid.lowest) & (best.codes < grid.highest)
    assert bool(((best.dequantized() - weight).abs() <= 0.5001 * best.scale)[inside].all())

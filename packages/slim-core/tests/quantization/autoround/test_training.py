"""Training on small blocks made for the purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import dequantize_groups
from slim_core.quantization.autoround.inputs import DynamicInput, FloatInput, InputRounding
from slim_core.quantization.autoround.rounding import WeightGrid
from slim_core.quantization.autoround.training import Outcome, TrainingOptions, shuffled, train
from slim_core.quantization.autoround.tuned import TunedLinear, TunedWeight
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.methods.ssz import ssz_weight
from slim_core.quantization.weights import InMemory, QuantizedWeight

WIDTH, HIDDEN = 24, 40


class Mlp(nn.Module):
    """A gated block with a residual, and a linear that nothing reaches."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down, self.idle = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block:
    """Correlated inputs through an :class:`Mlp`."""

    def __init__(self, seed: int = 0, samples: int = 12, tokens: int = 16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.module = Mlp(generator)
        mixing = torch.randn(WIDTH // 3, WIDTH, generator=generator)
        noise = 0.1 * torch.randn(samples, tokens, WIDTH, generator=generator)
        self.inputs = torch.randn(samples, tokens, WIDTH // 3, generator=generator) @ mixing + noise
        self.samples = samples
        self.targets = self.module(self.inputs)
        self.runs: list[int] = []

    def run(self, sample: int) -> Tensor:
        self.runs.append(sample)
        return self.module(self.inputs[sample])

    def target(self, sample: int) -> Tensor:
        return self.targets[sample]

    def error(self, weights: Mapping[str, QuantizedWeight], bits: int = 8) -> float:
        """The squared output error over all samples with these weights in place."""
        linears = {name: _linear(self.module, name, weight, DynamicInput(bits)) for name, weight in weights.items()}
        originals = {name: self.module.get_submodule(name) for name in linears}
        for name, linear in linears.items():
            setattr(self.module, name, linear)
        error = float((self.module(self.inputs) - self.targets).square().sum())
        for name, original in originals.items():
            setattr(self.module, name, original)
        return error


class _Frozen(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, inputs: InputRounding) -> None:
        super().__init__()
        self.weight, self.bias, self.inputs = weight, bias, inputs

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inputs(x), self.weight, self.bias)


def _linear(module: nn.Module, name: str, weight: QuantizedWeight, inputs: InputRounding) -> nn.Module:
    return _Frozen(weight.dequantized(), module.get_submodule(name).bias, inputs)  # pyright: ignore


NAMES = ("gate", "up", "down")


def learned(
    block: Block,
    *,
    grid: WeightGrid = WeightGrid(4),  # noqa: B008
    bits: int | None = 8,
    group_size: int = 0,
    names: tuple[str, ...] = NAMES,
    **options: Any,
) -> tuple[Outcome, dict[str, QuantizedWeight]]:
    inputs = DynamicInput(bits) if bits else FloatInput()
    linears: dict[str, TunedLinear] = {}
    for name in names:
        linear: Any = block.module.get_submodule(name)
        tuned = TunedWeight(linear.weight.data, grid, group_size, f"{name}.weight")
        linears[name] = TunedLinear(tuned, inputs, linear.bias, torch.float32)
    outcome = train(block, linears, TrainingOptions(**{"iters": 30, "batch_size": 4, **options}), "block")
    return outcome, {name: linear.tuned.best() for name, linear in linears.items()}


def by_method(block: Block, method: Any, group_size: int = 0) -> dict[str, QuantizedWeight]:
    made: dict[str, QuantizedWeight] = {}
    for name in NAMES:
        weight: Any = block.module.get_submodule(name).weight
        made[name] = method(InMemory(weight.data), bits=4, name=name, group_size=group_size)
    return made


def nearest(matrix: Any, **options: Any) -> QuantizedWeight:
    return minmax_weight(matrix, symmetric=True, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group_size", [0, 8])
def test_better_than_rounding_to_nearest_and_than_ssz(seed: int, group_size: int) -> None:
    """Also on inputs that it was not trained on."""
    block, other = Block(seed), Block(seed, samples=24)
    other.module, other.inputs = block.module, other.inputs[12:]
    other.targets = other.module(other.inputs)
    _, weights = learned(block, group_size=group_size, iters=60)
    for judge in (block, other):
        plain = judge.error(by_method(block, nearest, group_size))
        ssz = judge.error(by_method(block, ssz_weight, group_size))
        found = judge.error(weights)
        assert found < 0.9 * ssz
        assert found < 0.9 * plain


@given(st.integers(0, 10_000), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([1e-4, 0.05, 1.0]))
def test_never_worse_than_it_began(seed: int, bits: int, symmetric: bool, lr: float) -> None:
    """Even with steps that are far too long."""
    block = Block(seed, samples=3, tokens=4)
    outcome, weights = learned(block, grid=WeightGrid(bits, symmetric), iters=2, lr=lr, minmax_lr=lr)
    plain = {
        name: minmax_weight(
            InMemory(getattr(block.module, name).weight.data), bits=bits, symmetric=symmetric, name=name
        )
        for name in NAMES
    }
    assert outcome.best <= outcome.start <= outcome.nearest
    # With three samples the evaluated ones are all of them, so the outcome can be computed anew.
    assert block.error(weights) <= block.error(plain) * (1 + 1e-5)
    energy = float(block.targets.square().sum())
    assert outcome.best == pytest.approx(block.error(weights) / energy, rel=1e-3)
    assert outcome.nearest == pytest.approx(block.error(plain) / energy, rel=1e-3)


def test_training_helps_in_both_of_its_parts() -> None:
    block = Block()
    both, _ = learned(block)
    ranges, by_range = learned(block, round_tuning=False)
    rounding, by_rounding = learned(block, minmax_tuning=False)
    assert both.best < ranges.best < ranges.start < ranges.nearest
    assert both.best < rounding.best < rounding.start
    assert rounding.start == rounding.nearest == both.nearest
    assert both.start == ranges.start
    plain = by_method(block, nearest)
    for name in NAMES:
        assert torch.equal(by_rounding[name].scale, plain[name].scale)
        assert not torch.equal(by_rounding[name].codes, plain[name].codes)
        assert not torch.equal(by_range[name].scale, plain[name].scale)


def test_nothing_to_learn_is_rounding_to_nearest() -> None:
    block = Block()
    outcome, weights = learned(block, round_tuning=False, minmax_tuning=False)
    assert outcome.best == outcome.start == outcome.nearest > 0
    plain = by_method(block, nearest)
    assert all(torch.equal(weights[name].codes, plain[name].codes) for name in NAMES)
    assert all(torch.equal(weights[name].dequantized(), plain[name].dequantized()) for name in NAMES)
    assert len(block.runs) == 8


class Deaf(Block):
    """Its outputs have no gradient."""

    def run(self, sample: int) -> Tensor:
        return super().run(sample).detach()


class Flat(Block):
    """Its outputs have a gradient of zero."""

    def run(self, sample: int) -> Tensor:
        output = super().run(sample)
        return output.detach() + 0 * output


@pytest.mark.parametrize("kind", [Deaf, Flat])
def test_gradients_of_nothing_change_nothing(kind: type[Block]) -> None:
    block = kind()
    outcome, weights = learned(block, minmax_tuning=False)
    assert outcome.best == outcome.start
    plain = by_method(block, nearest)
    assert all(torch.equal(weights[name].codes, plain[name].codes) for name in NAMES)


def test_a_linear_that_nothing_reaches_is_rounded_to_nearest() -> None:
    block = Block()
    outcome, weights = learned(block, names=(*NAMES, "idle"))
    assert outcome.unseen == ("idle",)
    plain = nearest(InMemory(block.module.idle.weight.data), bits=4, name="idle")
    assert torch.equal(weights["idle"].codes, plain.codes)
    assert torch.equal(weights["idle"].scale, plain.scale)


@pytest.mark.parametrize("bits", [4, None])
def test_the_rounding_of_activations_takes_part(bits: int | None) -> None:
    """Other activations lead to other codes, which are the better ones for them."""
    block = Block(samples=6)
    _, eight = learned(block, iters=60)
    outcome, other = learned(block, bits=bits, iters=60)
    assert any(not torch.equal(eight[name].codes, other[name].codes) for name in NAMES)
    if bits == 4:
        assert block.error(other, bits=4) < block.error(eight, bits=4)
        assert block.error(eight) < block.error(other)
    assert outcome.best < outcome.start


def test_the_same_seed_gives_the_same_and_no_global_state_is_used() -> None:
    block = Block()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, first = learned(block, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    _, second = learned(block, seed=3)
    _, third = learned(block, seed=4)
    for name in NAMES:
        assert torch.equal(first[name].codes, second[name].codes)
        assert torch.equal(first[name].scale, second[name].scale)
    assert any(not torch.equal(first[name].codes, third[name].codes) for name in NAMES)


def test_the_block_is_as_it_was() -> None:
    block = Block()
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    modules = dict(block.module.named_modules())
    learned(block)
    assert dict(block.module.named_modules()) == modules
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.module.named_parameters())
    assert all(parameter.grad is None for parameter in block.module.parameters())


class Failing(Block):
    def run(self, sample: int) -> Tensor:
        if len(self.runs) == 20:
            raise RuntimeError("stop")
        return super().run(sample)


def test_the_block_is_as_it_was_after_a_failure() -> None:
    block = Failing()
    modules = dict(block.module.named_modules())
    with pytest.raises(RuntimeError, match="stop"):
        learned(block)
    assert dict(block.module.named_modules()) == modules


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers(bad: float) -> None:
    block = Block()
    block.inputs[3, 2, 1] = bad
    with pytest.raises(InvalidModelError, match=r"^block: its outputs hold NaN or infinity"):
        learned(block, names=("up",))


def test_targets_of_zero() -> None:
    block = Block()
    block.targets = torch.zeros_like(block.targets)
    outcome, _ = learned(block)
    assert 0 < outcome.best <= outcome.start


def test_forwards_of_a_training() -> None:
    """Two evaluations before, one after every tenth of the steps, a forward for each sample of a step."""
    block = Block(samples=12)
    learned(block, iters=40, batch_size=4)
    evaluated = [0, 1, 3, 4, 6, 7, 9, 10]
    assert len(block.runs) == 40 * 4 + (2 + 10) * 8
    assert block.runs[:16] == evaluated * 2
    assert block.runs[32:40] == evaluated
    steps = [block.runs[start : start + 16] for start in range(16, len(block.runs), 24)]
    visits = Counter(sample for step in steps for sample in step)
    assert sum(visits.values()) == 160
    assert set(visits.values()) == {13, 14}
    assert Counter(steps[0][:12]) == dict.fromkeys(range(12), 1)


class Routed(Block):
    """Sample 0 takes another way, through the linear that is idle otherwise."""

    def run(self, sample: int) -> Tensor:
        if sample:
            return super().run(sample)
        self.runs.append(sample)
        return self.inputs[sample] + self.module.idle(self.inputs[sample])


def test_a_linear_takes_a_step_only_when_something_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of an old gradient does not drive it on."""
    steps: Counter[str] = Counter()
    step = TunedWeight.step

    def counted(self: TunedWeight, *rates: float) -> None:
        steps[str(tuple(self.value.shape))] += 1
        step(self, *rates)

    monkeypatch.setattr(TunedWeight, "step", counted)
    block = Routed()
    outcome, _ = learned(block, names=("up", "idle"), iters=12, batch_size=1, momentum=0.9)
    assert steps == {str((HIDDEN, WIDTH)): 11, str((WIDTH, WIDTH)): 1}
    assert outcome.unseen == ()


@pytest.mark.parametrize(
    ("iters", "given", "rates"),
    [
        (10, {}, (0.02, 0.002)),
        (400, {}, (0.001, 0.0001)),
        (10, {"lr": 0.5, "minmax_lr": 0.25}, (0.5, 0.25)),
        (10, {"round_tuning": False}, (0.0, 0.002)),
        (10, {"minmax_tuning": False, "lr": 0.1}, (0.1, 0.0)),
    ],
)
def test_rates(iters: int, given: dict[str, Any], rates: tuple[float, float]) -> None:
    assert TrainingOptions(iters, **given).rates == pytest.approx(rates)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_steps_shrink_and_follow_the_pace(monkeypatch: pytest.MonkeyPatch, lr: float | None) -> None:
    """The pace of a linear is for steps of a length that nobody asked for."""
    taken: list[tuple[float, ...]] = []
    monkeypatch.setattr(TunedWeight, "step", lambda _self, *rates: taken.append(rates))
    block: Any = Block()
    linear = TunedLinear(TunedWeight(block.module.up.weight.data, WeightGrid(4), 0, "up"), FloatInput(), None, pace=3.0)
    train(block, {"up": linear}, TrainingOptions(4, lr=lr, minmax_lr=0.4, momentum=0.5), "block")
    first = 0.06 if lr is None else 0.1
    want = [(first * left, 0.4 * left, 0.5) for left in (1, 0.75, 0.5, 0.25)]
    assert [rate for step in taken for rate in step] == pytest.approx([rate for step in want for rate in step])


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**63 - 1))
def test_every_sample_takes_its_turn(samples: int, batch_size: int, seed: int) -> None:
    batches = list(islice(shuffled(samples, batch_size, seed), 30))
    assert all(len(batch) == min(batch_size, samples) for batch in batches)
    order = [sample for batch in batches for sample in batch]
    for start in range(0, len(order) - samples, samples):
        assert sorted(order[start : start + samples]) == list(range(samples))
    assert batches == list(islice(shuffled(samples, batch_size, seed), 30))


def test_rounds_differ() -> None:
    batches = islice(shuffled(50, 50, 0), 3)
    assert len({tuple(batch) for batch in batches}) == 3


def test_codes_and_value_agree_after_training() -> None:
    _, weights = learned(Block(), grid=WeightGrid(4, False, torch.bfloat16), group_size=8)
    for weight in weights.values():
        assert weight.codes.dtype == torch.int8
        assert torch.equal(weight.dequantized(), dequantize_groups(weight.codes, weight.scale, weight.offset))
        assert torch.equal(weight.scale.bfloat16().float(), weight.scale)
        assert float(weight.offset.abs().max()) > 0

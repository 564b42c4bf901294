"""Smoothing where nothing can be folded: the input of linears is scaled while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.model.inputs import is_changed
from slim_core.processors.base import Processor, UnitWork
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import ProcessorConfig

Made = Any  # of conftest.py
Make = Callable[..., Made]
Quant = Callable[..., dict[str, Any]]
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
SMOOTH: dict[str, Any] = {"type": "smooth_quant"}
FLEX: dict[str, Any] = {"type": "flex_smooth_quant"}
WEIGHT = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
AWQ: dict[str, Any] = {"type": "awq", "weight_qconfig": WEIGHT}
SSZ: dict[str, Any] = {"type": "flex_awq_ssz", "qconfig": {"weight": WEIGHT}}
GROUPS = (
    *(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_q",), ("attn2.to_k", "attn2.to_v")),
    *(("attn1.to_out.0",), ("attn2.to_out.0",), ("ffn.net.0.proj",), ("ffn.net.2",)),
)
LINEARS = [f"blocks.{i}.{name}" for i in range(2) for group in GROUPS for name in group]
EXACT = frozenset({Need.RANGE, Need.CHANNELS, Need.HESSIAN, Need.TOKENS})


class Spy(Processor):
    """Notes weights, scales, and what is known of the inputs of linears, once the smoothers are done."""

    def __init__(self) -> None:
        super().__init__(ProcessorConfig(type="spy"), "process[9]")
        self.weights: dict[str, Tensor] = {}
        self.seen: dict[str, InputStatistics] = {}

    def process(self, work: UnitWork) -> None:
        assert work.weights is not None
        for name in work.linears:
            for part in ("weight", "bias", "div.mul_scale"):
                if (key := f"{name}.{part}") in work.weights:
                    self.weights[key] = work.weights[key].load().double()
        self.seen |= deepcopy(work.statistics)

    def forwards(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What linears compute with these weights, in float64."""

        def linear(name: str) -> Callable[[Tensor], Tensor]:
            weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
            factor = self.weights[f"{name}.div.mul_scale"]
            return lambda x: (x * factor) @ weight.T + bias

        return {name: linear(name) for name in LINEARS}


def spied(made: Made, out: Path, *process: dict[str, Any]) -> Spy:
    plan, spy = made.planned(*process), Spy()
    plan.processors.insert(len(plan.processors) - 1, spy)
    made.carried_out(plan, out)
    return spy


def naive(state: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """A quantized linear from its written tensors, in float64: integers as they are, scales afterwards."""
    factor = state.get(f"{name}.div.mul_scale")
    prefix = name if factor is None else f"{name}.linear"
    part = {key.removeprefix(f"{prefix}."): value.double() for key, value in state.items() if key.startswith(prefix)}

    def forward(x: Tensor) -> Tensor:
        x = x if factor is None else x * factor.to(x.dtype)
        y = x.double()
        if "input_scale" in part:
            codes = (y / part["input_scale"] + part["input_offset"]).round().clamp(-128, 127)
            total = (codes @ part["weight"].T + part["quant_bias"]) * part["deq_scale"]
        else:
            scale = y.abs().amax(-1, keepdim=True) / 127
            total = (y / scale).round() @ part["weight"].T * scale * part["weight_scale"].T + part["bias"]
        return total.to(x.dtype)

    return forward


def error_of(made: Made, state: dict[str, Tensor]) -> float:
    """How far the outputs of written files are off, root of mean squares, relative."""
    want, got = made.outputs({}), made.outputs({name: naive(state, name) for name in LINEARS})
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("kind", "process"),
    [
        ("closed form", ITER),
        ("closed form", SMOOTH),
        ("given", FLEX | {"alpha": 0.6, "beta": 0.3}),
        ("searched", FLEX),
        ("searched", AWQ),
        ("searched", SSZ),
    ],
)
def test_before_quantization_the_model_computes_the_same(
    made: Made, quant: Quant, tmp_path: Path, kind: str, process: dict[str, Any]
) -> None:
    spy = spied(made, tmp_path / "out", process, quant())
    same = [torch.equal(spy.weights[f"{name}.weight"], made.state[f"{name}.weight"].double()) for name in LINEARS]
    assert sum(same) <= (len(LINEARS) // 2 if kind == "searched" else 0)  # what has no outliers needs no scale
    assert all(torch.equal(spy.weights[f"{name}.bias"], made.state[f"{name}.bias"].double()) for name in LINEARS)
    want, got = made.outputs({}), made.outputs(spy.forwards())
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_those_of_the_formula(make: Make, quant: Quant, tmp_path: Path, dtype: torch.dtype) -> None:
    made = make(tmp_path / "model", dtype)
    state = made.written(tmp_path / "out", ITER, quant())
    inputs = made.inputs_of(dtype)
    for block in range(2):
        for group in GROUPS:
            names = [f"blocks.{block}.{name}" for name in group]
            act = inputs[names[0]].double().abs().amax(0)
            weight = torch.stack([made.state[f"{name}.weight"].double().abs().amax(0) for name in names]).amax(0)
            want = weight**0.3 / act**0.7
            for name in names:
                factor = state[f"{name}.div.mul_scale"]
                assert factor.dtype == dtype
                assert torch.allclose(factor.double(), want, rtol=2**-8, atol=0)
                assert torch.equal(factor, state[f"{names[0]}.div.mul_scale"])
                narrow = torch.float16 if dtype == torch.float16 else torch.bfloat16
                assert torch.equal(factor.to(narrow).to(dtype), factor)  # engines may run in it
    assert all(torch.equal(state[name], value) for name, value in made.state.items() if name in state)


def test_transformed_statistics_are_those_of_a_second_forward(made: Made, quant: Quant, tmp_path: Path) -> None:
    plan, spy = made.planned(ITER, quant()), Spy()
    plan.processors.insert(1, spy)
    plan.requests = dict.fromkeys(LINEARS, EXACT)
    state, result = made.carried_out(plan, tmp_path / "out")
    assert result.block_forwards == 2 * len(made.inputs)
    inputs = made.inputs_of()
    for name in LINEARS:
        x = inputs[name] * state[f"{name}.div.mul_scale"].double()
        seen, channels, size = spy.seen[name], spy.seen[name].channels, float(x.abs().max())
        assert seen.tokens == channels.tokens == len(x)
        assert seen.range.minimum == pytest.approx(float(x.min()), abs=2e-5 * size)
        assert seen.range.maximum == pytest.approx(float(x.max()), abs=2e-5 * size)
        for got, want in (
            (channels.minimum, x.amin(0)),
            (channels.maximum, x.amax(0)),
            (channels.total, x.sum(0)),
            (channels.square, x.square().sum(0)),
            (seen.hessian.total, x.T @ x),
        ):
            assert got is not None
            assert torch.allclose(got.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))
        kept = seen.kept.tokens().double()  # all of them, in another order
        assert kept.shape == x.shape
        assert float(torch.cdist(kept, x).min(1).values.max()) <= 1e-4 * size


@pytest.mark.parametrize("scope", ["per_token", "per_tensor"])
@pytest.mark.parametrize("process", [ITER, SMOOTH, FLEX], ids=str)
def test_outliers_do_less_harm(made: Made, quant: Quant, tmp_path: Path, process: dict[str, Any], scope: str) -> None:
    plain = error_of(made, made.written(tmp_path / "plain", quant(scope)))
    smoothed = error_of(made, made.written(tmp_path / "smoothed", process, quant(scope)))
    assert smoothed <= 0.65 * plain


def test_static_scales_are_those_of_the_scaled_input(made: Made, quant: Quant, tmp_path: Path) -> None:
    state, result = made.carried_out(made.planned(ITER, quant("per_tensor")), tmp_path / "out")
    assert result.block_forwards == 2 * len(made.inputs)
    inputs = made.inputs_of()
    for name in LINEARS:
        x = inputs[name] * state[f"{name}.div.mul_scale"].double()
        scale = float((x.max().clamp(min=0) - x.min().clamp(max=0)) / 255)
        stored = state[f"{name}.linear.input_scale"]
        assert float(stored) == pytest.approx(scale, rel=2**-8)
        assert torch.equal(stored.bfloat16().float(), stored)  # what the engine runs in


def test_a_histogram_is_taken_of_the_scaled_input(made: Made, quant: Quant, tmp_path: Path) -> None:
    histogram = quant("per_tensor")
    histogram["qconfig"]["act"]["method"] = "histogram"
    plan = made.planned(ITER, histogram)
    assert plan.forwards == 2
    state, result = made.carried_out(plan, tmp_path / "out")
    assert result.block_forwards == 4 * len(made.inputs)
    inputs = made.inputs_of()
    for name in LINEARS:
        x = inputs[name] * state[f"{name}.div.mul_scale"].double()
        width = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        assert 0.3 * width <= float(state[f"{name}.linear.input_scale"]) <= 1.01 * width
    for block in range(2):
        assert not any(map(is_changed, plan.model.module.get_submodule(f"blocks.{block}").modules()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_block_sees_what_the_engine_will_compute(
    make: Make, quant: Quant, tmp_path: Path, dtype: torch.dtype
) -> None:
    made = make(tmp_path / "model", dtype)
    plan = made.planned(ITER, quant("per_tensor"), propagate="quantized")
    state, _ = made.carried_out(plan, tmp_path / "out", propagate="quantized")
    first = [name for name in LINEARS if name.startswith("blocks.0")]
    net, seen = made.net({name: naive(state, name) for name in first}, dtype), dict[str, list[Tensor]]()
    for name in LINEARS[len(first) :]:
        net.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
        )
    with torch.no_grad():
        for one in made.inputs:
            net(**one)
    exact = made.inputs_of()
    off: list[float] = []
    for name, parts in seen.items():
        factor = state[f"{name}.div.mul_scale"].double()
        scale, without = (
            float((x.max().clamp(min=0) - x.min().clamp(max=0)) / 255)
            for x in (torch.cat(parts) * factor, exact[name] * factor)
        )
        near = 2**-8 if dtype == torch.float32 else 2e-2
        assert float(state[f"{name}.linear.input_scale"]) == pytest.approx(scale, rel=near)
        off.append(abs(scale / without - 1))
    assert max(off) > 2**-7  # or the float block would have passed too


def test_what_stays_float_is_left_as_it_was(made: Made, quant: Quant, tmp_path: Path) -> None:
    plan = made.planned(ITER, quant(exclude=["*attn1.to_k", "*ffn.net.2"]))
    state, result = made.carried_out(plan, tmp_path / "out")
    for name in ("blocks.0.attn1.to_k", "blocks.1.ffn.net.2"):
        assert torch.equal(state[f"{name}.weight"], made.state[f"{name}.weight"])
        assert not any(key.startswith((f"{name}.linear", f"{name}.div")) for key in state)
    (told,) = [text for text in plan.warnings if "cannot smooth" in text]
    assert told.startswith("spec.process[0] cannot smooth 4 places: blocks.0.attn1.to_k: it stays FLOAT")
    assert "iter_smooth: 12 non-fusion smoothed" in [one.summary() for one in plan.processors]
    act = made.inputs_of()["blocks.0.attn1.to_q"].abs().amax(0)
    weights = [made.state[f"blocks.0.attn1.to_{one}.weight"].double() for one in "qv"]
    weight = torch.cat(weights).abs().amax(0)
    factor = state["blocks.0.attn1.to_v.div.mul_scale"].double()
    assert torch.allclose(factor, weight**0.3 / act**0.7, rtol=2**-8, atol=0)
    assert {note.targets for note in result.smoothed if note.source == "blocks.0.attn1.to_q"} == {
        ("blocks.0.attn1.to_q", "blocks.0.attn1.to_v")
    }


def test_nothing_quantized_is_an_error(made: Made) -> None:
    with pytest.raises(UnsupportedError, match=r"no subgraph of this model can be smoothed: .*it stays FLOAT"):
        made.planned(ITER)


def test_what_can_be_folded_is_folded(made: Made, quant: Quant, tmp_path: Path) -> None:
    """Where engines read the weights of norms from what is written."""
    norms = made.planned(ITER | {"include": ["*norm2"]}, quant(), saver="ascendv1_saver")
    state, _ = made.carried_out(norms, tmp_path / "out")
    assert not any("mul_scale" in name or ".linear." in name for name in state)
    assert not torch.equal(state["blocks.0.norm2.weight"], made.state["blocks.0.norm2.weight"])
    plan = made.planned(ITER | {"exclude": ["*ffn*", "*attn1*", "*attn2.to_[ko]*"]}, quant(), saver="ascendv1_saver")
    assert "iter_smooth: 2 norm-linear smoothed" in [one.summary() for one in plan.processors]


def test_nothing_is_folded_into_what_the_engine_does_not_read(made: Made, quant: Quant, tmp_path: Path) -> None:
    plan = made.planned(ITER, quant())
    assert not [text for text in plan.warnings if "norm2" in text or "is lost" in text]
    state, _ = made.carried_out(plan, tmp_path / "out")
    assert torch.equal(state["blocks.0.norm2.weight"], made.state["blocks.0.norm2.weight"])
    assert "blocks.0.attn2.to_q.div.mul_scale" in state


def test_a_format_without_a_place_for_the_scales_is_refused(made: Made, quant: Quant) -> None:
    with pytest.raises(UnsupportedError) as caught:
        made.planned(ITER, quant(), saver="ascendv1_saver")
    assert "ascendv1_saver has no place for the scales of 18 linears" in caught.value.what
    assert "e.g. blocks.0.attn1.to_q" in caught.value.what
    assert caught.value.where == "spec.save"
    assert "mindie_format_saver" in (caught.value.remedy or "")


@pytest.mark.parametrize("process", [ITER, SMOOTH], ids=str)
def test_a_shift_is_ignored_with_a_warning(made: Made, quant: Quant, tmp_path: Path, process: dict[str, Any]) -> None:
    plan = made.planned(process | {"symmetric": False}, quant())
    (told,) = [text for text in plan.warnings if "not shifted" in text]
    assert told == (
        "spec.process[0]: 14 inputs are scaled but not shifted, because there is no norm whose bias could take the "
        "shift, e.g. that of blocks.0.attn1.to_q"
    )
    shifted, _ = made.carried_out(plan, tmp_path / "shifted")
    plain = made.written(tmp_path / "plain", process, quant())
    assert shifted.keys() == plain.keys()
    assert all(torch.equal(shifted[name], value) for name, value in plain.items())


def test_patterns_name_the_first_linear(made: Made, quant: Quant, tmp_path: Path) -> None:
    plan = made.planned(ITER | {"include": ["*attn1.to_q", "*ffn*"], "exclude": ["*net.2", "*attn1.to_k"]}, quant())
    state, _ = made.carried_out(plan, tmp_path / "out")
    scaled = {name.removesuffix(".div.mul_scale") for name in state if name.endswith(".div.mul_scale")}
    assert scaled == {f"blocks.{i}.{name}" for i in range(2) for name in (*GROUPS[0], "ffn.net.0.proj")}
    (told,) = [text for text in plan.warnings if "matches no source" in text]
    assert "exclude: pattern '*attn1.to_k'" in told
    only = ITER | {"enable_subgraph_type": ["ov", "up-down"]}
    assert "spec.process[0] smooths nothing" in made.planned(only, quant()).warnings


def test_two_smoothers_after_each_other(made: Made, quant: Quant, tmp_path: Path) -> None:
    spy = spied(made, tmp_path / "out", ITER, FLEX | {"alpha": 0.5, "beta": 0.1}, quant())
    alone = spied(made, tmp_path / "alone", ITER, quant())
    want, got = made.outputs({}), made.outputs(spy.forwards())
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-6
    for name in LINEARS:
        key = f"{name}.div.mul_scale"
        assert not torch.allclose(spy.weights[key], alone.weights[key], rtol=1e-2)
        assert torch.equal(spy.weights[key].bfloat16().double(), spy.weights[key])


@pytest.mark.parametrize("scheme", [("per_token",), ("per_tensor",)], ids=str)
def test_groups_that_are_found_are_those_that_would_be_given(
    made: Made, make: Make, quant: Quant, tmp_path: Path, scheme: tuple[str, ...]
) -> None:
    finding = make(tmp_path / "model", scaled_inputs=None)
    found = finding.written(tmp_path / "found", ITER, quant(*scheme))
    given = made.written(tmp_path / "given", ITER, quant(*scheme))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], value) for name, value in given.items())


def test_without_a_declaration_nothing_is_scaled(make: Make, quant: Quant, tmp_path: Path) -> None:
    made = make(tmp_path / "model", scaled_inputs=())
    plan = made.planned(ITER, quant(), saver="ascendv1_saver")
    assert "iter_smooth: 2 norm-linear smoothed" in [one.summary() for one in plan.processors]
    assert not any(unit.added for unit in plan.model.units)


def test_inputs_of_nothing_but_zeros_are_left_alone(make: Make, quant: Quant, tmp_path: Path) -> None:
    made = make(tmp_path / "model")
    plan = made.planned(ITER, quant())
    for one in made.inputs:
        one["context"] = torch.zeros_like(one["context"])
    state, result = made.carried_out(plan, tmp_path / "out")
    assert torch.equal(state["blocks.0.attn2.to_k.div.mul_scale"], torch.ones(64))
    assert "blocks.0.attn2.to_k.linear.weight" in state
    skipped = {note.source: note.skipped for note in result.smoothed if note.skipped}
    assert skipped == {f"blocks.{i}.attn2.to_k": "only zeros reached their readers" for i in range(2)}


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_a_run_that_was_killed_is_resumed(
    made: Made, quant: Quant, tmp_path: Path, propagate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (ITER, quant("per_tensor"))
    whole, done = made.carried_out(made.planned(*recipe, propagate=propagate), tmp_path / "whole", propagate=propagate)
    plan = made.planned(*recipe, propagate=propagate)
    kept = type(plan.processors[1]).process

    def dies(self: Processor, work: UnitWork) -> None:
        if work.name == "blocks.1":
            raise KeyboardInterrupt
        kept(self, work)

    with monkeypatch.context() as patch:
        patch.setattr(type(plan.processors[1]), "process", dies)
        with pytest.raises(KeyboardInterrupt):
            made.carried_out(plan, tmp_path / "out", propagate=propagate)
    again = made.planned(*recipe, propagate=propagate)
    state, result = made.carried_out(again, tmp_path / "out", propagate=propagate, resume=True)
    assert result.resumed_units >= 2
    assert result.smoothed == done.smoothed
    assert {name: value.tolist() for name, value in state.items()} == {n: v.tolist() for n, v in whole.items()}


def test_the_runner_does_not_matter(made: Made, quant: Quant, tmp_path: Path) -> None:
    layer_wise = made.written(tmp_path / "layer", ITER, quant())
    plan = made.planned(ITER, quant(), runner="model_wise")
    assert plan.runner.name == "model_wise"
    whole, _ = made.carried_out(plan, tmp_path / "model")
    assert all(torch.equal(whole[name], value) for name, value in layer_wise.items())
    assert not any(map(is_changed, plan.model.module.modules()))


def test_rounding_is_learned_on_the_scaled_input(made: Made, quant: Quant, tmp_path: Path) -> None:
    scheme = quant()["qconfig"]
    learned = {
        "type": "autoround_quant",
        "iters": 20,
        "strategies": [{"qconfig": {**scheme, "weight": scheme["weight"] | {"method": "autoround"}}}],
    }
    plain = error_of(made, made.written(tmp_path / "plain", learned))
    smoothed = error_of(made, made.written(tmp_path / "smoothed", ITER, learned))
    assert smoothed <= 0.65 * plain

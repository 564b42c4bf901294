"""The closed-form smoothers: configuration, which subgraphs are theirs, and what they do to a model made for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from slim_core.checkpoint.reader import Checkpoint
from slim_core.devices import resolve_devices
from slim_core.errors import InvalidModelError, SchemaValidateError
from slim_core.model import weights as weights_module
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.structure import discover
from slim_core.model.units import StreamedModel
from slim_core.model.weights import UnitWeights
from slim_core.processors.base import Processor, UnitWork, create_processor
from slim_core.processors.smoothing import Smoother
from slim_core.progress import SilentProgress
from slim_core.quantization.statistics import InputObserver, InputStatistics, Need
from slim_core.recipe import ProcessorConfig, recipe_from_dict
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.run import RunResult, run_plan
from slim_core.smoothing.scales import FLOOR, power_scale

HIDDEN, WIDE, HEADS, KV_HEADS, DIM, EXPERTS = 16, 24, 4, 2, 6, 3
ALL = ("norm-linear", "linear-linear", "ov", "up-down")
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (self.weight.float() * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Attention(nn.Module):
    head_dim = DIM

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * DIM)
        self.k_proj = nn.Linear(HIDDEN, kv_heads * DIM)
        self.v_proj = nn.Linear(HIDDEN, kv_heads * DIM)
        self.o_proj = nn.Linear(HEADS * DIM, HIDDEN, bias=False)
        self.kv_heads = kv_heads

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, DIM)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k, v = (
            part(x).view(shape).transpose(1, 2).repeat_interleave(HEADS // self.kv_heads, 1)
            for part in (self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    def __init__(self, wide: int = WIDE) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, wide, bias=False), nn.Linear(HIDDEN, wide, bias=False)
        self.down_proj = nn.Linear(wide, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Not a linear, though it multiplies by a matrix: as most routers it does more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS - 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight).argmax(-1)


class Experts(nn.Module):
    """Every token goes to one expert; none to the last, which is called all the same if ``calls_idle``."""

    def __init__(self, calls_idle: bool) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList(MLP(12) for _ in range(EXPERTS))
        self.calls_idle = calls_idle

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        chosen = self.router(rows)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if self.calls_idle or bool(mine.any()):
                result[mine] = expert(rows[mine])
        return result.view(x.shape)


class Block(nn.Module):
    def __init__(self, kv_heads: int, moe: bool, calls_idle: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)
        self.self_attn = Attention(kv_heads)
        self.mlp = Experts(calls_idle) if moe else MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Net(nn.Module):
    def __init__(self, kv_heads: int = KV_HEADS, moe: bool = False, calls_idle: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(kv_heads, moe, calls_idle) for _ in range(2))
        self.head = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


State = dict[str, Tensor]


@dataclass
class Made:
    """A model in a folder, and the samples it is calibrated with."""

    folder: Path
    state: State
    inputs: list[dict[str, Tensor]]
    options: dict[str, Any]

    def open(self) -> StreamedModel:
        with parameters_on_meta():
            net = Net(**self.options).to(self.state["head.weight"].dtype)
        return StreamedModel(net, Checkpoint(self.folder), self.folder, {})


def make(
    folder: Path, dtype: torch.dtype = torch.float32, change: Callable[[State], None] = lambda _: None, **options: Any
) -> Made:
    """A random model whose norms are no ones, with a few outlier channels."""
    folder.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    net = Net(**options)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            if "norm" in name:
                parameter[3] *= 20
    state = {name: value.detach().to(dtype).contiguous() for name, value in net.state_dict().items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)
    inputs = [{"hidden": torch.randn(1, 7, HIDDEN, generator=generator).to(dtype)} for _ in range(4)]
    return Made(folder, state, inputs, options)


def planned(made: Made, *process: dict[str, Any], **spec: Any) -> Plan:
    content = {"process": list(process), **spec}
    parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": content}).spec()
    example = made.inputs[0]
    return make_plan(made.open(), parsed, resolve_devices("cpu", explicit=True), example=lambda: example)


def carried_out(plan: Plan, out: Path, inputs: Sequence[Mapping[str, Any]]) -> tuple[State, RunResult]:
    result = run_plan(plan, out, fingerprint="", progress=SilentProgress(), calibration=lambda: inputs)
    tensors: State = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors, result


def smoothed(made: Made, out: Path, *process: dict[str, Any]) -> State:
    return carried_out(planned(made, *process), out, made.inputs)[0]


def outputs(state: State, inputs: Sequence[Mapping[str, Tensor]], options: dict[str, Any]) -> Tensor:
    """What a model with these tensors computes, in float64; biases of norms and linears are applied where there are."""
    net = Net(**options).double()
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = net.get_submodule(path)
        if leaf == "bias" and isinstance(module, RMSNorm):
            module.register_forward_hook(lambda _m, _a, y, bias=value: y + bias.double())
        else:
            setattr(module, leaf, nn.Parameter(value.double(), requires_grad=False))
    with torch.no_grad():
        return torch.cat([net(one["hidden"].double()) for one in inputs], 1)


ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
SHIFT = ITER | {"symmetric": False}
SMOOTH: dict[str, Any] = {"type": "smooth_quant"}
GQA = [{"kv_heads": kv_heads} for kv_heads in (4, 2, 1)]


class TestConfiguration:
    @pytest.mark.parametrize(
        ("kind", "field", "value", "stored"),
        [
            *(("iter_smooth", "alpha", value, float(value)) for value in (0, 0.0, 1e-5, "1e-5", 0.5, 1, 1.0)),
            *(("smooth_quant", "alpha", value, float(value)) for value in (0, "1e-1", 0.999, 1)),
            *(("iter_smooth", "scale_min", value, float(value)) for value in ("1e-5", 1e-300, 0.999)),
            *(("kv_smooth", "smooth_factor", value, float(value)) for value in ("1e-5", 0.5, 1, 7.5)),
            ("iter_smooth", "symmetric", False, False),
            ("smooth_quant", "symmetric", True, True),
            ("iter_smooth", "enable_subgraph_type", ["ov"], ("ov",)),
            ("iter_smooth", "enable_subgraph_type", [], ()),
            ("iter_smooth", "include", None, ()),
            ("smooth_quant", "exclude", None, ()),
            ("iter_smooth", "include", ["*" * 200], ("*" * 200,)),
            ("kv_smooth", "include", [], ()),
        ],
    )
    def test_what_is_accepted(self, kind: str, field: str, value: Any, stored: Any) -> None:
        (config,) = spec_of({"type": kind, field: value})
        assert getattr(config, field) == stored

    @pytest.mark.parametrize(
        ("kind", "field", "value", "message"),
        [
            *(("iter_smooth", "alpha", value, "alpha") for value in (-1e-9, 1.0001, "x", None, True, float("nan"))),
            *(("smooth_quant", "alpha", value, "alpha") for value in (-0.1, 1.5, None, [])),
            *(("iter_smooth", "scale_min", value, "scale_min") for value in (0, 1, 1.0, -1, None)),
            *(("kv_smooth", "smooth_factor", value, "smooth_factor") for value in (0, -1, None, float("inf"), False)),
            *(("iter_smooth", "symmetric", value, "must be true or false") for value in ("no", 1)),
            ("iter_smooth", "enable_subgraph_type", ["non-fusion"], "allowed: norm-linear, linear-linear, ov, up-down"),
            ("iter_smooth", "enable_subgraph_type", "ov", "must be a list"),
            ("iter_smooth", "enable_subgraph_type", None, "must be a list"),
            ("iter_smooth", "include", ["*" * 201], "at most 200 are allowed"),
            ("iter_smooth", "include", ["a["], "never closed"),
            ("kv_smooth", "include", None, "must be a list"),
            ("smooth_quant", "enable_subgraph_type", ["norm-linear"], "unknown field"),
            ("smooth_quant", "scale_min", 0.1, "unknown field"),
            ("kv_smooth", "alpha", 0.1, "unknown field"),
            ("iter_smooth", "beta", 0.1, "unknown field"),
        ],
    )
    def test_what_is_refused(self, kind: str, field: str, value: Any, message: str) -> None:
        with pytest.raises(SchemaValidateError) as caught:
            spec_of({"type": kind, field: value})
        assert f"spec.process[0].{field}" in str(caught.value)
        assert message in str(caught.value)

    def test_defaults(self) -> None:
        one, other, keys = spec_of({"type": "iter_smooth"}, {"type": "smooth_quant"}, {"type": "kv_smooth"})
        assert one.model_dump() == {
            "type": "iter_smooth",
            "alpha": 0.9,
            "scale_min": 1e-5,
            "symmetric": True,
            "include": (),
            "exclude": (),
            "enable_subgraph_type": ALL,
        }
        plain = {"alpha": 0.5, "symmetric": True, "include": (), "exclude": ()}
        assert other.model_dump() == {"type": "smooth_quant"} | plain
        assert keys.model_dump() == {"type": "kv_smooth", "smooth_factor": 1.0, "include": ("*",), "exclude": ()}


def spec_of(*process: dict[str, Any]) -> tuple[ProcessorConfig, ...]:
    return recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": list(process)}}).spec().process


def chosen(made: Made, **config: Any) -> set[str]:
    """The sources that a smoother takes of the first block, without the block's name."""
    plan = planned(made, {"type": "iter_smooth", **config})
    (smoother,) = plan.processors
    assert isinstance(smoother, Smoother)
    graphs = smoother._graphs["layers.0"]  # pyright: ignore[reportPrivateUsage]
    return {graph.source.removeprefix("layers.0.") for graph in graphs}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


INPUT, POST, V, UP = "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"


class TestWhichSubgraphs:
    """Patterns name the source of a subgraph, and nothing else."""

    @pytest.mark.parametrize(
        ("config", "sources"),
        [
            ({}, {INPUT, POST, V, UP}),
            ({"include": []}, {INPUT, POST, V, UP}),
            # The linears behind the input norm lie in self_attn, but the norm does not.
            ({"exclude": ["*self_attn*"]}, {INPUT, POST, UP}),
            ({"exclude": ["*input_layernorm*"]}, {POST, V, UP}),
            ({"include": ["*self_attn*"]}, {V}),
            ({"include": ["*q_proj", "*down_proj"]}, set[str]()),
            ({"include": ["layers.0.mlp.up_proj"]}, {UP}),
            ({"include": ["*.{input,post_attention}_layernorm"]}, {INPUT, POST}),
            ({"include": ["*layernorm"], "exclude": ["*.post*"]}, {INPUT}),
            ({"include": ["layers.[0-3].*"], "exclude": ["layers.[!1].mlp.*"]}, {INPUT, POST, V}),
            ({"include": ["layers.?.mlp*"]}, {UP}),
            ({"include": ["layers.1.*"]}, set[str]()),
            ({"include": ["*LAYERNORM*"]}, set[str]()),
            ({"include": ["*"], "exclude": ["*"]}, set[str]()),
            ({"enable_subgraph_type": ["ov", "up-down"]}, {V, UP}),
            ({"enable_subgraph_type": ["norm-linear"], "include": ["*self_attn*"]}, set[str]()),
            ({"enable_subgraph_type": []}, set[str]()),
        ],
    )
    def test_by_name(self, made: Made, config: dict[str, Any], sources: set[str]) -> None:
        assert chosen(made, **config) == sources

    def test_smooth_quant_takes_norms_alone(self, made: Made) -> None:
        (smoother,) = planned(made, SMOOTH).processors
        assert {name.rpartition(".")[2] for name in smoother.rescales()} == {
            *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        }

    def test_patterns_that_match_nothing_are_reported(self, made: Made) -> None:
        plan = planned(made, ITER | {"include": ["*layernorm", "*.q_proj"], "exclude": ["nothing"]})
        told = [text for text in plan.warnings if "matches no source" in text]
        assert [text.split(": pattern ")[0] for text in told] == [
            *("spec.process[0].include", "spec.process[0].exclude")
        ]
        assert "'*.q_proj'" in told[0]
        assert "sources are norms, v_proj and up_proj, e.g. layers.0." in told[0]
        assert not [text for text in planned(made, ITER).warnings if "matches no source" in text]

    def test_to_smooth_nothing_is_reported(self, made: Made) -> None:
        assert "spec.process[0] smooths nothing" in planned(made, ITER | {"exclude": ["*"]}).warnings
        assert "spec.process[0] smooths nothing" in planned(made, ITER | {"enable_subgraph_type": []}).warnings

    def test_the_plan_counts_what_is_smoothed(self, made: Made) -> None:
        def told(process: dict[str, Any]) -> str:
            (smoother,) = planned(made, process).processors
            return smoother.summary()

        assert told(ITER) == "iter_smooth: 4 norm-linear, 2 ov, 2 up-down smoothed"
        only = {"include": [f"layers.0.{INPUT}", f"*{UP}"]}
        assert told(SHIFT | only) == "iter_smooth: 1 norm-linear, 2 up-down smoothed, 1 norms shifted"
        assert told(SMOOTH) == "smooth_quant: 4 norm-linear smoothed"
        assert told(ITER | {"exclude": ["*"]}) == ""

    def test_patterns_are_about_what_the_processor_smooths(self, made: Made) -> None:
        told = planned(made, SMOOTH | {"exclude": ["*self_attn*"]}).warnings
        assert [text for text in told if "exclude: pattern '*self_attn*' matches no source" in text]
        told = planned(made, ITER | {"include": ["*layernorm"], "enable_subgraph_type": ["ov"]}).warnings
        assert [text for text in told if f"e.g. layers.0.{V}, layers.1.{V}" in text]
        assert "spec.process[0] smooths nothing" in told

    def test_experts_that_the_probe_did_not_reach_are_like_those_that_it_did(self, tmp_path: Path) -> None:
        made = make(tmp_path / "model", moe=True)
        reached = inputs_of(made.state, replace(made, inputs=made.inputs[:1]))
        experts = {name.split(".")[4] for name in reached if name.startswith("layers.0.mlp.experts")}
        assert len(experts) == 1
        assert chosen(made) == {INPUT, POST, V, *(f"mlp.experts.{number}.up_proj" for number in range(EXPERTS))}
        (smoother,) = planned(made, ITER | {"include": [f"*{POST}"]}).processors
        assert {name.removeprefix("layers.0.mlp.") for name in smoother.rescales() if "layers.0" in name} == {
            "router",
            *(f"experts.{number}.{name}_proj" for number in range(EXPERTS) for name in ("gate", "up")),
        }

    def test_what_others_have_is_left_as_it_was(self, made: Made, tmp_path: Path) -> None:
        written = smoothed(made, tmp_path / "out", ITER | {"include": ["layers.0.input_layernorm"]})
        changed = {name for name, value in made.state.items() if not torch.equal(value, written[name])}
        assert changed == {
            "layers.0.input_layernorm.weight",
            *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkv"),
        }


class TestEquivalence:
    @pytest.mark.parametrize("process", [ITER, SHIFT, SMOOTH, SMOOTH | {"symmetric": False}], ids=str)
    @pytest.mark.parametrize("options", GQA, ids=str)
    def test_the_model_computes_the_same(
        self, tmp_path: Path, process: dict[str, Any], options: dict[str, Any]
    ) -> None:
        made = make(tmp_path / "model", **options)
        written = smoothed(made, tmp_path / "out", process)
        want, got = (outputs(state, made.inputs, options) for state in (made.state, written))
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
        assert set(written) - set(made.state) == (
            {f"layers.{i}.{norm}.bias" for i in range(2) for norm in (INPUT, POST)}
            | {f"layers.{i}.mlp.{name}_proj.bias" for i in range(2) for name in ("gate", "up")}
            if process.get("symmetric") is False
            else set()
        )

    def test_experts_and_router_are_scaled_together(self, tmp_path: Path) -> None:
        made = make(tmp_path / "model", moe=True)
        written = smoothed(made, tmp_path / "out", ITER)
        want, got = (outputs(state, made.inputs, made.options) for state in (made.state, written))
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
        for name in ("router", "experts.0.gate_proj", "experts.1.up_proj", "experts.2.gate_proj"):
            assert not torch.equal(written[f"layers.0.mlp.{name}.weight"], made.state[f"layers.0.mlp.{name}.weight"])

    def test_a_norm_is_not_shifted_if_a_reader_has_no_place_for_a_bias(self, tmp_path: Path) -> None:
        made = make(tmp_path / "model", moe=True)
        plan = planned(made, SHIFT)
        written, _ = carried_out(plan, tmp_path / "out", made.inputs)
        (told,) = [text for text in plan.warnings if "not shifted" in text]
        assert told.startswith("spec.process[0]: 2 norms are not shifted")
        assert told.endswith("e.g. layers.0.mlp.router behind layers.0.post_attention_layernorm")
        assert f"layers.0.{INPUT}.bias" in written
        assert f"layers.0.{POST}.bias" not in written
        assert not torch.equal(written[f"layers.0.{POST}.weight"], made.state[f"layers.0.{POST}.weight"])
        want, got = (outputs(state, made.inputs, made.options) for state in (made.state, written))
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("process", [ITER, SHIFT], ids=str)
    def test_in_sixteen_bits_only_weights_are_rounded(
        self, tmp_path: Path, dtype: torch.dtype, process: dict[str, Any]
    ) -> None:
        made = make(tmp_path / "model", dtype)
        written = smoothed(made, tmp_path / "out", process)
        assert all(written[name].dtype == value.dtype for name, value in made.state.items())
        want, got = (outputs(state, made.inputs, made.options) for state in (made.state, written))
        assert float((got - want).abs().max()) <= 2e-2 * float(want.abs().max())
        for name in (name for name in written if name.endswith("norm.bias")):
            assert torch.equal(written[name], written[name].to(dtype).float())  # engines keep it in the model's dtype

    def test_powers_of_two_are_exact(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def power(act: Tensor, weight: Tensor, alpha: float, beta: float, floor: float = FLOOR) -> Tensor:
            return power_scale(act, weight, alpha, beta, floor).log2().round().exp2()

        monkeypatch.setattr("slim_core.processors.iter_smooth.power_scale", power)
        # The mean over heads that share a value would be no power of two; float16 would underflow.
        made = make(tmp_path / "model", torch.bfloat16, kv_heads=4)
        written = smoothed(made, tmp_path / "out", ITER)
        assert any(not torch.equal(written[name], value) for name, value in made.state.items())
        want, got = (outputs(state, made.inputs, made.options) for state in (made.state, written))
        assert float((got - want).abs().max()) <= 1e-13 * float(want.abs().max())


def closed_form(act: Tensor, weight: Tensor, alpha: float, floor: float = FLOOR) -> Tensor:
    return (act.double() ** alpha / weight.double() ** (1 - alpha)).clamp(min=floor)


def ratio(after: Tensor, before: Tensor) -> Tensor:
    return after.double() / before.double()


class TestScales:
    def observed(self, made: Made) -> dict[str, Tensor]:
        """The largest input of every channel of every linear, from plain forwards."""
        return {name: x.abs().amax((0, 1)) for name, x in inputs_of(made.state, made).items()}

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
    def test_norms_are_divided_by_the_formula(self, made: Made, tmp_path: Path, alpha: float) -> None:
        written = smoothed(made, tmp_path / "out", ITER | {"alpha": alpha})
        seen = self.observed(made)
        readers = [f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
        # The rows of up_proj were divided before its columns were measured.
        weight = torch.stack(
            [made.state[readers[0]].abs().amax(0), (made.state[readers[1]] * self.up_rows(made, alpha)).abs().amax(0)]
        ).amax(0)
        want = closed_form(seen["layers.0.mlp.gate_proj"], weight, alpha)
        got = ratio(made.state[f"layers.0.{POST}.weight"], written[f"layers.0.{POST}.weight"])
        assert torch.allclose(got, want, rtol=1e-5)
        assert torch.allclose(ratio(written[readers[0]], made.state[readers[0]]), want.expand(WIDE, -1), rtol=1e-5)

    def up_rows(self, made: Made, alpha: float) -> Tensor:
        down = made.state["layers.0.mlp.down_proj.weight"].abs().amax(0)
        return (1 / closed_form(self.observed(made)["layers.0.mlp.down_proj"], down, alpha)).float().unsqueeze(1)

    @pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
    def test_ranges_of_the_smoothed_model(self, made: Made, tmp_path: Path, alpha: float) -> None:
        """A' = (A B)^(1 - alpha) and B' = (A B)^alpha, measured on what was written."""
        written = smoothed(made, tmp_path / "out", ITER | {"alpha": alpha})
        before, after = (
            self.observed(made)["layers.1.mlp.down_proj"],
            inputs_of(written, made)["layers.1.mlp.down_proj"],
        )
        name = "layers.1.mlp.down_proj.weight"
        product = before.double() * made.state[name].abs().amax(0).double()
        assert torch.allclose(after.abs().amax((0, 1)).double(), product ** (1 - alpha), rtol=1e-4)
        assert torch.allclose(written[name].abs().amax(0).double(), product**alpha, rtol=1e-4)

    def test_values_share_the_mean_scale_of_their_query_heads(self, tmp_path: Path) -> None:
        for kv_heads in (4, 2, 1):
            made = make(tmp_path / f"model{kv_heads}", kv_heads=kv_heads)
            written = smoothed(made, tmp_path / f"out{kv_heads}", ITER | {"enable_subgraph_type": ["ov"]})
            name = "layers.0.self_attn.o_proj"
            each = closed_form(self.observed(made)[name], made.state[f"{name}.weight"].abs().amax(0), 0.7)
            want = each.view(kv_heads, HEADS // kv_heads, DIM).mean(1)
            got = ratio(written[f"{name}.weight"], made.state[f"{name}.weight"])
            assert torch.allclose(
                got, want.repeat_interleave(HEADS // kv_heads, 0).reshape(1, -1).expand_as(got), rtol=1e-5
            )
            rows = ratio(made.state["layers.0.self_attn.v_proj.weight"], written["layers.0.self_attn.v_proj.weight"])
            assert torch.allclose(rows, want.reshape(-1, 1).expand_as(rows), rtol=1e-5)
            biases = ratio(made.state["layers.0.self_attn.v_proj.bias"], written["layers.0.self_attn.v_proj.bias"])
            assert torch.allclose(biases, want.reshape(-1), rtol=1e-5)

    def test_the_sign_of_a_column_does_not_matter(self, made: Made, tmp_path: Path) -> None:
        name = "layers.0.mlp.down_proj.weight"

        def negate(state: State) -> None:
            state[name][:, 5] = -state[name][:, 5].abs()

        def plus(state: State) -> None:
            state[name][:, 5] = state[name][:, 5].abs()

        only = ITER | {"include": ["layers.0.mlp.up_proj"]}
        for label, change in (("minus", negate), ("plus", plus)):
            smoothed(make(tmp_path / label, change=change), tmp_path / f"out-{label}", only)
        rows = [
            load_file(next((tmp_path / f"out-{label}").glob("*.safetensors")))["layers.0.mlp.up_proj.weight"]
            for label in ("minus", "plus")
        ]
        assert torch.equal(*rows)

    @given(st.permutations(range(6)), st.integers(0, 2**31), st.floats(0, 1))
    def test_channels_may_come_in_any_order(self, order: list[int], seed: int, alpha: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        act, weight = (torch.rand(6, generator=generator) * 10 for _ in range(2))
        scale = power_scale(act, weight, alpha, 1 - alpha)
        assert torch.equal(power_scale(act[order], weight[order], alpha, 1 - alpha), scale[order])

    @given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1))
    def test_the_scale_grows_with_alpha_iff_the_product_is_above_one(
        self, act: float, weight: float, one: float, other: float
    ) -> None:
        low, high = sorted((one, other))
        scales = [
            float(power_scale(torch.tensor([act]), torch.tensor([weight]), alpha, 1 - alpha)) for alpha in (low, high)
        ]
        if act * weight >= 1:
            assert scales[1] >= scales[0] * (1 - 1e-6)
        else:
            assert scales[1] <= scales[0] * (1 + 1e-6)

    @given(st.floats(2.0**-6, 2.0**6), st.floats(0, 1))
    def test_larger_activations_have_a_larger_scale(self, size: float, alpha: float) -> None:
        act, weight = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25])
        assert torch.allclose(
            power_scale(act * size, weight, alpha, 1 - alpha),
            power_scale(act, weight, alpha, 1 - alpha) * size**alpha,
            rtol=1e-5,
        )


def inputs_of(state: State, made: Made) -> dict[str, Tensor]:
    """The inputs of all linears over all samples ``(batch, tokens, channels)``, from a model with these tensors."""
    net = Net(**made.options)
    seen: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = net.get_submodule(path)
        if leaf == "bias" and isinstance(module, RMSNorm):
            module.register_forward_hook(lambda _m, _a, y, bias=value: y + bias)
        else:
            setattr(module, leaf, nn.Parameter(value.float(), requires_grad=False))
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for one in made.inputs:
            net(one["hidden"].float())
    return {name: torch.cat(parts, -2) for name, parts in seen.items()}


class TestShift:
    def test_the_inputs_behind_a_norm_are_centred(self, made: Made, tmp_path: Path) -> None:
        written = smoothed(made, tmp_path / "out", SHIFT)
        seen = inputs_of(written, made)
        for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj"):
            low, high = seen[name].amin((0, 1)), seen[name].amax((0, 1))
            assert torch.allclose(low, -high, rtol=0, atol=1e-4 * float(high.max()))
        others = seen["layers.0.mlp.down_proj"]
        assert not torch.allclose(others.amin((0, 1)), -others.amax((0, 1)), atol=1e-2)

    def test_the_scale_is_made_from_half_the_range(self, made: Made, tmp_path: Path) -> None:
        only = SHIFT | {"include": [f"layers.0.{INPUT}"]}
        written = smoothed(made, tmp_path / "out", only)
        x = inputs_of(made.state, made)["layers.0.self_attn.q_proj"]
        weight = torch.cat([made.state[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]).abs().amax(0)
        low, high = x.amin((0, 1)), x.amax((0, 1))
        got = ratio(made.state[f"layers.0.{INPUT}.weight"], written[f"layers.0.{INPUT}.weight"])
        assert torch.allclose(got, closed_form((high - low) / 2, weight, 0.7), rtol=1e-5)
        bias = written[f"layers.0.{INPUT}.bias"].double() * got
        assert torch.allclose(bias, -(low + high).double() / 2, rtol=1e-4, atol=1e-5)
        for name in "qkv":
            whole = f"layers.0.self_attn.{name}_proj"
            gain = made.state[f"{whole}.weight"].double() @ (low + high).double() / 2
            want = made.state[f"{whole}.bias"].double() + gain
            assert torch.allclose(written[f"{whole}.bias"].double(), want, rtol=1e-4, atol=1e-5)

    def test_a_second_shift_finds_nothing_to_centre(self, made: Made, tmp_path: Path) -> None:
        """A norm that has a bias keeps it, divided once."""
        twice = smoothed(made, tmp_path / "out", SHIFT, SHIFT | {"alpha": 0.3})
        want, got = (outputs(state, made.inputs, made.options) for state in (made.state, twice))
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())

    def test_other_subgraphs_are_smoothed_without(self, made: Made, tmp_path: Path) -> None:
        only = {"enable_subgraph_type": ["ov", "up-down"]}
        one, other = (smoothed(made, tmp_path / str(i), one | only) for i, one in enumerate((ITER, SHIFT)))
        assert one.keys() == other.keys() == made.state.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_linears_that_lose_their_bias_are_told(self, made: Made) -> None:
        dynamic = {"act": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}}
        static = {"act": {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}}
        rules = {
            scheme: {"type": "linear_quant", "qconfig": {**act, "weight": WEIGHT}}
            for scheme, act in (("dynamic", dynamic), ("static", static))
        }
        (told,) = [text for text in planned(made, SHIFT, rules["dynamic"]).warnings if "symmetric: false" in text]
        assert "gives a bias to 4 W8A8_DYNAMIC linears whose class has none, e.g. layers.0.mlp.gate_proj" in told
        assert "Quantize them to static W8A8" in told  # q, k and v have a bias of their own
        for process in ((SHIFT, rules["static"]), (ITER, rules["dynamic"])):
            assert not [text for text in planned(made, *process).warnings if "symmetric: false" in text]
        part = rules["static"] | {"exclude": ["*.up_proj"]}
        (told,) = [text for text in planned(made, SHIFT, part).warnings if "symmetric: false" in text]
        assert "2 FLOAT linears" in told


class Spy(Processor):
    """Notes what is known of the inputs of linears once the smoothers are done."""

    def __init__(self) -> None:
        super().__init__(ProcessorConfig(type="spy"), "process[9]")
        self.seen: dict[str, InputStatistics] = {}

    def process(self, work: UnitWork) -> None:
        self.seen |= deepcopy(work.statistics)


EXACT = frozenset({Need.RANGE, Need.CHANNELS, Need.HESSIAN, Need.TOKENS})


@pytest.mark.parametrize("process", [ITER, SHIFT, SMOOTH], ids=str)
def test_transformed_statistics_are_those_of_a_fresh_forward(
    made: Made, tmp_path: Path, process: dict[str, Any]
) -> None:
    plan = planned(made, process)
    spy = Spy()
    plan.processors.append(spy)
    names = [name for name in plan.requests if name.startswith("layers.")]
    plan.requests = dict.fromkeys(names, EXACT)
    written, result = carried_out(plan, tmp_path / "out", made.inputs)
    assert result.block_forwards == 2 * len(made.inputs)
    fresh = inputs_of(written, made)
    assert len(names) >= 10
    for name in names:
        seen, x = spy.seen[name], fresh[name].reshape(-1, fresh[name].shape[-1]).double()
        size, channels = float(x.abs().max()), seen.channels
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
        nearest = torch.cdist(kept, x).min(1)
        assert float(nearest.values.max()) <= 1e-4 * size
        assert len(set(nearest.indices.tolist())) == len(x)


class TestOddInputs:
    def test_the_order_of_samples_does_not_matter(self, made: Made, tmp_path: Path) -> None:
        for process in (ITER, SHIFT):
            plans = [planned(made, process) for _ in range(2)]
            folder = tmp_path / str(process.get("symmetric"))
            one = carried_out(plans[0], folder / "one", made.inputs)[0]
            other = carried_out(plans[1], folder / "other", made.inputs[::-1])[0]
            assert all(torch.equal(one[name], other[name]) for name in one)

    def test_samples_may_share_a_forward(self, made: Made, tmp_path: Path) -> None:
        pairs = [{"hidden": torch.cat([made.inputs[i]["hidden"], made.inputs[i + 1]["hidden"]])} for i in (0, 2)]
        one = smoothed(made, tmp_path / "one", ITER)
        other = carried_out(planned(made, ITER), tmp_path / "other", pairs)[0]
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)

    def test_one_token(self, tmp_path: Path) -> None:
        made = make(tmp_path / "model")
        made.inputs = [{"hidden": made.inputs[0]["hidden"][:, :1]}]
        for process in (ITER, SHIFT):
            written = smoothed(made, tmp_path / f"out{process.get('symmetric')}", process)
            want, got = (outputs(state, made.inputs, made.options) for state in (made.state, written))
            assert bool(torch.isfinite(got).all())
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("process", [ITER, SHIFT], ids=str)
    def test_dead_channels_are_left_alone(self, tmp_path: Path, dtype: torch.dtype, process: dict[str, Any]) -> None:
        def kill(state: State) -> None:
            state[f"layers.0.{INPUT}.weight"][5] = 0  # a channel that is always zero
            state["layers.0.mlp.up_proj.weight"][7] = 0
            for name in "qkv":  # a channel that nobody reads
                state[f"layers.1.self_attn.{name}_proj.weight"][:, 2] = 0
            state["layers.1.mlp.down_proj.weight"][:, 4] = 0

        made = make(tmp_path / "model", dtype, kill)
        written = smoothed(made, tmp_path / "out", process)
        assert all(bool(torch.isfinite(value).all()) for value in written.values())
        want, got = (outputs(state, made.inputs, made.options) for state in (made.state, written))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())
        assert float(written[f"layers.0.{INPUT}.weight"][5]) == 0
        q = "layers.0.self_attn.q_proj.weight"
        assert torch.equal(written[q][:, 5], made.state[q][:, 5])
        assert float(written[f"layers.1.{INPUT}.weight"][2]) == float(made.state[f"layers.1.{INPUT}.weight"][2])

    def test_an_expert_without_tokens_keeps_its_weights(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        written: dict[bool, State] = {}
        only = ITER | {"enable_subgraph_type": ["up-down"]}
        caplog.set_level(logging.WARNING)
        for calls_idle in (False, True):
            caplog.clear()
            made = make(tmp_path / f"model{calls_idle}", moe=True, calls_idle=calls_idle)
            plan = planned(made, only)
            written[calls_idle], result = carried_out(plan, tmp_path / f"out{calls_idle}", made.inputs)
            for i in range(2):
                for name in ("gate", "up", "down"):
                    whole = f"layers.{i}.mlp.experts.2.{name}_proj.weight"
                    assert torch.equal(written[calls_idle][whole], made.state[whole])
            skipped = [note.source for note in result.smoothed if note.skipped]
            assert skipped == [f"layers.{i}.mlp.experts.2.up_proj" for i in range(2)]
            assert sum("layers.1.mlp.experts.2.up_proj" in one.getMessage() for one in caplog.records) == 1
        assert all(torch.equal(written[False][name], written[True][name]) for name in written[False])

    def test_activations_that_are_not_finite_are_refused(self, tmp_path: Path) -> None:
        made = make(tmp_path / "model")
        plan = planned(made, ITER)
        made.inputs[2]["hidden"][0, 3, 3] = float("nan")
        with pytest.raises(InvalidModelError, match="NaN or infinity"):
            carried_out(plan, tmp_path / "out", made.inputs)
        assert not (tmp_path / "out").exists()


class Struck(Exception):
    """The failure that is injected."""


def strike_at(monkeypatch: pytest.MonkeyPatch, edit: int, before: Callable[[], None]) -> None:
    """Let one of the edits fail; ``before`` is called whenever a subgraph is about to be changed."""
    real, plain = weights_module._edited, UnitWeights.apply  # pyright: ignore[reportPrivateUsage]
    count = iter(range(10**6))

    def edited(view: Any, change: Any) -> Any:
        if next(count) == edit:
            raise Struck
        return real(view, change)

    def apply(self: UnitWeights, edits: Any) -> None:
        before()
        plain(self, edits)

    monkeypatch.setattr(weights_module, "_edited", edited)
    monkeypatch.setattr(UnitWeights, "apply", apply)


@pytest.mark.parametrize(("process", "edits"), [(ITER, 12), (SHIFT, 19)], ids=["symmetric", "shifted"])
def test_a_failure_in_the_middle_of_a_subgraph_leaves_it_as_it_was(
    made: Made, process: dict[str, Any], edits: int
) -> None:
    """Wherever it strikes: weights, module and statistics are those from before the subgraph, bit by bit."""
    (config,) = spec_of(process)
    smoother = create_processor(config, "process[0]")
    model = made.open()
    smoother.adopt(discover(model, made.inputs[0]), model)
    model = model.with_additions(smoother.additions())
    unit = model.units[0]
    block = model.module.get_submodule("layers.0")
    for strike in range(edits + 1):
        model.load(unit.parameters, torch.device("cpu"))
        observer = InputObserver()
        for info in unit.linears:
            observer.watch(info.name, model.module.get_submodule(info.name), {Need.CHANNELS})
        with torch.no_grad():
            for one in made.inputs:
                block(one["hidden"])
        observer.stop()
        weights = UnitWeights(model, unit, live=True)
        work = UnitWork(unit.name, {}, observer.statistics, None, torch.device("cpu"), lambda *_: None, weights=weights)
        kept: list[tuple[State, dict[str, InputStatistics]]] = []

        def now(work: UnitWork = work, weights: UnitWeights = weights) -> tuple[State, dict[str, InputStatistics]]:
            live = {name: value.clone() for name, value in block.named_parameters()}
            return live | {f"view of {name}": view.load() for name, view in weights.edited()}, dict(work.statistics)

        with pytest.MonkeyPatch.context() as patch:
            strike_at(patch, strike, lambda kept=kept, now=now: kept.append(now()))
            if strike == edits:
                smoother.process(work)  # there are no more of them
            else:
                with pytest.raises(Struck):
                    smoother.process(work)
                (before, known), (after, still_known) = kept[-1], now()
                assert before.keys() == after.keys()
                assert all(torch.equal(before[name], after[name]) for name in before)
                assert known == still_known
        model.unload([*unit.parameters, *unit.added])
        assert all(value.is_meta for value in block.parameters())

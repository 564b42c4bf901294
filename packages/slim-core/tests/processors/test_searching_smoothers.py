"""The smoothers that search: configuration, what they ask for, and what they choose for a block made for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError, SchemaValidateError, UnsupportedError
from slim_core.model.probing import Findings
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.structure import Structure
from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import StreamedModel
from slim_core.model.weights import UnitWeights
from slim_core.processors.base import UnitWork, create_processor
from slim_core.processors.searching import SearchingSmoother
from slim_core.processors.smoothing import Smoother
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import ProcessorConfig, recipe_from_dict
from slim_core.smoothing.scales import SmoothingNote
from slim_core.smoothing.search import GRID, awq_scales, exponent_scale

HIDDEN, WIDE, DIM, EXPERTS = 16, 24, 4, 12
UNIT = "layers.0"
INT8: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
INT4 = INT8 | {"dtype": "int4", "method": "ssz"}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
FLEX: dict[str, Any] = {"type": "flex_smooth_quant"}
SSZ: dict[str, Any] = {"type": "flex_awq_ssz", "qconfig": {"act": TOKEN, "weight": INT4}}
AWQ: dict[str, Any] = {"type": "awq", "weight_qconfig": INT4}
ALL = [FLEX, SSZ, AWQ]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, WIDE, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(WIDE, HIDDEN, bias=False)


class Router(nn.Module):
    """No linear that could be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN))


class Block(nn.Module):
    """The weights of a block with grouped queries and experts; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, bias=False)
        self.q, self.k = (nn.Linear(HIDDEN, 4 * DIM) for _ in range(2))
        self.v, self.o = nn.Linear(HIDDEN, 2 * DIM), nn.Linear(4 * DIM, HIDDEN)
        self.mlp_norm = nn.LayerNorm(HIDDEN, bias=False)
        self.router = Router()
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return x


def at(*names: str) -> tuple[str, ...]:
    return tuple(f"{UNIT}.{name}" for name in names)


COLUMNS = torch.arange(HIDDEN)
NORM = Subgraph("norm-linear", *at("norm"), at("q", "k", "v"), COLUMNS)
OV = Subgraph("ov", *at("v"), at("o"), torch.arange(4 * DIM) // (2 * DIM) * DIM + COLUMNS % DIM, torch.arange(2 * DIM))
MOE = Subgraph(
    "norm-linear",
    *at("mlp_norm"),
    at("router", *(f"experts.{i}.{leaf}" for i in range(EXPERTS) for leaf in ("gate_proj", "up_proj"))),
    COLUMNS,
)
UPS = [
    Subgraph(
        "up-down", *at(f"experts.{i}.up_proj"), at(f"experts.{i}.down_proj"), torch.arange(WIDE), torch.arange(WIDE)
    )
    for i in range(EXPERTS)
]


@dataclass
class Bench:
    """A block on the bench, with what was seen of the inputs of its linears."""

    model: StreamedModel
    statistics: dict[str, InputStatistics] = field(default_factory=dict[str, InputStatistics])
    notes: list[SmoothingNote] = field(default_factory=list[SmoothingNote])

    def smoother(self, *graphs: Subgraph, **config: Any) -> SearchingSmoother:
        (checked,) = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}}).spec().process
        smoother = create_processor(checked, "process[0]")
        assert isinstance(smoother, SearchingSmoother)
        smoother.adopt(Structure({UNIT: Findings(list(graphs))}), self.model)
        return smoother

    def see(self, x: Tensor, *names: str) -> None:
        """All of these have the same input."""
        seen = InputStatistics(frozenset({Need.CHANNELS, Need.TOKENS}))
        seen.update(x)
        self.statistics |= dict.fromkeys(at(*names), seen)

    def work(self) -> UnitWork:
        unit = next(unit for unit in self.model.units if unit.name == UNIT)
        work = UnitWork(UNIT, {}, dict(self.statistics), torch.bfloat16, torch.device("cpu"), lambda *_: None)
        work.weights = UnitWeights(self.model, unit)
        work.note = self.notes.append
        return work

    def smoothed(self, *graphs: Subgraph, **config: Any) -> UnitWork:
        work = self.work()
        self.smoother(*graphs, **config).process(work)
        return work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    with torch.no_grad():
        net = Net()
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    save_file(net.state_dict(), folder / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    return StreamedModel(net, Checkpoint(folder), folder, {})


@pytest.fixture
def bench(model: StreamedModel) -> Bench:
    return Bench(model)


def inputs(tokens: int = 200, width: int = HIDDEN, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, 3] *= 40
    x[:, 5] *= 8
    return x


def weight(work: UnitWork, name: str) -> Tensor:
    assert work.weights is not None
    return work.weights[f"{UNIT}.{name}.weight"].load()


def scale_of(before: UnitWork, after: UnitWork, target: str) -> Tensor:
    return (weight(after, target) / weight(before, target)).median(0).values


def configured(**config: Any) -> ProcessorConfig:
    return recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}}).spec().process[0]


class TestConfiguration:
    def test_defaults(self) -> None:
        shared = {
            "include": (),
            "exclude": (),
            "enable_subgraph_type": ("norm-linear", "linear-linear", "ov", "up-down"),
        }
        assert configured(**FLEX).model_dump() == {**FLEX, "alpha": None, "beta": None, **shared}
        assert configured(**AWQ).model_dump() == {**AWQ, "weight_qconfig": INT4 | {"ext": {}}, "n_grid": 20, **shared}
        found = configured(**SSZ).model_dump()
        assert found.pop("qconfig")["weight"] == INT4 | {"ext": {}}
        assert found == {"type": "flex_awq_ssz", "alpha": None, "beta": None, **shared}
        assert configured(type="flex_awq_ssz", qconfig={"weight": INT4}).model_dump()["qconfig"]["act"] is None

    @pytest.mark.parametrize(
        "config",
        [
            *(FLEX | {"alpha": value, "beta": value} for value in (0, 0.0, "1e-5", 0.5, 1)),
            *(SSZ | {"alpha": value} for value in (0, "1e-5", 1.0)),
            *(SSZ | {"beta": value} for value in (0, 0.5, 1)),
            *(AWQ | {"n_grid": value} for value in (1, 7, 5000)),
            *(one | {"include": None, "exclude": ["*" * 200], "enable_subgraph_type": ["ov"]} for one in ALL),
            SSZ | {"qconfig": {"act": {"dtype": "float"}, "weight": INT4}},
            SSZ | {"qconfig": {"act": {}, "weight": INT8}},
            AWQ | {"weight_qconfig": {}},
            AWQ | {"weight_qconfig": {"dtype": "mxfp4", "scope": "per_block"}},
            AWQ | {"weight_qconfig": {"dtype": "fp8_e4m3"}},
            AWQ | {"weight_qconfig": {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 8}}},
            AWQ | {"weight_qconfig": {"method": "sparse"}},
            AWQ
            | {
                "weight_qconfig": {
                    "dtype": "mxfp4",
                    "scope": "dual_scale",
                    "method": "dualscale",
                    "ext": {"dual_block_size": 64},
                }
            },
        ],
    )
    def test_what_is_accepted(self, config: dict[str, Any]) -> None:
        configured(**config)

    @pytest.mark.parametrize(
        ("config", "field", "message"),
        [
            *((FLEX | {"alpha": v, "beta": 0.5}, "alpha", "alpha") for v in (-1e-9, 1.0001, "x", True, math.nan)),
            *((FLEX | {"alpha": 0.5, "beta": v}, "beta", "beta") for v in (-0.1, 2, [])),
            (FLEX | {"alpha": 0.5}, "", "beta is missing; give it beside alpha, or leave both out"),
            (FLEX | {"beta": 0.5}, "", "alpha is missing; give it beside beta, or leave both out"),
            (FLEX | {"scale_min": 0.1}, "scale_min", "unknown field"),
            *((SSZ | {"alpha": value}, "alpha", "alpha") for value in (-0.1, 1.1)),
            *((SSZ | {"beta": value}, "beta", "beta") for value in (-0.1, 1.1)),
            ({"type": "flex_awq_ssz"}, "qconfig", "qconfig"),
            (SSZ | {"qconfig": {"act": TOKEN}}, "qconfig.weight", "weight"),
            (SSZ | {"qconfig": {"act": {}, "weight": INT4}}, "", "no layer has activations int8 per_tensor"),
            (
                SSZ | {"qconfig": {"weight": INT4 | {"method": "gptq"}}},
                "",
                "method 'gptq' cannot be tried in a search",
            ),
            *((AWQ | {"n_grid": value}, "n_grid", "n_grid") for value in (0, -1, 2.5, None)),
            ({"type": "awq"}, "weight_qconfig", "weight_qconfig"),
            (AWQ | {"weight_qconfig": {"method": "gptq"}}, "", "search with 'ssz' or 'minmax'"),
            (AWQ | {"weight_qconfig": {"scope": "per_tensor"}}, "", "no layer has activations float"),
            (AWQ | {"alpha": 0.5}, "alpha", "unknown field"),
            *((one | {"enable_subgraph_type": ["qk"]}, "enable_subgraph_type", "allowed: norm-linear") for one in ALL),
            *((one | {"include": ["*" * 201]}, "include", "at most 200") for one in ALL),
        ],
    )
    def test_what_is_refused(self, config: dict[str, Any], field: str, message: str) -> None:
        with pytest.raises(SchemaValidateError) as caught:
            configured(**config)
        assert f"spec.process[0]{'.' if field else ''}{field}" in str(caught.value)
        assert message in str(caught.value)

    def test_what_has_no_effect_is_told(self, bench: Bench) -> None:
        notes = bench.smoother(NORM, **SSZ | {"beta": 0.5}).notes()
        assert notes == ["process[0]: beta has no effect: weights have no part in the scale"]
        (note,) = bench.smoother(NORM, **AWQ | {"weight_qconfig": INT4 | {"ext": {"percdamp": 0.1}}}).notes()
        assert "weight_qconfig.ext.percdamp has no effect" in note
        assert bench.smoother(NORM, **FLEX).notes() == []

    def test_groups_must_divide_the_width(self, bench: Bench) -> None:
        grouped = {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 5}}
        linears = [info for unit in bench.model.units for info in unit.linears]
        for config in (SSZ | {"qconfig": {"weight": grouped}}, AWQ | {"weight_qconfig": grouped}):
            with pytest.raises(UnsupportedError, match=r"layers\.0\.q: ext\.group_size 5 does not divide its 16"):
                bench.smoother(NORM, **config).check(linears, {})
            other = [info for info in linears if info.name == f"{UNIT}.o"]
            bench.smoother(NORM, **config).check(other, {})
        bench.smoother(NORM, **SSZ | {"qconfig": {"weight": grouped}, "alpha": 0.5}).check(linears, {})


class TestRequests:
    def test_tokens_are_kept_once_for_an_input(self, bench: Bench) -> None:
        linears = [info for unit in bench.model.units for info in unit.linears]
        smoother = bench.smoother(NORM, OV, UPS[0], **FLEX)
        wanted = smoother.requests(linears, {})
        assert {name for name, needs in wanted.items() if Need.TOKENS in needs} == {
            *at("q", "o", "experts.0.down_proj")
        }
        assert all(Need.CHANNELS in needs for needs in wanted.values())
        assert set(wanted) == {*at("q", "k", "v", "o", "experts.0.down_proj")}
        assert smoother.working_bytes(linears, {}) > Smoother.working_bytes(smoother, linears, {})

    def test_of_many_experts_only_some_keep_tokens(self, bench: Bench) -> None:
        wanted = bench.smoother(MOE, **AWQ).requests([], {})
        kept = sorted(name for name, needs in wanted.items() if Need.TOKENS in needs)
        assert len(kept) == 8
        assert all(name.endswith("gate_proj") for name in kept)
        assert len(wanted) == 2 * EXPERTS  # the router is no linear

    @pytest.mark.parametrize("config", [FLEX | {"alpha": 0.5, "beta": 0.5}, SSZ | {"alpha": 0.5}])
    def test_what_is_given_is_not_searched(self, bench: Bench, config: dict[str, Any]) -> None:
        smoother = bench.smoother(NORM, **config)
        linears = [info for unit in bench.model.units for info in unit.linears]
        assert set(smoother.requests(linears, {}).values()) == {frozenset({Need.CHANNELS})}
        changed = [info for info in linears if info.name in at("q", "k", "v")]
        assert smoother.working_bytes(linears, {}) == 4 * sum(info.in_features * info.out_features for info in changed)


class TestChoice:
    def test_flex_takes_the_best_of_its_lines(self, bench: Bench) -> None:
        bench.see(x := inputs(), "q", "k", "v")
        before, after = bench.work(), bench.smoothed(NORM, **FLEX)
        (note,) = bench.notes
        stacked = torch.cat([weight(before, name) for name in ("q", "k", "v")]).double()
        a, b = x.abs().amax(0), stacked.abs().amax(0).float()

        def rounded(rows: Tensor) -> Tensor:
            step = rows.abs().amax(1, keepdim=True) / 127
            return (rows / step).round() * step

        def error(alpha: float, beta: float) -> float:
            scale, exact = exponent_scale(a, b, alpha, beta).double(), x.double() @ stacked.T
            found = rounded(x.double() / scale) @ rounded(stacked * scale).T
            return float((found - exact).norm() / exact.norm())

        assert note.alpha is not None
        points = [(0.0, 0.0), *((p, 1 - p) for p in GRID), *((note.alpha, p) for p in GRID)]
        assert note.error_before == pytest.approx(error(0, 0), rel=1e-3)
        assert note.error_after == pytest.approx(min(error(*point) for point in points), rel=1e-3)
        assert note.error_after < 0.3 * note.error_before
        scale = exponent_scale(a, b, note.alpha, note.beta or 0.0)
        for name in ("q", "k", "v"):
            assert torch.allclose(scale_of(before, after, name), scale, rtol=1e-4)
        assert torch.allclose(weight(after, "norm") * scale, weight(before, "norm"), rtol=1e-5)
        assert (note.type, note.source, note.targets, note.position) == (
            "norm-linear",
            NORM.source,
            NORM.targets,
            "process[0]",
        )
        assert (note.scale_min, note.scale_max) == pytest.approx((float(scale.min()), float(scale.max())), rel=1e-4)
        assert note.act_spread_before == pytest.approx(float(a.double().log2().std(correction=0)), rel=1e-4)
        assert note.act_spread_after == pytest.approx(float((a / scale).double().log2().std(correction=0)), rel=1e-3)
        assert note.weight_spread_after == pytest.approx(float((b * scale).double().log2().std(correction=0)), rel=1e-3)

    def test_flex_as_told(self, bench: Bench) -> None:
        bench.see(x := inputs(), "o")
        before, after = bench.work(), bench.smoothed(OV, **FLEX | {"alpha": 0.75, "beta": 0.1})
        a, b = (OV.gather(values, "amax") for values in (x.abs().amax(0), weight(before, "o").abs().amax(0)))
        scale = exponent_scale(a, b, 0.75, 0.1)
        assert torch.allclose(scale_of(before, after, "o"), OV.spread(scale), rtol=1e-4)
        assert torch.allclose(weight(after, "v") * scale[:, None], weight(before, "v"), rtol=1e-4)
        (note,) = bench.notes
        assert (note.alpha, note.beta, note.error_before, note.error_after) == (0.75, 0.1, None, None)

    def test_scales_are_judged_as_they_are_shared(self, bench: Bench) -> None:
        """With scales of their own the heads of a group would do better than they can together."""
        x = inputs(width=4 * DIM)
        x[:, :DIM] *= 10
        bench.see(x, "o")
        before = bench.work()
        bench.smoothed(OV, **FLEX)
        (note,) = bench.notes
        w = weight(before, "o")
        a, b = (OV.gather(values, "amax") for values in (x.abs().amax(0), w.abs().amax(0)))
        assert note.alpha is not None
        assert note.beta is not None
        scale = OV.spread(exponent_scale(a, b, note.alpha, note.beta))
        codes = [
            (rows / (step := rows.abs().amax(1, keepdim=True) / 127)).round() * step for rows in (x / scale, w * scale)
        ]
        exact = x @ w.T
        error = float((codes[0] @ codes[1].T - exact).norm() / exact.norm())
        assert note.error_after == pytest.approx(error, rel=1e-3)

    @pytest.mark.parametrize("alpha", [None, 0.35])
    def test_the_mean_input_makes_the_scale(self, bench: Bench, alpha: float | None) -> None:
        bench.see(x := inputs(), "o")
        given = {} if alpha is None else {"alpha": alpha}
        before, after = bench.work(), bench.smoothed(OV, **SSZ | given)
        (note,) = bench.notes
        assert note.alpha is not None
        mean = OV.gather(x.abs().mean(0), "amax")
        assert torch.allclose(scale_of(before, after, "o"), OV.spread(mean**note.alpha), rtol=1e-4)
        assert note.beta == 0
        if alpha is None:
            assert note.error_after is not None
            assert note.error_before is not None
            assert note.error_after <= note.error_before
        else:
            assert (note.alpha, note.error_after) == (alpha, None)

    def test_all_targets_take_part(self, bench: Bench) -> None:
        """Four of them, the last one the only one that has anything to lose."""
        targets = at("q", "k", "experts.0.gate_proj", "experts.0.up_proj")
        graph = Subgraph("norm-linear", *at("norm"), targets, COLUMNS)
        bench.see(inputs(), "q", "k", "experts.0.gate_proj", "experts.0.up_proj")
        bench.smoothed(graph, **SSZ)
        whole = bench.notes.pop()
        bench.smoothed(Subgraph("norm-linear", *at("norm"), targets[:2], COLUMNS), **SSZ)
        assert whole.error_before != pytest.approx(bench.notes.pop().error_before, rel=1e-3)

    def test_awq(self, bench: Bench) -> None:
        bench.see(x := inputs(), "o")
        before, after = bench.work(), bench.smoothed(OV, **AWQ | {"n_grid": 8})
        (note,) = bench.notes
        assert note.ratio is not None
        assert note.ratio * 8 == round(note.ratio * 8)
        scale = awq_scales(OV.gather(x.abs().mean(0), "mean"), note.ratio)
        assert torch.allclose(scale_of(before, after, "o"), OV.spread(scale), rtol=1e-4)
        assert torch.allclose(weight(after, "v") * scale[:, None], weight(before, "v"), rtol=1e-4)
        assert (note.alpha, note.beta) == (None, None)
        assert note.error_after is not None
        assert note.error_before is not None
        assert note.error_after < note.error_before

    def test_awq_with_one_point_changes_nothing(self, bench: Bench) -> None:
        bench.see(inputs(), "q", "k", "v")
        before, after = bench.work(), bench.smoothed(NORM, **AWQ | {"n_grid": 1})
        for name in ("norm", "q", "k", "v"):
            assert torch.equal(weight(after, name), weight(before, name))

    @pytest.mark.parametrize("config", ALL)
    def test_what_others_know_of_the_inputs_follows(self, bench: Bench, config: dict[str, Any]) -> None:
        bench.see(x := inputs(), "q", "k", "v")
        before, after = bench.work(), bench.smoothed(NORM, **config)
        scale = scale_of(before, after, "q")
        largest = after.statistics[f"{UNIT}.k"].channels.absmax()
        assert largest is not None
        assert torch.allclose(largest, x.abs().amax(0) / scale, rtol=1e-3)
        assert after.statistics[f"{UNIT}.q"] is after.statistics[f"{UNIT}.v"]

    @pytest.mark.parametrize("config", ALL)
    def test_after_a_shift_the_mean_is_that_of_the_tokens_kept(self, bench: Bench, config: dict[str, Any]) -> None:
        bench.see(inputs(), "o")
        work = bench.work()
        work.rescale(at("o"), torch.ones(HIDDEN), torch.full((HIDDEN,), 0.5))
        bench.smoother(OV, **config).process(work)
        other = Bench(bench.model)
        other.see(inputs() - 0.5, "o")
        other.smoothed(OV, **config)
        assert bench.notes[0].error_after == pytest.approx(other.notes[0].error_after, rel=1e-2)
        assert bench.notes[0].scale_max == pytest.approx(other.notes[0].scale_max, rel=1e-4)


class TestExperts:
    @pytest.mark.parametrize("config", ALL)
    def test_without_tokens(self, bench: Bench, config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        """They keep their weights; one line says which."""
        bench.see(inputs(width=WIDE), "experts.4.down_proj")
        bench.see(torch.zeros(3, WIDE), "experts.5.down_proj")
        bench.see(torch.zeros(0, WIDE), "experts.6.down_proj")
        with caplog.at_level(logging.WARNING):
            after = bench.smoothed(*UPS, **config)
        assert after.weights is not None
        changed = {name for name, _ in after.weights.edited()}
        assert changed == {*at("experts.4.up_proj.weight", "experts.4.down_proj.weight")}
        unseen = ", ".join(UPS[i].source for i in range(EXPERTS) if i not in (4, 5))
        assert sorted(record.getMessage() for record in caplog.records) == [
            f"{UNIT}: these are not smoothed, because no token reached their readers: {unseen}",
            f"{UNIT}: these are not smoothed, because only zeros reached their readers: {UPS[5].source}",
        ]
        assert [note.source for note in bench.notes if note.skipped is None] == [UPS[4].source]
        assert len([note for note in bench.notes if note.skipped is not None]) == EXPERTS - 1

    def test_few_tokens_draw_the_scale_to_the_middle(self, bench: Bench) -> None:
        x = inputs(16, WIDE)
        bench.see(x, "experts.0.down_proj")
        before, after = bench.work(), bench.smoothed(UPS[0], **FLEX | {"alpha": 1, "beta": 0})
        a = x.abs().amax(0)
        wanted = a**0.25 * a.log().mean().exp() ** 0.75
        assert torch.allclose(scale_of(before, after, "experts.0.down_proj"), wanted, rtol=1e-4)

    @pytest.mark.parametrize("tokens", [64, 16])
    def test_that_is_for_experts_with_many_tokens_and_all_else_not_so(self, bench: Bench, tokens: int) -> None:
        name, graph, width = ("experts.0.down_proj", UPS[0], WIDE) if tokens == 64 else ("o", OV, HIDDEN)
        x = inputs(tokens, width)
        bench.see(x, name)
        before, after = bench.work(), bench.smoothed(graph, **FLEX | {"alpha": 1, "beta": 0})
        wanted = graph.spread(graph.gather(x.abs().amax(0), "amax"))
        assert torch.allclose(scale_of(before, after, name), wanted, rtol=1e-4)

    @pytest.mark.parametrize("config", ALL)
    def test_behind_a_norm_they_are_pooled(self, bench: Bench, config: dict[str, Any]) -> None:
        """No reader has seen all tokens, but together they have; the router is scaled along."""
        parts = [inputs(40, seed=seed) for seed in range(EXPERTS)]
        parts[7][3, 9] = 500.0
        for i, part in enumerate(parts[:-1]):
            bench.see(part, f"experts.{i}.gate_proj", f"experts.{i}.up_proj")
        before, after = bench.work(), bench.smoothed(MOE, **config)
        (note,) = bench.notes
        assert note.tokens == 40 * (EXPERTS - 1)
        pooled = torch.cat(parts[:-1]).abs()
        scale = scale_of(before, after, "experts.11.up_proj")
        assert torch.allclose(scale_of(before, after, "router"), scale, rtol=1e-3)
        if config is FLEX:
            maxima = torch.cat(
                [weight(before, f"experts.{i}.{leaf}") for i in range(EXPERTS) for leaf in ("gate_proj", "up_proj")]
            )
            assert note.alpha is not None
            assert note.beta is not None
            wanted = exponent_scale(pooled.amax(0), maxima.abs().amax(0), note.alpha, note.beta)
        elif config is SSZ:
            assert note.alpha is not None
            wanted = pooled.mean(0) ** note.alpha
        else:
            assert note.ratio is not None
            wanted = awq_scales(pooled.mean(0), note.ratio)
        assert torch.allclose(scale, wanted, rtol=1e-3)

    def test_whoever_sees_all_tokens_speaks_for_the_experts(self, bench: Bench) -> None:
        graph = Subgraph("norm-linear", *at("mlp_norm"), at("q", "experts.0.gate_proj"), COLUMNS)
        bench.see(inputs(100), "q")
        bench.see(inputs(150, seed=1) * 50, "experts.0.gate_proj")  # more often, yet only a part
        bench.smoothed(graph, **FLEX)
        assert bench.notes[0].tokens == 100


class Struck(Exception):
    pass


class TestBadInput:
    @pytest.mark.parametrize("config", ALL)
    def test_activations_that_are_not_finite(self, bench: Bench, config: dict[str, Any]) -> None:
        bench.see(inputs(), "q", "k", "v")
        channels = bench.statistics[f"{UNIT}.q"].channels
        assert channels.maximum is not None
        assert channels.magnitude is not None
        channels.maximum[2], channels.magnitude[2] = math.inf, math.nan
        with pytest.raises(InvalidModelError, match=r"layers\.0\.q: its activations hold NaN or infinity"):
            bench.smoothed(NORM, **config)

    def test_while_they_are_observed(self) -> None:
        seen = InputStatistics(frozenset({Need.TOKENS}))
        with pytest.raises(InvalidModelError, match="its activations hold NaN or infinity"):
            seen.update(torch.tensor([[1.0, math.nan]]))

    @pytest.mark.parametrize("config", ALL)
    def test_a_failure_in_the_middle_leaves_the_subgraph_as_it_was(
        self, bench: Bench, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.see(inputs(), "o")
        bench.see(inputs(seed=1), "q", "k", "v")
        work = bench.work()
        assert work.weights is not None
        apply, calls = work.weights.apply, 0

        def struck(edits: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                apply(edits)
                return

            def half() -> Any:
                listed = list(edits)
                yield from listed[:2]
                raise Struck

            apply(half())

        monkeypatch.setattr(work.weights, "apply", struck)
        with pytest.raises(Struck):
            bench.smoother(OV, NORM, **config).process(work)
        before = bench.work()
        assert not torch.equal(weight(work, "o"), weight(before, "o"))
        for name in ("norm", "q", "k"):
            assert torch.equal(weight(work, name), weight(before, name))
        assert work.statistics[f"{UNIT}.q"] is bench.statistics[f"{UNIT}.q"]

    @pytest.mark.parametrize("config", ALL)
    def test_nothing_to_smooth(self, bench: Bench, config: dict[str, Any]) -> None:
        with pytest.raises(UnsupportedError, match=r"spec\.process\[0\]: no subgraph of this model can be smoothed"):
            bench.smoother(**config)


def test_the_choice_does_not_depend_on_the_order_of_samples(bench: Bench) -> None:
    notes: list[SmoothingNote] = []
    x = inputs(900)
    order: list[Callable[[Tensor], Tensor]] = [lambda y: y, lambda y: y.flip(0)]
    for arranged in order:
        one = Bench(bench.model)
        seen = InputStatistics(frozenset({Need.CHANNELS, Need.TOKENS}))
        for part in arranged(x).split(64):
            seen.update(part)
        one.statistics = dict.fromkeys(at("q", "k", "v"), seen)
        one.smoothed(NORM, **FLEX)
        notes += one.notes
    assert notes[0] == notes[1]

"""``autoround_quant``: its configuration, and its work on a block made for the purpose."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from slim_core.checkpoint.source import LazyTensor, TensorMeta
from slim_core.errors import InvalidModelError, SchemaValidateError, SpecError, UnsupportedError
from slim_core.memory import KEPT_BY_THE_HEAP
from slim_core.model.units import LinearInfo
from slim_core.processors.autoround_quant import AutoroundQuant
from slim_core.processors.base import Assignment, LinearWork, UnitWork, create_processor
from slim_core.quantization.autoround import TrainingOptions
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import DynamicInt, MixedInt8, QuantizedLinear, StaticInt8, WeightOnlyInt
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.statistics import InputStatistics, Need, observe_range
from slim_core.recipe import dump_recipe, recipe_from_dict

TOKEN_8 = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
TOKEN_4 = TOKEN_8 | {"dtype": "int4"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
MIXED = STATIC | {"scope": "pd_mix"}


def weight(dtype: str = "int4", group_size: int = 0, symmetric: bool = True, **ext: Any) -> dict[str, Any]:
    scope = "per_group" if group_size else "per_channel"
    ext |= {"group_size": group_size} if group_size else {}
    return {"dtype": dtype, "scope": scope, "symmetric": symmetric, "method": "autoround", "ext": ext}


def strategy(act: dict[str, Any] | None, made: dict[str, Any], **filters: Any) -> dict[str, Any]:
    return {"qconfig": {"weight": made} | ({"act": act} if act else {}), **filters}


def processor(*strategies: dict[str, Any], **fields: Any) -> AutoroundQuant:
    config = {"type": "autoround_quant", "strategies": list(strategies), **fields}
    (parsed,) = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}}).spec().process
    made = create_processor(parsed, "process[0]")
    assert isinstance(made, AutoroundQuant)
    return made


def test_the_recipe_of_laos() -> None:
    """W8A8 for what is sensitive, W4A4 for the rest, 400 steps, with every field of the protocol written out."""
    common = {"scope": "per_channel", "symmetric": True, "method": "autoround", "ext": {"scale_dtype": "bfloat16"}}
    one = processor(
        strategy(TOKEN_8, common | {"dtype": "int8"}, include=["*self_attn*", "*down_proj*", "*.{0..3}.mlp.*"]),
        strategy(TOKEN_4, common | {"dtype": "int4"}, include=["*mlp*"], exclude=["*down_proj*"]),
        iters=400,
        enable_minmax_tuning=True,
        enable_round_tuning=True,
    )
    first, second = one.rules()
    assert (first.position, second.position) == ("process[0].strategies[0]", "process[0].strategies[1]")
    assert first.form == LayerForm(LayerKind.W8A8_DYNAMIC)
    assert second.form == LayerForm(LayerKind.W4A4_DYNAMIC)
    assert first.filter.matches("model.layers.2.mlp.up_proj")
    assert not first.filter.matches("model.layers.7.mlp.up_proj")
    assert not second.filter.matches("model.layers.7.mlp.down_proj")
    assert one.config.iters == 400
    assert one.runs_block
    assert one.wants_float_targets
    assert one.notes() == []


def test_written_out_and_read_again() -> None:
    config = {"type": "autoround_quant", "strategies": [strategy(STATIC, weight("int8")), strategy(None, weight())]}
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}})
    again = recipe_from_dict(yaml.safe_load(dump_recipe(recipe)))
    assert again.spec() == recipe.spec()


def test_defaults() -> None:
    config = processor({"qconfig": {"weight": {"method": "autoround"}}}).config
    assert (config.iters, config.batch_size, config.seed, config.momentum) == (10, 8, 0, 0.6)
    assert config.lr is None
    assert config.minmax_lr is None
    assert config.enable_minmax_tuning
    assert config.enable_round_tuning
    assert config.float_targets
    (one,) = config.strategies
    assert (one.include, one.exclude) == (("*",), ())
    assert one.qconfig.act is None
    assert one.scale_dtype is torch.bfloat16
    assert one.qconfig.weight.method == "autoround"
    assert processor({"qconfig": {"weight": {}}}).config.strategies == config.strategies
    assert not processor({"qconfig": {"weight": {}}}, float_targets=False).wants_float_targets


LEGAL = [
    (None, weight("int8"), LayerForm(LayerKind.W8A16)),
    (None, weight("int8", symmetric=False), LayerForm(LayerKind.W8A16, 0, symmetric=False)),
    (None, weight("int8", 8), LayerForm(LayerKind.W8A16, 8)),
    (None, weight("int4", 8, symmetric=False), LayerForm(LayerKind.W4A16, 8, symmetric=False)),
    (TOKEN_8, weight("int8"), LayerForm(LayerKind.W8A8_DYNAMIC)),
    (TOKEN_8, weight("int8", 8), LayerForm(LayerKind.W8A8_DYNAMIC, 8)),
    (TOKEN_8, weight("int4"), LayerForm(LayerKind.W4A8_DYNAMIC)),
    (TOKEN_8, weight("int4", 8), LayerForm(LayerKind.W4A8_DYNAMIC, 8)),
    (TOKEN_8 | {"method": "autoround"}, weight("int4"), LayerForm(LayerKind.W4A8_DYNAMIC)),
    (TOKEN_4, weight("int4"), LayerForm(LayerKind.W4A4_DYNAMIC)),
    (TOKEN_4, weight("int4", symmetric=False), LayerForm(LayerKind.W4A4_DYNAMIC, 0, symmetric=False)),
    (TOKEN_4, weight("int4", 8), LayerForm(LayerKind.W4A4_DYNAMIC, 8)),
    (TOKEN_4, weight("int4", 8, symmetric=False), LayerForm(LayerKind.W4A4_DYNAMIC, 8, symmetric=False)),
    (STATIC, weight("int8"), LayerForm(LayerKind.W8A8)),
    (STATIC | {"symmetric": True}, weight("int8"), LayerForm(LayerKind.W8A8)),
    (MIXED, weight("int8"), LayerForm(LayerKind.W8A8_MIX)),
]


@pytest.mark.parametrize(("act", "made", "form"), LEGAL)
def test_legal_pairs(act: dict[str, Any] | None, made: dict[str, Any], form: LayerForm) -> None:
    (rule,) = processor(strategy(act, made)).rules()
    assert rule.form == form
    assert (rule.needs == frozenset()) == (not form.kind.has_static_input)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"process\[0\]\.strategies: required"),
        ({"strategies": []}, r"process\[0\]\.strategies: got a list; must have at least 1 item"),
        ({"iters": 0}, r"process\[0\]\.iters: got 0; must be greater than 0"),
        ({"iters": 1.5}, r"process\[0\]\.iters: "),
        ({"iters": True}, r"process\[0\]\.iters: .*not true or false"),
        ({"batch_size": 0}, r"process\[0\]\.batch_size: got 0"),
        ({"lr": 0}, r"process\[0\]\.lr: got 0; must be greater than 0"),
        ({"minmax_lr": 1.5}, r"process\[0\]\.minmax_lr: got 1\.5; must be less than or equal to 1"),
        ({"momentum": 1}, r"process\[0\]\.momentum: got 1; must be less than 1"),
        ({"seed": -1}, r"process\[0\]\.seed: got -1"),
        ({"enable_minmax_tuning": 1}, r"process\[0\]\.enable_minmax_tuning: got 1; must be true or false"),
        ({"enable_quanted_input": True}, r"process\[0\]\.enable_quanted_input: unknown field"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    config = {"type": "autoround_quant", **({"strategies": [strategy(TOKEN_8, weight())]} if fields else {}), **fields}
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}})
    with pytest.raises(SchemaValidateError, match=message):
        recipe.spec()


@pytest.mark.parametrize(
    ("act", "made", "message"),
    [
        (STATIC, weight("int4"), r"strategies\[0\]: no layer has activations int8 per_tensor .* nearest legal pair is"),
        (TOKEN_8 | {"symmetric": False}, weight("int8"), r"nearest legal pair is act int8 per_token symmetric"),
        (
            TOKEN_8,
            weight("int4", symmetric=False),
            r"no layer has activations int8 per_token symmetric with weights int4",
        ),
        (TOKEN_8, weight("int4", 8, symmetric=False), r"no layer has .* int4 per_group asymmetric"),
        (TOKEN_4, weight("int8"), r"no layer has activations int4 per_token symmetric with weights int8"),
        (STATIC, weight("int8", 8), r"no layer has activations int8 per_tensor .* int8 per_group"),
        (TOKEN_8, weight() | {"scope": "per_group"}, r"scope per_group needs ext\.group_size; add ext"),
        (
            TOKEN_8,
            weight(group_size=8) | {"scope": "per_channel"},
            r"weight: ext\.group_size goes with scope per_group",
        ),
        (
            TOKEN_8 | {"ext": {"group_size": 8}},
            weight(),
            r"act: ext\.group_size goes with scope per_group, not with per_t",
        ),
        (TOKEN_8, weight(group_size=8) | {"ext": {"group_size": 0}}, r"weight\.ext\.group_size: got 0"),
        (TOKEN_8, weight(scale_dtype="float8"), r"weight\.ext\.scale_dtype: got 'float8'; allowed: float16"),
        (TOKEN_8, weight(percdamp=0.1), r"weight\.ext\.percdamp: unknown field \(fields: group_size, scale_dtype\)"),
        (TOKEN_8, weight() | {"method": "minmax"}, r"weight\.method: got 'minmax'; allowed: autoround"),
        (TOKEN_8, weight("mxfp4"), r"weight\.dtype: got 'mxfp4'; allowed: int8, int4"),
        (TOKEN_8 | {"method": "histogram"}, weight(), r"method 'histogram' is not available for int8 per_token"),
    ],
)
def test_illegal_pairs_and_settings(act: dict[str, Any], made: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaValidateError, match=message):
        processor(strategy(act, made))


def test_what_has_no_effect_is_told() -> None:
    one = processor(
        strategy(TOKEN_8 | {"ext": {"scale_dtype": "float32"}}, weight()),
        enable_round_tuning=False,
        enable_minmax_tuning=False,
        lr=0.1,
        minmax_lr=0.1,
    )
    assert one.notes() == [
        "process[0].strategies[0].qconfig.act.ext.scale_dtype has no effect with method minmax and scope per_token",
        "process[0].enable_round_tuning and enable_minmax_tuning are off: weights are rounded to nearest",
        "process[0].lr has no effect with enable_round_tuning: false",
        "process[0].minmax_lr has no effect with enable_minmax_tuning: false",
    ]


def info(name: str, width: int = 24) -> LinearInfo:
    return LinearInfo(name, name, width, 24, has_bias=False, in_block=True)


def test_only_own_linears_are_asked_for_and_checked() -> None:
    one = processor(strategy(STATIC, weight("int8"), include=["a"]), strategy(TOKEN_8, weight(group_size=7)))
    static, grouped = (rule.form for rule in one.rules())
    needs = frozenset({Need.RANGE})
    assignments = {
        "a": Assignment(static, "process[0].strategies[0]", "", needs),
        "b": Assignment(static, "process[1].strategies[0]", "", needs),
        "c": Assignment(grouped, "process[1].strategies[1]", ""),
    }
    assert one.requests([info("a"), info("b")], assignments) == {"a": needs}
    one.check([info("a"), info("b"), info("c")], assignments)
    assignments["d"] = Assignment(grouped, "process[0].strategies[1]", "")
    with pytest.raises(UnsupportedError, match=r"^d: ext\.group_size 7 does not divide its 24 input features"):
        one.check([info("d")], assignments)
    one.check([info("d", 28)], assignments)
    weights = 13 * (24 * 24 + 24 * 28)
    assert one.working_bytes([info("a"), info("b"), info("d", 28)], assignments) == weights + KEPT_BY_THE_HEAP
    assert one.working_bytes([info("b")], assignments) == 0


@pytest.mark.parametrize(
    ("act", "made", "product", "pace"),
    [(None, weight(), None, 1), (TOKEN_8, weight(), torch.float32, 1), (TOKEN_4, weight(), torch.float32, 4)],
)
def test_how_a_kind_is_trained(
    monkeypatch: pytest.MonkeyPatch, act: dict[str, Any] | None, made: dict[str, Any], product: Any, pace: float
) -> None:
    """The options of the recipe reach the training, and products are as exact as those of the finished layer."""
    seen: list[Any] = []

    def stop(*given: Any) -> None:
        seen.extend(given)
        raise RuntimeError("stop")

    monkeypatch.setattr("slim_core.processors.autoround_quant.train", stop)
    fields = {"iters": 3, "lr": 0.1, "minmax_lr": 0.2, "momentum": 0.3, "batch_size": 4, "seed": 5}
    one = processor(strategy(act, made), enable_round_tuning=False, **fields)
    block = Block()
    with pytest.raises(RuntimeError, match="stop"):
        finished(one, block)
    assert seen[0] is block
    assert [(linear.product, linear.pace) for linear in seen[1].values()] == [(product, pace)] * 2
    assert seen[2] == TrainingOptions(3, False, True, 0.1, 0.2, 0.3, 4, 5)
    assert seen[3] == "block"


class Memory:
    """A tensor source over one matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def rows(self, _name: str, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop]


class Block:
    """Two linears with a residual around them, and one that nothing reaches."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = nn.ModuleDict({name: nn.Linear(24, 24, bias=name == "b", dtype=dtype) for name in "abc"})
        for parameter in self.module.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)
            parameter.requires_grad_(False)
        mixing = torch.randn(8, 24, generator=generator)
        self.inputs = (torch.randn(6, 1, 10, 8, generator=generator) @ mixing).to(dtype)
        self.samples = 6
        self.targets = [self.run(sample) for sample in range(6)]

    def hidden(self, sample: int) -> Tensor:
        return nn.functional.gelu(self.module["a"](self.inputs[sample]))

    def run(self, sample: int) -> Tensor:
        return self.inputs[sample] + self.module["b"](self.hidden(sample))

    def target(self, sample: int) -> Tensor:
        return self.targets[sample]

    def linear(self, name: str) -> nn.Linear:
        linear = self.module[name]
        assert isinstance(linear, nn.Linear)
        return linear

    def error(self, layers: dict[str, QuantizedLinear]) -> float:
        total = 0.0
        for sample in range(self.samples):
            hidden = nn.functional.gelu(layers["a"].simulate(self.inputs[sample]))
            output = self.inputs[sample] + layers["b"].simulate(hidden)
            total += float((output - self.targets[sample]).float().square().sum())
        return total

    def statistics(self) -> dict[str, InputStatistics]:
        hidden = torch.cat([self.hidden(sample) for sample in range(self.samples)])
        seen = {"a": self.inputs.flatten(0, 1), "b": hidden}
        return {name: InputStatistics(range=observe_range(x)) for name, x in seen.items()}


def finished(
    one: AutoroundQuant,
    block: Block,
    names: str = "ab",
    statistics: dict[str, InputStatistics] | None = None,
) -> dict[str, tuple[QuantizedLinear, float]]:
    rules = one.rules()
    linears: dict[str, LinearWork] = {}
    for name in names:
        linear = block.linear(name)
        rule = next(rule for rule in rules if rule.filter.matches(name))
        matrix = linear.weight.data
        lazy = LazyTensor(Memory(matrix), TensorMeta(f"{name}.weight", matrix.dtype, tuple(matrix.shape)))  # pyright: ignore
        bias = None if linear.bias is None else linear.bias.data
        linears[name] = LinearWork(info(name), lazy, bias, Assignment(rule.form, rule.position, "", rule.needs))
    done: dict[str, tuple[QuantizedLinear, float]] = {}
    with torch.no_grad():  # as the runner has it
        one.process(
            UnitWork(
                "block",
                linears,
                block.statistics() if statistics is None else statistics,
                torch.bfloat16,
                torch.device("cpu"),
                lambda work, layer, sqnr_db: done.update({work.info.name: (layer, sqnr_db)}),
                block,
            )
        )
    return done


def rounded(block: Block, form: LayerForm, one: AutoroundQuant, kinds: dict[str, QuantizedLinear]) -> float:
    """The error of the same layers with weights rounded to nearest."""
    layers: dict[str, QuantizedLinear] = {}
    options = {"iters": 1, "enable_round_tuning": False, "enable_minmax_tuning": False}
    plain = AutoroundQuant(one.config.model_copy(update=options), one.position)
    for name, (layer, _) in finished(plain, block).items():
        matrix = block.linear(name).weight.data
        want = minmax_weight(
            LazyTensor(Memory(matrix), TensorMeta(name, matrix.dtype, tuple(matrix.shape))),  # pyright: ignore
            bits=form.kind.weight_bits,
            symmetric=form.symmetric,
            name=name,
            group_size=form.group_size,
        )
        assert torch.equal(layer.weight, want.codes)
        assert type(layer) is type(kinds[name])
        layers[name] = layer
    return block.error(layers)


@pytest.mark.parametrize(("act", "made", "form"), LEGAL)
def test_every_kind_of_layer_gains(act: dict[str, Any] | None, made: dict[str, Any], form: LayerForm) -> None:
    """The finished layers, as the target computes them, do better than the same ones rounded to nearest."""
    block = Block()
    made = made | {"ext": made["ext"] | {"scale_dtype": "float32"}}  # in which nearest is exactly that of minmax
    one = processor(strategy(act, made), iters=30)
    done = finished(one, block)
    layers = {name: layer for name, (layer, _) in done.items()}
    types = {
        LayerKind.W8A16: WeightOnlyInt,
        LayerKind.W4A16: WeightOnlyInt,
        LayerKind.W8A8: StaticInt8,
        LayerKind.W8A8_MIX: MixedInt8,
    }
    for name, (layer, sqnr_db) in done.items():
        assert layer.kind is form.kind
        assert isinstance(layer, types.get(form.kind, DynamicInt))
        exact = block.linear(name).weight.data.float()
        noise = float((layer.dequantized() - exact).square().sum())
        assert sqnr_db == pytest.approx(10 * torch.log10(exact.square().sum() / noise).item(), abs=0.01)
    assert layers["a"].bias is None
    assert layers["b"].bias is block.linear("b").bias.data or torch.equal(
        layers["b"].bias,
        block.linear("b").bias.data,  # pyright: ignore
    )
    assert block.error(layers) < (0.9 if form.kind.weight_bits == 4 else 1.0) * rounded(block, form, one, layers)


def test_strategies_share_a_block() -> None:
    block = Block()
    one = processor(strategy(TOKEN_4, weight(), include=["a"]), strategy(STATIC, weight("int8")))
    done = finished(one, block)
    assert {name: layer.kind for name, (layer, _) in done.items()} == {"a": "W4A4_DYNAMIC", "b": "W8A8"}


def test_linears_of_other_processors_are_left_alone() -> None:
    block = Block()
    one = processor(strategy(TOKEN_8, weight(), include=["a"]))
    other = AutoroundQuant(one.config, "process[1]")
    done: list[str] = []
    matrix = block.linear("a").weight.data
    lazy = LazyTensor(Memory(matrix), TensorMeta("a.weight", matrix.dtype, tuple(matrix.shape)))  # pyright: ignore
    work = LinearWork(info("a"), lazy, None, Assignment(one.rules()[0].form, "process[0].strategies[0]", ""))
    for each in (other, one):
        each.process(
            UnitWork(
                "block",
                {"a": work},
                {},
                None,
                torch.device("cpu"),
                lambda work, _layer, _db, each=each: done.append(f"{each.position} {work.info.name}"),
                block,
            )
        )
    assert done == ["process[0] a"]
    one.process(UnitWork("prologue", {}, {}, None, torch.device("cpu"), lambda *_: None))


def test_a_linear_that_no_token_reached(caplog: pytest.LogCaptureFixture) -> None:
    block = Block()
    with caplog.at_level(logging.WARNING, "slim"):
        done = finished(processor(strategy(TOKEN_8, weight())), block, "abc")
    (record,) = caplog.records
    assert record.getMessage() == (
        "block: no calibration token reached 1 linears in training, so they are rounded to nearest: c"
    )
    layer, _ = done["c"]
    exact = block.linear("c").weight.data.float()
    scale = (exact.abs().amax(1, keepdim=True) / 7).bfloat16().float()
    assert torch.equal(layer.weight.float(), torch.round(exact / scale).clamp(-8, 7))


@pytest.mark.parametrize("act", [STATIC, MIXED])
def test_a_static_input_that_was_never_seen(act: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"^[ab]: no calibration sample reached this linear"):
        finished(processor(strategy(act, weight("int8"))), Block(), statistics={})


def test_a_weight_that_is_no_number() -> None:
    block = Block()
    block.linear("b").weight.data[3, 4] = float("nan")
    with pytest.raises(InvalidModelError, match=r"^b\.weight: the weight holds NaN or infinity in row 3"):
        finished(processor(strategy(TOKEN_8, weight())), block)


def test_activations_that_are_no_numbers() -> None:
    block = Block()
    block.inputs[2, 0, 3, 5] = float("inf")
    with pytest.raises(InvalidModelError, match=r"^block: its outputs hold NaN or infinity"):
        finished(processor(strategy(TOKEN_8, weight())), block)


def test_the_weights_of_the_block_stay() -> None:
    block = Block()
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    modules = dict(block.module.named_modules())
    finished(processor(strategy(TOKEN_8, weight(group_size=8))), block)
    assert dict(block.module.named_modules()) == modules
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.module.named_parameters())


def test_the_scale_has_the_precision_that_was_asked_for() -> None:
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        done = finished(processor(strategy(TOKEN_4, weight(scale_dtype=name))), Block())
        for layer, _ in done.values():
            assert isinstance(layer, DynamicInt)
            assert torch.equal(layer.weight_scale.to(dtype).float(), layer.weight_scale)

"""``autoround_quant``: quantize linears with rounding and ranges that are learned, a whole block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.memory import KEPT_BY_THE_HEAP
from slim_core.model.block_run import BlockRun
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearRule, LinearWork, Processor, UnitWork
from slim_core.quantization.activations import static_parameters
from slim_core.quantization.autoround import (
    DynamicInput,
    FloatInput,
    InputRounding,
    StaticInput,
    TrainingOptions,
    TunedLinear,
    TunedWeight,
    WeightGrid,
    train,
    training_forwards,
)
from slim_core.quantization.building import build_layer, check_shape, needs_of
from slim_core.quantization.kinds import LAYER_METHODS, LayerKind, LayerMethods, Scheme, layer_form
from slim_core.recipe import Exclude, Include, LinearQConfig, NameFilter, Phase, ProcessorConfig
from slim_core.recipe.base import Integer, StrictModel
from slim_core.recipe.qconfig import ActConfig, WeightConfig

__all__ = ["AutoroundQuant", "AutoroundQuantConfig", "AutoroundStrategy"]

_logger = get_logger(__name__)

_INTEGERS = [
    Scheme(dtype, scope, symmetric)
    for dtype in ("int8", "int4")
    for scope in ("per_channel", "per_group")
    for symmetric in (True, False)
]
_TOKENS = [Scheme(dtype, "per_token", True) for dtype in ("int8", "int4")]
AUTOROUND_METHODS = LayerMethods(
    act={**LAYER_METHODS.act, **dict.fromkeys(_TOKENS, ("minmax", "autoround"))},
    weight=dict.fromkeys(_INTEGERS, ("autoround",)),
)
"""Activations as in ``linear_quant``; that of a token may be called ``autoround`` and means the same."""


class AutoroundExt(TypedDict, total=False):
    """Settings of the weight."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # pyright: ignore

    group_size: Annotated[Integer, Field(gt=0, description="per_group scope, required: columns that share a scale")]
    scale_dtype: Annotated[
        Literal["float16", "float32", "bfloat16"], Field(description="Precision of the scales. Default: bfloat16")
    ]


def _refuse_group_size(config: ActConfig | WeightConfig) -> None:
    if "group_size" in config.ext and config.scope != "per_group":
        raise PydanticCustomError(
            "group_size_without_groups",
            "ext.group_size goes with scope per_group, not with {scope}",
            {"scope": config.scope},
        )


class AutoroundWeightConfig(WeightConfig):
    """A weight; omitted fields mean int8 with one scale per output channel."""

    methods: ClassVar[Mapping[str, frozenset[str]]] = {"autoround": frozenset({"group_size", "scale_dtype"})}

    dtype: Literal["int8", "int4"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="int8", description="Number format. Default: int8"
    )
    method: str = Field(default="autoround", description="How it is rounded. Default: autoround, the only one")
    ext: AutoroundExt = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=AutoroundExt, description="Settings of the method"
    )

    @model_validator(mode="after")
    def _groups(self) -> AutoroundWeightConfig:
        _refuse_group_size(self)
        return self


class AutoroundActConfig(ActConfig):
    """An activation; omitted fields mean static int8 with an offset."""

    @model_validator(mode="after")
    def _groups(self) -> AutoroundActConfig:
        _refuse_group_size(self)
        return self


class AutoroundQConfig(LinearQConfig):
    """Activation and weight of a linear layer."""

    act: AutoroundActConfig | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, description="Activation; left out, activations stay in floating point"
    )
    weight: AutoroundWeightConfig = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="Weight; an empty mapping takes the defaults"
    )


class AutoroundStrategy(StrictModel):
    """What some of the linears become."""

    qconfig: AutoroundQConfig = Field(description="How activations and weights are quantized")
    include: Include = Field(default=("*",), description="Patterns of linears to quantize; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of linears to leave alone; wins over include")

    @model_validator(mode="after")
    def _legal(self) -> AutoroundStrategy:
        try:
            layer_form(self.qconfig, AUTOROUND_METHODS)
        except UnsupportedError as error:
            text = f"{error.what}; {error.remedy}"
            raise PydanticCustomError("illegal_pair", "{text}", {"text": text}) from error
        return self

    @property
    def scale_dtype(self) -> torch.dtype:
        """The precision that the scales of the weight have."""
        return getattr(torch, self.qconfig.weight.ext.get("scale_dtype", "bfloat16"))


class AutoroundQuantConfig(ProcessorConfig):
    """Quantize linears with rounding and ranges learned on the output of their block."""

    phase = Phase.QUANTIZATION

    type: Literal["autoround_quant"] = "autoround_quant"
    iters: int = Field(default=10, gt=0, description="Training steps of each block")
    enable_minmax_tuning: bool = Field(default=True, description="Learn the range of every channel or group")
    enable_round_tuning: bool = Field(default=True, description="Learn for every weight which code it is rounded to")
    strategies: tuple[AutoroundStrategy, ...] = Field(
        min_length=1, description="What becomes of which linears; a linear belongs to the first that names it"
    )
    float_targets: bool = Field(
        default=True,
        description="With propagate: quantized, train towards the float model instead of the block's own float output",
    )
    lr: float | None = Field(
        default=None, gt=0, le=1, description="First step of the rounding, in codes. Default: by iters"
    )
    minmax_lr: float | None = Field(
        default=None, gt=0, le=1, description="First step of the range, as a share of it. Default: by iters"
    )
    momentum: float = Field(default=0.6, ge=0, lt=1, description="Share of the gradient kept from step to step")
    batch_size: int = Field(default=8, ge=1, description="Forwards (samples, or batches of the dataset) of each step")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Decides the order of the samples")

    def warnings(self) -> list[str]:
        found = super().warnings()
        if not self.enable_round_tuning and not self.enable_minmax_tuning:
            found.append("enable_round_tuning and enable_minmax_tuning are off: weights are rounded to nearest")
        for rate, part in (("lr", "enable_round_tuning"), ("minmax_lr", "enable_minmax_tuning")):
            if getattr(self, rate) is not None and not getattr(self, part):
                found.append(f"{rate} has no effect with {part}: false")
        return found


class AutoroundQuant(Processor):
    """Learns all of its linears of a block together, each as the layer that it becomes."""

    Config = AutoroundQuantConfig
    config: AutoroundQuantConfig

    @property
    def runs_block(self) -> bool:
        return True

    def block_forwards(self, samples: int) -> int:
        config = self.config
        return training_forwards(samples, config.iters, config.batch_size)

    @property
    def wants_float_targets(self) -> bool:
        return self.config.float_targets

    def _strategies(self) -> Iterator[tuple[str, AutoroundStrategy]]:
        """Each strategy and its position."""
        return ((f"{self.position}.strategies[{i}]", one) for i, one in enumerate(self.config.strategies))

    def rules(self) -> list[LinearRule]:
        forms = [layer_form(one.qconfig, AUTOROUND_METHODS) for _, one in self._strategies()]
        return [
            LinearRule(position, NameFilter(one.include, one.exclude), form, needs_of(one.qconfig), form.dynamic)
            for form, (position, one) in zip(forms, self._strategies(), strict=True)
        ]

    def schemes(self) -> Mapping[str, LinearQConfig]:
        return {position: one.qconfig for position, one in self._strategies()}

    def notes(self) -> list[str]:
        return [f"{self.position}.{text}" for text in self.config.warnings()]

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        for info in self.own(linears, assignments):
            check_shape(assignments[info.name].form, info)

    def working_bytes(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> int:
        size = sum(info.in_features * info.out_features for info in self.own(linears, assignments))
        return TunedWeight.BYTES * size + (KEPT_BY_THE_HEAP if size else 0)

    def process(self, work: UnitWork) -> None:
        owned = [(linear, one) for position, one in self._strategies() for linear in work.owned_by(position)]
        if not owned:
            return
        learning = [(linear, one) for linear, one in owned if linear.info.name not in work.starved]
        tuned = {linear.info.name: _tuned(work, linear, one) for linear, one in learning}
        if tuned:
            if work.block is None:
                raise UnexpectedError("there is no block to train on", where=work.name)
            self._train(work, work.block, tuned)
        for linear, one in owned:
            name = linear.info.name
            # One that must not learn from the few tokens it sees is rounded to nearest, which is where all begin.
            weight = (tuned.pop(name, None) or _tuned(work, linear, one)).tuned.best()
            layer = build_layer(
                linear.assignment.form,
                weight,
                one.qconfig.act,
                seen=work.seen(name),
                bias=linear.bias,
                name=name,
                dtype=work.dtype,
            )
            work.finish(linear, layer, weight.sqnr_db)

    def _train(self, work: UnitWork, block: BlockRun, tuned: Mapping[str, TunedLinear]) -> None:
        config = self.config
        options = TrainingOptions(
            config.iters,
            config.enable_round_tuning,
            config.enable_minmax_tuning,
            config.lr,
            config.minmax_lr,
            config.momentum,
            config.batch_size,
            config.seed,
        )
        outcome = train(block, tuned, options, work.name)
        _logger.info(
            "%s: relative squared error of its output %.3g with weights rounded to nearest, %.3g before training, "
            "%.3g after",
            *(work.name, outcome.nearest, outcome.start, outcome.best),
        )
        if outcome.unseen:
            _logger.warning(
                "%s: no calibration token reached %d linears in training, so they are rounded to nearest: %s",
                *(work.name, len(outcome.unseen), ", ".join(outcome.unseen)),
            )


def _tuned(work: UnitWork, linear: LinearWork, strategy: AutoroundStrategy) -> TunedLinear:
    form, device = linear.assignment.form, work.device
    grid = WeightGrid(form.kind.weight_bits, form.symmetric, strategy.scale_dtype)
    stored = linear.weight.rows(0, linear.weight.shape[0]).to(device)
    tuned = TunedWeight(stored, grid, form.group_size, linear.weight.meta.name)
    inputs = _input_rounding(work, linear, strategy.qconfig.act)
    # Integer products are exact: float32 is, and half precision is near enough where only it is fast.
    product = torch.float32 if device.type == "cpu" and strategy.qconfig.act is not None else None
    # There is more to make up for where activations have four bits, and farther travel pays.
    pace = 4.0 if form.kind is LayerKind.W4A4_DYNAMIC else 1.0
    return TunedLinear(tuned, inputs, None if linear.bias is None else linear.bias.to(device), product, pace)


def _input_rounding(work: UnitWork, linear: LinearWork, act: ActConfig | None) -> InputRounding:
    if act is None:
        return FloatInput()
    name = linear.info.name
    if linear.assignment.kind.has_static_input:
        scale, offset = static_parameters(act, work.seen(name), name, work.dtype)
        if act.scope == "per_tensor":
            return StaticInput(scale.to(work.device), offset.to(work.device))
    return DynamicInput(4 if act.dtype == "int4" else 8)

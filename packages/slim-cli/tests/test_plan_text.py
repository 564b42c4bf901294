"""How a plan is told."""

from __future__ import annotations

from typing import Any, cast

from slim_core.budget import UNLIMITED
from slim_core.devices import Devices
from slim_core.quantization.kinds import LayerKind
from slim_core.runners.choice import RunnerChoice
from slim_core.runners.plan import Plan, PlannedUnit
from slim_core.runners.plan_linears import PlannedLinear
from slim_core.runners.plan_memory import PlannedMemory
from slim_core.runners.plan_text import render_plan, render_summary
from slim_core.runners.prediction import Share
from slim_core.savers.ascendv1 import AscendV1Saver, AscendV1SaverConfig
from slim_core.savers.base import Output


def _linear(name: str, kind: LayerKind = LayerKind.W8A8, reason: str = "spec.process[0]") -> PlannedLinear:
    return PlannedLinear(name, kind, reason, 128, 64)


def _plan(units: list[PlannedUnit], warnings: list[str] | None = None) -> Plan:
    return Plan(
        model=cast("Any", None),
        runner=RunnerChoice("layer_wise", "because"),
        devices=Devices("cpu"),
        processors=[],
        saver=AscendV1Saver(AscendV1SaverConfig()),
        units=units,
        assignments={},
        output=Output((), ()),
        warnings=warnings or [],
        requests={},
        streams=1,
        forwards=0,
        activation_bytes=0,
        memory=PlannedMemory((Share("all of it", 3 << 20),), UNLIMITED),
    )


def _block(number: int, *, kind: LayerKind = LayerKind.W8A8, experts: int = 0) -> PlannedUnit:
    name = f"model.layers.{number}"
    linears = [_linear(f"{name}.self_attn.q_proj"), _linear(f"{name}.mlp.down_proj", kind)]
    linears += [_linear(f"{name}.mlp.experts.{i}.up_proj") for i in range(experts)]
    return PlannedUnit(name, tuple(linears), 2 << 20, 1 << 20)


def test_equal_blocks_are_told_once() -> None:
    plan = _plan([PlannedUnit("prologue", (), 10, 10), *(_block(i) for i in range(36))])
    text = render_plan(plan)
    assert "model.layers.0-35 (36 units): 2.0 MiB -> 1.0 MiB each\n" in text
    assert "prologue: 10 B -> 10 B, no linear" in text
    assert text.count("down_proj") == 1
    assert "72 W8A8, 0 stay FLOAT" in text


def test_blocks_that_differ_are_told_apart_with_their_numbers() -> None:
    float_in = (0, 3, 4)
    blocks = [_block(i, kind=LayerKind.FLOAT if i in float_in else LayerKind.W8A8) for i in range(6)]
    text = render_plan(_plan(blocks))
    assert "model.layers.0,3-4 (3 units): " in text
    assert "model.layers.1-2,5 (3 units): " in text


def test_experts_are_told_once() -> None:
    text = render_plan(_plan([_block(0, experts=64)]))
    assert "mlp.experts.0-63.up_proj (64 linears)  128 x 64  W8A8  spec.process[0]" in text
    assert text.count("experts") == 1


def test_two_numbers_in_a_name_are_not_mixed_up() -> None:
    linears = [_linear(f"b.0.groups.{g}.experts.{e}.up") for g in (0, 1) for e in (0, 1)]
    text = render_plan(_plan([PlannedUnit("b.0", tuple(linears), 1, 1)]))
    assert "groups.0.experts.0-1.up (2 linears)" in text
    assert "groups.1.experts.0-1.up (2 linears)" in text


def test_summary_lists_warnings() -> None:
    text = render_summary(_plan([_block(0)], ["first", "second"]))
    assert text.endswith("warnings   2\n    - first\n    - second")
    assert " at most, 3.0 MiB of it beyond the process itself" in text

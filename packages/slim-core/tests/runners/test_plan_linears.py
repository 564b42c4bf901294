"""What rules make of the linears of a drafting layer, which nothing runs."""

from __future__ import annotations

import pytest

from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import LinearRule
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.statistics import Need
from slim_core.recipe import NameFilter
from slim_core.runners.plan_linears import assign_linears, planned_linears

LINEARS = tuple(
    LinearInfo(f"{block}.{leaf}", f"{block}.{leaf}", 64, 32, has_bias=False, in_block=True, runs=block != "mtp")
    for block in ("layers.0", "mtp")
    for leaf in ("up", "down")
)
START = "the model class does not run drafting layers, so they are not calibrated: "
NOTE = "a drafting layer, not calibrated"


def rule(kind: LayerKind, *needs: Need, position: str = "process[0]", include: str = "*", group: int = 0) -> LinearRule:
    form = LayerForm(kind, group)
    return LinearRule(position, NameFilter((include,)), form, frozenset(needs), form.dynamic)


@pytest.mark.parametrize(
    ("given", "becomes", "without"),
    [
        (rule(LayerKind.W8A8_DYNAMIC), LayerKind.W8A8_DYNAMIC, ""),
        (rule(LayerKind.W8A16, group=32), LayerKind.W8A16, ""),
        (rule(LayerKind.W4A4_MXFP4), LayerKind.W4A4_MXFP4, ""),
        (rule(LayerKind.W8A8, Need.RANGE), LayerKind.W8A8_DYNAMIC, "W8A8_DYNAMIC instead of W8A8"),
        (rule(LayerKind.W8A8_MIX, Need.HISTOGRAM), LayerKind.W8A8_DYNAMIC, "W8A8_DYNAMIC instead of W8A8_MIX"),
        (rule(LayerKind.W4A8_DYNAMIC, Need.HESSIAN), LayerKind.W4A8_DYNAMIC, "weight rounded to nearest"),
        (rule(LayerKind.W8A16, Need.CHANNELS), LayerKind.W8A16, "weight error not weighted by inputs"),
        (rule(LayerKind.W16A16S, Need.HESSIAN), LayerKind.W16A16S, "weight pruned by magnitude"),
        (
            rule(LayerKind.W8A8, Need.RANGE, Need.HESSIAN),
            LayerKind.W8A8_DYNAMIC,
            "W8A8_DYNAMIC instead of W8A8, weight rounded to nearest",
        ),
    ],
)
def test_what_stands_in(given: LinearRule, becomes: LayerKind, without: str) -> None:
    assignments, warnings = assign_linears(list(LINEARS), [given])
    for info in LINEARS:
        found = assignments[info.name]
        if info.runs:
            assert (found.form, found.reason, found.needs) == (given.form, "spec.process[0]", given.needs)
        else:
            assert found.form == LayerForm(becomes, given.form.group_size)
            assert found.reason == f"spec.process[0]; {NOTE}" + (f": {without}" if without else "")
            assert found.needs == frozenset()
    assert warnings == ([f"{START}{without} (2 linears, e.g. mtp.up)"] if without else [])


def test_what_is_learned_from_the_block() -> None:
    assignments, warnings = assign_linears(list(LINEARS), [rule(LayerKind.W8A8_DYNAMIC)], {"process[0]"})
    assert assignments["mtp.down"].reason == f"spec.process[0]; {NOTE}: weight rounded to nearest"
    assert assignments["layers.0.down"].reason == "spec.process[0]"
    assert warnings == [f"{START}weight rounded to nearest (2 linears, e.g. mtp.up)"]


@pytest.mark.parametrize("kind", [LayerKind.W8A8S, LayerKind.W8A8])
def test_a_static_kind_that_nothing_stands_in_for(kind: LayerKind) -> None:
    """There is no dynamic W8A8S, and a processor that has its own layers may know none either."""
    only = LinearRule("process[0]", NameFilter(("*.up",)), LayerForm(kind), frozenset({Need.RANGE}))
    rules = [only, rule(LayerKind.W8A8_DYNAMIC, position="process[1]", include="*.down")]
    assert kind is LayerKind.W8A8 or rule(kind).unseen is None
    assignments, warnings = assign_linears(list(LINEARS), rules)
    assert set(assignments) == {"layers.0.up", "layers.0.down", "mtp.down"}
    text = f"FLOAT instead of {kind}, which needs the range of the input"
    assert warnings == [f"{START}{text} (1 linears, e.g. mtp.up)"]
    unit = Unit("mtp", None, {}, {}, LINEARS[2:], mirrors="layers.0")
    assert [(linear.kind, linear.reason) for linear in planned_linears(unit, assignments, rules)] == [
        (LayerKind.FLOAT, f"spec.process[0]; {NOTE}: {text}"),
        (LayerKind.W8A8_DYNAMIC, f"spec.process[1]; {NOTE}"),
    ]


def test_those_that_no_rule_names() -> None:
    rules = [rule(LayerKind.W8A8, Need.RANGE, include="layers.*")]
    assignments, warnings = assign_linears(list(LINEARS), rules)
    assert set(assignments) == {"layers.0.up", "layers.0.down"}
    assert warnings == []
    unit = Unit("mtp", None, {}, {}, LINEARS[2:], mirrors="layers.0")
    assert {linear.reason for linear in planned_linears(unit, assignments, rules)} == {"named by no rule"}

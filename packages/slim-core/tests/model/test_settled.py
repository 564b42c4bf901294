"""What is left of a model's structure once it is known which linears are quantized, and what engines read."""

from __future__ import annotations

import torch

from slim_core.model.probing import Findings
from slim_core.model.query_keys import KeyFindings, QueryKey, Side
from slim_core.model.structure import Structure
from slim_core.model.subgraphs import Subgraph

ROWS = torch.arange(4)
NORM = Subgraph("norm-linear", "b.norm", ("b.q", "b.k"), ROWS)
OV = Subgraph("ov", "b.v", ("b.o",), ROWS, ROWS)
UP = Subgraph("up-down", "b.up", ("b.down",), ROWS, ROWS)
INPUTS = [Subgraph("norm-linear", "", targets, ROWS) for targets in (("b.q", "b.k"), ("b.o",), ("b.down",), ("b.c",))]
EVERY = {"b.q", "b.k", "b.v", "b.o", "b.up", "b.down", "b.c"}


def settled(quantized: set[str], *, reads_floats: bool, inputs: list[Subgraph] = INPUTS) -> Findings:
    structure = Structure({"b": Findings([OV, UP, NORM], {"b.x": "odd"}, list(inputs))})
    after = structure.settled(quantized, reads_floats=reads_floats)
    assert after.folds_floats == reads_floats
    return after.findings["b"]


def targets(found: Findings) -> list[tuple[str, ...]]:
    return [graph.targets for graph in found.inputs]


def test_what_can_be_folded_is_not_scaled() -> None:
    found = settled(EVERY, reads_floats=True)
    assert found.subgraphs == [OV, UP, NORM]
    assert targets(found) == [("b.c",)]
    assert found.refused == {"b.x": "odd"}
    assert found.every == [OV, UP, NORM, *found.inputs]


def test_nothing_is_folded_into_a_float_that_engines_do_not_read() -> None:
    found = settled(EVERY, reads_floats=False)
    assert found.subgraphs == [OV, UP]  # both ends are quantized
    assert targets(found) == [("b.q", "b.k"), ("b.c",)]
    assert found.refused == {"b.x": "odd"}  # the norm is not missed
    found = settled(EVERY - {"b.v", "b.down"}, reads_floats=False)
    assert found.subgraphs == []
    assert targets(found) == [("b.q", "b.k"), ("b.o",), ("b.c",)]
    assert found.refused == {
        "b.x": "odd",
        "b.down": "it stays FLOAT, and only the input of a quantized linear can be scaled while the model runs",
        "b.up": "engines take b.down from the float model, so nothing can be folded here",
    }


def test_without_another_way_the_loss_is_told() -> None:
    found = settled(EVERY, reads_floats=False, inputs=[])
    assert found.refused["b.norm"] == "engines take b.norm from the float model, so nothing can be folded here"


def test_of_a_group_those_that_stay_float_are_left_out() -> None:
    found = settled(EVERY - {"b.k"}, reads_floats=False)
    assert targets(found)[0] == ("b.q",)
    assert "b.k" in found.refused


def test_keys_follow_the_same_rule() -> None:
    def place(name: str, key: str) -> QueryKey:
        return QueryKey(name, Side(key, ROWS), Side("b.q", ROWS), 1, 1, 4, ROWS)

    keys = {"b": KeyFindings([place("b.one", "b.k"), place("b.two", "b.k_norm")])}
    structure = Structure({"b": Findings()}, keys).settled(EVERY, reads_floats=False)
    assert [found.attention for found in structure.keys["b"].found] == ["b.one"]
    assert structure.keys["b"].refused == {
        "b.two": "engines take b.k_norm from the float model, so nothing can be folded here"
    }
    assert len(Structure({"b": Findings()}, keys).settled(EVERY, reads_floats=True).keys["b"].found) == 2

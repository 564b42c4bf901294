"""Which matrix of which expert lies where in a stack, and stacks taken apart to match the names of another folder."""

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
from slim_core.checkpoint.sliced import SlicedSource
from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.stacked import cut_stack, is_transposed, with_experts_apart

E, H, INNER = 3, 8, 5
GATE, UP, DOWN = (torch.randn(E, INNER, H), torch.randn(E, INNER, H), torch.randn(E, H, INNER))
sizes = st.integers(1, 9)


@given(hidden=sizes, inner=sizes)
def test_the_two_shapes_always_tell_how_they_lie(hidden: int, inner: int) -> None:
    """Also where one of the two is square, that is where ``hidden`` is ``inner`` or twice that."""
    gate_up, down = (2 * inner, hidden), (hidden, inner)
    assert is_transposed(gate_up, down) is False
    assert is_transposed(gate_up[::-1], down[::-1]) is True
    assert is_transposed(gate_up[::-1], down) is (
        False if gate_up == gate_up[::-1] else True if hidden == inner else None
    )


@pytest.mark.parametrize(
    ("gate_up", "down"), [((10, 8), (8, 4)), ((8, 10), (8, 5)), ((10, 7), (8, 5)), ((5, 8), (8, 5)), ((10, 8), (5, 8))]
)
def test_shapes_that_are_no_pair(gate_up: tuple[int, int], down: tuple[int, int]) -> None:
    assert is_transposed(gate_up, down) is None


def gate_up(transposed: bool, interleaved: bool) -> Tensor:
    fused = torch.stack([GATE, UP], 2).flatten(1, 2) if interleaved else torch.cat([GATE, UP], 1)
    return fused.mT.contiguous() if transposed else fused


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_stacks_are_cut_into_their_linears(tmp_path: Path, transposed: bool, interleaved: bool) -> None:
    biases = torch.stack([GATE[:, :, 0], UP[:, :, 0]], 2).flatten(1) if interleaved else gate_up(False, False)[:, :, 0]
    stacks = {"gate_up": gate_up(transposed, interleaved), "bias": biases.contiguous()}
    save_file(stacks, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    slices = {}
    for name in stacks:
        slices |= cut_stack(
            source.meta(name), "m.experts", ("w1", "w3"), transposed=transposed, interleaved=interleaved
        )
    view = SlicedSource(source, slices)
    assert len(list(view)) == 4 * E
    for expert in range(E):
        for linear, want in (("w1", GATE), ("w3", UP)):
            assert torch.equal(view.load(f"m.experts.{expert}.{linear}.weight"), want[expert])
            assert torch.equal(view.load(f"m.experts.{expert}.{linear}.bias"), want[expert, :, 0])


def test_a_stack_whose_experts_are_single_linears() -> None:
    slices = cut_stack(TensorMeta("x.weight", torch.float32, (2, 4, 3)), "x", ("",))
    assert {name: (part.index, part.outputs) for name, part in slices.items()} == {
        "x.0.weight": (0, range(4)),
        "x.1.weight": (1, range(4)),
    }


def names_of(prefix: str, *linears: str, part: str = "weight") -> list[str]:
    return [f"{prefix}.{e}.{linear}.{part}" for e in range(E) for linear in linears]


STANDARD = ("gate_proj", "up_proj", "down_proj")
P = "model.layers.0.mlp.experts"
MATCHES: list[tuple[dict[str, Tensor], list[str], dict[str, Any]]] = [
    ({f"{P}.gate_up_proj": gate_up(False, False), f"{P}.down_proj": DOWN}, names_of(P, *STANDARD), {}),
    ({f"{P}.gate_up_proj": gate_up(True, False), f"{P}.down_proj": DOWN.mT}, names_of(P, *STANDARD), {}),
    ({f"{P}.gate_up_proj": gate_up(False, False), f"{P}.down_proj": DOWN}, names_of(P, "w1", "w3", "w2"), {}),
    (
        {f"{P}.gate_up_proj": gate_up(True, True), f"{P}.down_proj": DOWN.mT},
        names_of(P, *STANDARD),
        {"model_type": "gpt_oss"},
    ),
    (
        {f"{P}.gate_up_proj": gate_up(True, True), f"{P}.down_proj": DOWN.mT},
        names_of(P, *STANDARD),
        {"model_type": "x", "text_config": {"model_type": "gpt_oss"}},
    ),
    ({f"{P}.fc1.weight": gate_up(True, False), f"{P}.fc2.weight": DOWN.mT}, names_of(P, *STANDARD), {}),
    (
        {f"{P}.w13_weight": gate_up(False, True), f"{P}.w2_weight": DOWN},
        names_of(P, *STANDARD),
        {"model_type": "inkling2_text"},
    ),
    ({f"{P}.gate_proj": GATE, f"{P}.up_proj": UP, f"{P}.down_proj": DOWN}, names_of(P, *STANDARD), {}),
    (
        {"b.input_linear.weight": gate_up(False, False), "b.output_linear.weight": DOWN},
        names_of("b.experts", *STANDARD),
        {},
    ),
]


@pytest.mark.parametrize(("stacks", "names", "config"), MATCHES)
def test_experts_are_found_under_the_names_of_the_other_folder(
    tmp_path: Path, stacks: dict[str, Tensor], names: list[str], config: dict[str, Any]
) -> None:
    tensors = {name: stack.contiguous() for name, stack in stacks.items()} | {"other": torch.ones(2, 3, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    view = with_experts_apart(Checkpoint(tmp_path), {*names, "other"}, config)
    assert sorted(view) == sorted([*names, "other"])
    for name in names:
        *_, expert, linear, _part = name.split(".")
        want = {"w1": GATE, "w3": UP, "w2": DOWN, "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}[linear]
        assert torch.equal(view.load(name), want[int(expert)]), name


def test_experts_without_a_gate_biases_and_single_linears(tmp_path: Path) -> None:
    tensors = {
        f"{P}.up_proj": UP,
        f"{P}.down_proj": DOWN,
        "q.experts.gate_up_proj": gate_up(False, False),
        "q.experts.down_proj": DOWN,
        "q.experts.gate_up_proj_bias": gate_up(False, False)[:, :, 1].contiguous(),
        "q.experts.down_proj_bias": DOWN[:, :, 1].contiguous(),
        "r.input_linear.weight": UP,
    }
    names = [
        *names_of(P, "up_proj", "down_proj"),
        *(name for part in ("weight", "bias") for name in names_of("q.experts", *STANDARD, part=part)),
        *(f"r.input_linear.{e}.weight" for e in range(E)),
    ]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    view = with_experts_apart(Checkpoint(tmp_path), names, {})
    assert sorted(view) == sorted(names)
    assert torch.equal(view.load(f"{P}.1.up_proj.weight"), UP[1])
    assert torch.equal(view.load(f"{P}.2.down_proj.weight"), DOWN[2])
    assert torch.equal(view.load("q.experts.1.up_proj.bias"), UP[1, :, 1])
    assert torch.equal(view.load("q.experts.2.down_proj.bias"), DOWN[2, :, 1])
    assert torch.equal(view.load("r.input_linear.2.weight"), UP[2])


def test_what_the_other_folder_has_as_it_is_stays(tmp_path: Path) -> None:
    save_file({f"{P}.gate_up_proj": gate_up(False, False), f"{P}.down_proj": DOWN}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    assert with_experts_apart(source, {f"{P}.gate_up_proj", f"{P}.down_proj"}, {}) is source
    assert with_experts_apart(source, {"unrelated"}, {}) is source

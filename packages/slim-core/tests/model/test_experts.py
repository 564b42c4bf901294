"""Which linears are taken for those of experts."""

from __future__ import annotations

from torch import nn

from slim_core.model.experts import ExpertLayer, expert_layers
from slim_core.model.units import LinearInfo


def tree(names: list[str]) -> nn.Module:
    """A model with a linear at each of these places."""
    root = nn.Module()
    for name in names:
        parent = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(2, 2, device="meta"))
    return root


def found(names: list[str], apart: tuple[str, ...] = ()) -> list[ExpertLayer]:
    model = tree(names)
    for name in apart:
        model.get_submodule(name).__dict__["apart"] = object()
    return expert_layers(model, [LinearInfo(name, name, 2, 2, False, True) for name in names])


def test_numbered_children_of_experts() -> None:
    names = [f"layers.3.mlp.experts.{i}.{leaf}" for i in (10, 2, 0) for leaf in ("up_proj", "down_proj")]
    others = ["layers.3.mlp.shared_expert.up_proj", "layers.3.mlp.shared_experts.0.up_proj", "layers.3.mlps.1.up_proj"]
    (layer,) = found([*names, *others, "layers.3.self_attn.q_proj", "layers.3.moe.expert_gate", "lm_head"])
    assert layer.name == "layers.3.mlp.experts"
    assert list(layer.experts) == [0, 2, 10]
    assert layer.experts[2] == {place: f"layers.3.mlp.experts.2.{place}" for place in ("up_proj", "down_proj")}
    assert layer.siblings("up_proj") == [f"layers.3.mlp.experts.{i}.up_proj" for i in (0, 2, 10)]
    assert layer.siblings("w1") == []


def test_nested_places_and_several_layers() -> None:
    layers = found(["layers.0.a.experts.0.mlp.up", "layers.0.b.moe_experts.0.up", "layers.0.b.moe_experts.1.up"])
    assert [(layer.name, list(layer.experts)) for layer in layers] == [
        ("layers.0.a.experts", [0]),
        ("layers.0.b.moe_experts", [0, 1]),
    ]
    assert layers[0].experts == {0: {"mlp.up": "layers.0.a.experts.0.mlp.up"}}


def test_what_was_taken_apart_holds_experts_whatever_it_is_called() -> None:
    names = ["layers.0.mlp.input_linear.0", "layers.0.mlp.input_linear.1"]
    assert found(names) == []
    (layer,) = found(names, apart=("layers.0.mlp.input_linear",))
    assert layer.experts == {0: {"": names[0]}, 1: {"": names[1]}}
    assert layer.siblings("") == names


def test_a_block_of_its_own_is_no_expert() -> None:
    assert found([f"experts_model.layers.{i}.up" for i in range(3)]) == []

"""What engines can load."""

from __future__ import annotations

import pytest

from slim_core.savers.loaders import engines, is_loadable, layer_class, mixed_fusions, unloadable


def test_layer_classes() -> None:
    assert layer_class("model.layers.0.mlp.experts.12.up_proj") == "experts"
    assert layer_class("model.layers.0.mlp.shared_experts.up_proj") == "linear"
    assert layer_class("model.layers.0.mlp.up_proj") == "linear"


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC", "W8A16", "FLOAT"])
def test_dense_layers_of_every_type_written_here_load(kind: str) -> None:
    assert "vllm-ascend" in engines()
    assert is_loadable("vllm-ascend", kind, "model.layers.0.mlp.up_proj")
    assert unloadable({"model.layers.0.mlp.up_proj": kind}) == []


def test_what_has_no_class_is_told_once_per_type() -> None:
    kinds = dict.fromkeys(("a.up_proj", "b.up_proj"), "W1A1") | {"a.down_proj": "W8A8"}
    (warning,) = unloadable(kinds)
    assert warning == "vllm-ascend has no class for W1A1 linear layers (2 linears, e.g. a.up_proj)"


def test_linears_that_are_fused_need_one_type() -> None:
    same = {f"l.{i}.attn.{leaf}_proj": "W8A8" for i in range(3) for leaf in "qkv"}
    assert mixed_fusions(same) == []
    (warning,) = mixed_fusions(same | {"l.1.attn.v_proj": "FLOAT", "l.2.attn.v_proj": "FLOAT"})
    assert "q_proj W8A8, k_proj W8A8, v_proj FLOAT" in warning
    assert "(2 times, e.g. l.1.attn)" in warning
    assert mixed_fusions({"l.0.mlp.gate_proj": "W8A8", "l.0.mlp.down_proj": "FLOAT"}) == []

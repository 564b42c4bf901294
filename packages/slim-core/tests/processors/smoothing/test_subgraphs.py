"""Which subgraphs a smoother takes, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.processors.smoothing import Smoother

Made = Any  # of conftest.py
Make = Callable[..., Made]
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
SHIFT = ITER | {"symmetric": False}
SMOOTH: dict[str, Any] = {"type": "smooth_quant"}
INPUT, POST, V, UP = "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"
EXPERTS = 3


def chosen(made: Made, **config: Any) -> set[str]:
    """The sources that a smoother takes of the first block, without the block's name."""
    plan = made.planned({"type": "iter_smooth", **config})
    (smoother,) = plan.processors
    assert isinstance(smoother, Smoother)
    graphs = smoother._graphs["layers.0"]  # pyright: ignore[reportPrivateUsage]
    return {graph.source.removeprefix("layers.0.") for graph in graphs}


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
        (smoother,) = made.planned(SMOOTH).processors
        assert {name.rpartition(".")[2] for name in smoother.rescales()} == {
            *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        }

    def test_patterns_that_match_nothing_are_reported(self, made: Made) -> None:
        plan = made.planned(ITER | {"include": ["*layernorm", "*.q_proj"], "exclude": ["nothing"]})
        told = [text for text in plan.warnings if "matches no source" in text]
        assert [text.split(": pattern ")[0] for text in told] == [
            *("spec.process[0].include", "spec.process[0].exclude")
        ]
        assert "'*.q_proj'" in told[0]
        assert "sources are norms, v_proj and up_proj, e.g. layers.0." in told[0]
        assert not [text for text in made.planned(ITER).warnings if "matches no source" in text]

    def test_to_smooth_nothing_is_reported(self, made: Made) -> None:
        assert "spec.process[0] smooths nothing" in made.planned(ITER | {"exclude": ["*"]}).warnings
        assert "spec.process[0] smooths nothing" in made.planned(ITER | {"enable_subgraph_type": []}).warnings

    def test_the_plan_counts_what_is_smoothed(self, made: Made) -> None:
        def told(process: dict[str, Any]) -> str:
            (smoother,) = made.planned(process).processors
            return smoother.summary()

        assert told(ITER) == "iter_smooth: 4 norm-linear, 2 ov, 2 up-down smoothed"
        only = {"include": [f"layers.0.{INPUT}", f"*{UP}"]}
        assert told(SHIFT | only) == "iter_smooth: 1 norm-linear, 2 up-down smoothed, 1 norms shifted"
        assert told(SMOOTH) == "smooth_quant: 4 norm-linear smoothed"
        assert told(ITER | {"exclude": ["*"]}) == ""

    def test_patterns_are_about_what_the_processor_smooths(self, made: Made) -> None:
        told = made.planned(SMOOTH | {"exclude": ["*self_attn*"]}).warnings
        assert [text for text in told if "exclude: pattern '*self_attn*' matches no source" in text]
        told = made.planned(ITER | {"include": ["*layernorm"], "enable_subgraph_type": ["ov"]}).warnings
        assert [text for text in told if f"e.g. layers.0.{V}, layers.1.{V}" in text]
        assert "spec.process[0] smooths nothing" in told

    def test_experts_that_the_probe_did_not_reach_are_like_those_that_it_did(self, make: Make, tmp_path: Path) -> None:
        made = make(tmp_path / "model", moe=True)
        reached = replace(made, inputs=made.inputs[:1]).inputs_of(made.state)
        experts = {name.split(".")[4] for name in reached if name.startswith("layers.0.mlp.experts")}
        assert len(experts) == 1
        assert chosen(made) == {INPUT, POST, V, *(f"mlp.experts.{number}.up_proj" for number in range(EXPERTS))}
        (smoother,) = made.planned(ITER | {"include": [f"*{POST}"]}).processors
        assert {name.removeprefix("layers.0.mlp.") for name in smoother.rescales() if "layers.0" in name} == {
            "router",
            *(f"experts.{number}.{name}_proj" for number in range(EXPERTS) for name in ("gate", "up")),
        }

    def test_what_others_have_is_left_as_it_was(self, made: Made, tmp_path: Path) -> None:
        written = made.smoothed(tmp_path / "out", ITER | {"include": ["layers.0.input_layernorm"]})
        changed = {name for name, value in made.state.items() if not torch.equal(value, written[name])}
        assert changed == {
            "layers.0.input_layernorm.weight",
            *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkv"),
        }

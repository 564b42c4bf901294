"""Searched scales of experts: few tokens, none, and those that are looked at together."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from slim_core.model.subgraphs import Subgraph
from slim_core.smoothing.search import awq_scales, exponent_scale

Bench = Any  # of conftest.py
HIDDEN, WIDE, EXPERTS = 16, 24, 12
UNIT = "layers.0"

COLUMNS = torch.arange(HIDDEN)


class TestExperts:
    def test_without_tokens(
        self, bench: Bench, every_smoother: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """They keep their weights; one line says which."""
        bench.see(bench.inputs(width=WIDE), "experts.4.down_proj")
        bench.see(torch.zeros(3, WIDE), "experts.5.down_proj")
        bench.see(torch.zeros(0, WIDE), "experts.6.down_proj")
        with caplog.at_level(logging.WARNING):
            after = bench.smoothed(*bench.ups, **every_smoother)
        assert after.weights is not None
        changed = {name for name, _ in after.weights.edited()}
        assert changed == {*bench.at("experts.4.up_proj.weight", "experts.4.down_proj.weight")}
        unseen = ", ".join(bench.ups[i].source for i in range(EXPERTS) if i not in (4, 5))
        assert sorted(record.getMessage() for record in caplog.records) == [
            f"{UNIT}: these are not smoothed, because no token reached their readers: {unseen}",
            f"{UNIT}: these are not smoothed, because only zeros reached their readers: {bench.ups[5].source}",
        ]
        assert [note.source for note in bench.notes if note.skipped is None] == [bench.ups[4].source]
        assert len([note for note in bench.notes if note.skipped is not None]) == EXPERTS - 1

    def test_few_tokens_draw_the_scale_to_the_middle(self, bench: Bench) -> None:
        x = bench.inputs(16, WIDE)
        bench.see(x, "experts.0.down_proj")
        before, after = bench.work(), bench.smoothed(bench.ups[0], **bench.flex | {"alpha": 1, "beta": 0})
        a = x.abs().amax(0)
        wanted = a**0.25 * a.log().mean().exp() ** 0.75
        assert torch.allclose(bench.scale_of(before, after, "experts.0.down_proj"), wanted, rtol=1e-4)

    @pytest.mark.parametrize("tokens", [64, 16])
    def test_that_is_for_experts_with_many_tokens_and_all_else_not_so(self, bench: Bench, tokens: int) -> None:
        name, graph, width = ("experts.0.down_proj", bench.ups[0], WIDE) if tokens == 64 else ("o", bench.ov, HIDDEN)
        x = bench.inputs(tokens, width)
        bench.see(x, name)
        before, after = bench.work(), bench.smoothed(graph, **bench.flex | {"alpha": 1, "beta": 0})
        wanted = graph.spread(graph.gather(x.abs().amax(0), "amax"))
        assert torch.allclose(bench.scale_of(before, after, name), wanted, rtol=1e-4)

    def test_behind_a_norm_they_are_pooled(self, bench: Bench, every_smoother: dict[str, Any]) -> None:
        """No reader has seen all tokens, but together they have; the router is scaled along."""
        parts = [bench.inputs(40, seed=seed) for seed in range(EXPERTS)]
        parts[7][3, 9] = 500.0
        for i, part in enumerate(parts[:-1]):
            bench.see(part, f"experts.{i}.gate_proj", f"experts.{i}.up_proj")
        before, after = bench.work(), bench.smoothed(bench.moe, **every_smoother)
        (note,) = bench.notes
        assert note.tokens == 40 * (EXPERTS - 1)
        pooled = torch.cat(parts[:-1]).abs()
        scale = bench.scale_of(before, after, "experts.11.up_proj")
        assert torch.allclose(bench.scale_of(before, after, "router"), scale, rtol=1e-3)
        if every_smoother is bench.flex:
            maxima = torch.cat(
                [
                    bench.weight(before, f"experts.{i}.{leaf}")
                    for i in range(EXPERTS)
                    for leaf in ("gate_proj", "up_proj")
                ]
            )
            assert note.alpha is not None
            assert note.beta is not None
            wanted = exponent_scale(pooled.amax(0), maxima.abs().amax(0), note.alpha, note.beta)
        elif every_smoother is bench.ssz:
            assert note.alpha is not None
            wanted = pooled.mean(0) ** note.alpha
        else:
            assert note.ratio is not None
            wanted = awq_scales(pooled.mean(0), note.ratio)
        assert torch.allclose(scale, wanted, rtol=1e-3)

    def test_whoever_sees_all_tokens_speaks_for_the_experts(self, bench: Bench) -> None:
        graph = Subgraph("norm-linear", *bench.at("mlp_norm"), bench.at("q", "experts.0.gate_proj"), COLUMNS)
        bench.see(bench.inputs(100), "q")
        bench.see(bench.inputs(150, seed=1) * 50, "experts.0.gate_proj")  # more often, yet only a part
        bench.smoothed(graph, **bench.flex)
        assert bench.notes[0].tokens == 100

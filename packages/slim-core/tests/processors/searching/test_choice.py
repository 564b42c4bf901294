"""What the smoothers that search choose for a block, against the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.model.subgraphs import Subgraph
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.smoothing.scales import SmoothingNote
from slim_core.smoothing.search import GRID, awq_scales, exponent_scale

Bench = Any  # of conftest.py
HIDDEN, DIM = 16, 4
UNIT = "layers.0"

COLUMNS = torch.arange(HIDDEN)


class TestChoice:
    def test_flex_takes_the_best_of_its_lines(self, bench: Bench) -> None:
        bench.see(x := bench.inputs(), "q", "k", "v")
        before, after = bench.work(), bench.smoothed(bench.norm, **bench.flex)
        (note,) = bench.notes
        stacked = torch.cat([bench.weight(before, name) for name in ("q", "k", "v")]).double()
        a, b = x.abs().amax(0), stacked.abs().amax(0).float()

        def rounded(rows: Tensor) -> Tensor:
            step = rows.abs().amax(1, keepdim=True) / 127
            return (rows / step).round() * step

        def error(alpha: float, beta: float) -> float:
            scale, exact = exponent_scale(a, b, alpha, beta).double(), x.double() @ stacked.T
            found = rounded(x.double() / scale) @ rounded(stacked * scale).T
            return float((found - exact).norm() / exact.norm())

        assert note.alpha is not None
        points = [(0.0, 0.0), *((p, 1 - p) for p in GRID), *((note.alpha, p) for p in GRID)]
        assert note.error_before == pytest.approx(error(0, 0), rel=1e-3)
        assert note.error_after == pytest.approx(min(error(*point) for point in points), rel=1e-3)
        assert note.error_after < 0.3 * note.error_before
        scale = exponent_scale(a, b, note.alpha, note.beta or 0.0)
        for name in ("q", "k", "v"):
            assert torch.allclose(bench.scale_of(before, after, name), scale, rtol=1e-4)
        assert torch.allclose(bench.weight(after, "norm") * scale, bench.weight(before, "norm"), rtol=1e-5)
        assert (note.type, note.source, note.targets, note.position) == (
            "norm-linear",
            bench.norm.source,
            bench.norm.targets,
            "process[0]",
        )
        assert (note.scale_min, note.scale_max) == pytest.approx((float(scale.min()), float(scale.max())), rel=1e-4)
        assert note.act_spread_before == pytest.approx(float(a.double().log2().std(correction=0)), rel=1e-4)
        assert note.act_spread_after == pytest.approx(float((a / scale).double().log2().std(correction=0)), rel=1e-3)
        assert note.weight_spread_after == pytest.approx(float((b * scale).double().log2().std(correction=0)), rel=1e-3)

    def test_flex_as_told(self, bench: Bench) -> None:
        bench.see(x := bench.inputs(), "o")
        before, after = bench.work(), bench.smoothed(bench.ov, **bench.flex | {"alpha": 0.75, "beta": 0.1})
        a, b = (
            bench.ov.gather(values, "amax") for values in (x.abs().amax(0), bench.weight(before, "o").abs().amax(0))
        )
        scale = exponent_scale(a, b, 0.75, 0.1)
        assert torch.allclose(bench.scale_of(before, after, "o"), bench.ov.spread(scale), rtol=1e-4)
        assert torch.allclose(bench.weight(after, "v") * scale[:, None], bench.weight(before, "v"), rtol=1e-4)
        (note,) = bench.notes
        assert (note.alpha, note.beta, note.error_before, note.error_after) == (0.75, 0.1, None, None)

    def test_scales_are_judged_as_they_are_shared(self, bench: Bench) -> None:
        """With scales of their own the heads of a group would do better than they can together."""
        x = bench.inputs(width=4 * DIM)
        x[:, :DIM] *= 10
        bench.see(x, "o")
        before = bench.work()
        bench.smoothed(bench.ov, **bench.flex)
        (note,) = bench.notes
        w = bench.weight(before, "o")
        a, b = (bench.ov.gather(values, "amax") for values in (x.abs().amax(0), w.abs().amax(0)))
        assert note.alpha is not None
        assert note.beta is not None
        scale = bench.ov.spread(exponent_scale(a, b, note.alpha, note.beta))
        codes = [
            (rows / (step := rows.abs().amax(1, keepdim=True) / 127)).round() * step for rows in (x / scale, w * scale)
        ]
        exact = x @ w.T
        error = float((codes[0] @ codes[1].T - exact).norm() / exact.norm())
        assert note.error_after == pytest.approx(error, rel=1e-3)

    @pytest.mark.parametrize("alpha", [None, 0.35])
    def test_the_mean_input_makes_the_scale(self, bench: Bench, alpha: float | None) -> None:
        bench.see(x := bench.inputs(), "o")
        given = {} if alpha is None else {"alpha": alpha}
        before, after = bench.work(), bench.smoothed(bench.ov, **bench.ssz | given)
        (note,) = bench.notes
        assert note.alpha is not None
        mean = bench.ov.gather(x.abs().mean(0), "amax")
        assert torch.allclose(bench.scale_of(before, after, "o"), bench.ov.spread(mean**note.alpha), rtol=1e-4)
        assert note.beta == 0
        if alpha is None:
            assert note.error_after is not None
            assert note.error_before is not None
            assert note.error_after <= note.error_before
        else:
            assert (note.alpha, note.error_after) == (alpha, None)

    def test_all_targets_take_part(self, bench: Bench) -> None:
        """Four of them, the last one the only one that has anything to lose."""
        targets = bench.at("q", "k", "experts.0.gate_proj", "experts.0.up_proj")
        graph = Subgraph("norm-linear", *bench.at("norm"), targets, COLUMNS)
        bench.see(bench.inputs(), "q", "k", "experts.0.gate_proj", "experts.0.up_proj")
        bench.smoothed(graph, **bench.ssz)
        whole = bench.notes.pop()
        bench.smoothed(Subgraph("norm-linear", *bench.at("norm"), targets[:2], COLUMNS), **bench.ssz)
        assert whole.error_before != pytest.approx(bench.notes.pop().error_before, rel=1e-3)

    def test_awq(self, bench: Bench) -> None:
        bench.see(x := bench.inputs(), "o")
        before, after = bench.work(), bench.smoothed(bench.ov, **bench.awq | {"n_grid": 8})
        (note,) = bench.notes
        assert note.ratio is not None
        assert note.ratio * 8 == round(note.ratio * 8)
        scale = awq_scales(bench.ov.gather(x.abs().mean(0), "mean"), note.ratio)
        assert torch.allclose(bench.scale_of(before, after, "o"), bench.ov.spread(scale), rtol=1e-4)
        assert torch.allclose(bench.weight(after, "v") * scale[:, None], bench.weight(before, "v"), rtol=1e-4)
        assert (note.alpha, note.beta) == (None, None)
        assert note.error_after is not None
        assert note.error_before is not None
        assert note.error_after < note.error_before

    def test_awq_with_one_point_changes_nothing(self, bench: Bench) -> None:
        bench.see(bench.inputs(), "q", "k", "v")
        before, after = bench.work(), bench.smoothed(bench.norm, **bench.awq | {"n_grid": 1})
        for name in ("norm", "q", "k", "v"):
            assert torch.equal(bench.weight(after, name), bench.weight(before, name))

    def test_what_others_know_of_the_inputs_follows(self, bench: Bench, every_smoother: dict[str, Any]) -> None:
        bench.see(x := bench.inputs(), "q", "k", "v")
        before, after = bench.work(), bench.smoothed(bench.norm, **every_smoother)
        scale = bench.scale_of(before, after, "q")
        largest = after.statistics[f"{UNIT}.k"].channels.absmax()
        assert largest is not None
        assert torch.allclose(largest, x.abs().amax(0) / scale, rtol=1e-3)
        assert after.statistics[f"{UNIT}.q"] is after.statistics[f"{UNIT}.v"]

    def test_after_a_shift_the_mean_is_that_of_the_tokens_kept(
        self, bench: Bench, every_smoother: dict[str, Any]
    ) -> None:
        bench.see(bench.inputs(), "o")
        work = bench.work()
        work.rescale(bench.at("o"), torch.ones(HIDDEN), torch.full((HIDDEN,), 0.5))
        bench.smoother(bench.ov, **every_smoother).process(work)
        other = type(bench)(bench.model)
        other.see(bench.inputs() - 0.5, "o")
        other.smoothed(bench.ov, **every_smoother)
        assert bench.notes[0].error_after == pytest.approx(other.notes[0].error_after, rel=1e-2)
        assert bench.notes[0].scale_max == pytest.approx(other.notes[0].scale_max, rel=1e-4)


def test_the_choice_does_not_depend_on_the_order_of_samples(bench: Bench) -> None:
    notes: list[SmoothingNote] = []
    x = bench.inputs(900)
    order: list[Callable[[Tensor], Tensor]] = [lambda y: y, lambda y: y.flip(0)]
    for arranged in order:
        one = type(bench)(bench.model)
        seen = InputStatistics(frozenset({Need.CHANNELS, Need.TOKENS}))
        for part in arranged(x).split(64):
            seen.update(part)
        one.statistics = dict.fromkeys(bench.at("q", "k", "v"), seen)
        one.smoothed(bench.norm, **bench.flex)
        notes += one.notes
    assert notes[0] == notes[1]

"""What the smoothers that search do with bad numbers, failures in the middle, and nothing to smooth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.quantization.statistics import InputStatistics, Need

Bench = Any  # of conftest.py

UNIT = "layers.0"


class Struck(Exception):
    pass


class TestBadInput:
    def test_activations_that_are_not_finite(self, bench: Bench, every_smoother: dict[str, Any]) -> None:
        bench.see(bench.inputs(), "q", "k", "v")
        channels = bench.statistics[f"{UNIT}.q"].channels
        assert channels.maximum is not None
        assert channels.magnitude is not None
        channels.maximum[2], channels.magnitude[2] = math.inf, math.nan
        with pytest.raises(InvalidModelError, match=r"layers\.0\.q: its activations hold NaN or infinity"):
            bench.smoothed(bench.norm, **every_smoother)

    def test_while_they_are_observed(self) -> None:
        seen = InputStatistics(frozenset({Need.TOKENS}))
        with pytest.raises(InvalidModelError, match="its activations hold NaN or infinity"):
            seen.update(torch.tensor([[1.0, math.nan]]))

    def test_a_failure_in_the_middle_leaves_the_subgraph_as_it_was(
        self, bench: Bench, every_smoother: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.see(bench.inputs(), "o")
        bench.see(bench.inputs(seed=1), "q", "k", "v")
        work = bench.work()
        assert work.weights is not None
        apply, calls = work.weights.apply, 0

        def struck(edits: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                apply(edits)
                return

            def half() -> Any:
                listed = list(edits)
                yield from listed[:2]
                raise Struck

            apply(half())

        monkeypatch.setattr(work.weights, "apply", struck)
        with pytest.raises(Struck):
            bench.smoother(bench.ov, bench.norm, **every_smoother).process(work)
        before = bench.work()
        assert not torch.equal(bench.weight(work, "o"), bench.weight(before, "o"))
        for name in ("norm", "q", "k"):
            assert torch.equal(bench.weight(work, name), bench.weight(before, name))
        assert work.statistics[f"{UNIT}.q"] is bench.statistics[f"{UNIT}.q"]

    def test_nothing_to_smooth(self, bench: Bench, every_smoother: dict[str, Any]) -> None:
        with pytest.raises(UnsupportedError, match=r"spec\.process\[0\]: no subgraph of this model can be smoothed"):
            bench.smoother(**every_smoother)

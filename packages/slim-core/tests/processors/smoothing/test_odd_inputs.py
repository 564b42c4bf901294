"""Odd samples, dead channels, experts without tokens, and failures in the middle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.model import weights as weights_module
from slim_core.model.structure import discover
from slim_core.model.weights import UnitWeights
from slim_core.processors.base import UnitWork, create_processor
from slim_core.processors.iter_smooth import IterSmoothConfig
from slim_core.quantization.statistics import InputObserver, InputStatistics, Need

Made = Any  # of conftest.py
Make = Callable[..., Made]
State = dict[str, Tensor]
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
SHIFT = ITER | {"symmetric": False}
INPUT = "input_layernorm"


class TestOddInputs:
    def test_the_order_of_samples_does_not_matter(self, made: Made, tmp_path: Path) -> None:
        for process in (ITER, SHIFT):
            plans = [made.planned(process) for _ in range(2)]
            folder = tmp_path / str(process.get("symmetric"))
            one = made.carried_out(plans[0], folder / "one", made.inputs)[0]
            other = made.carried_out(plans[1], folder / "other", made.inputs[::-1])[0]
            assert all(torch.equal(one[name], other[name]) for name in one)

    def test_samples_may_share_a_forward(self, made: Made, tmp_path: Path) -> None:
        pairs = [{"hidden": torch.cat([made.inputs[i]["hidden"], made.inputs[i + 1]["hidden"]])} for i in (0, 2)]
        one = made.smoothed(tmp_path / "one", ITER)
        other = made.carried_out(made.planned(ITER), tmp_path / "other", pairs)[0]
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)

    def test_one_token(self, make: Make, tmp_path: Path) -> None:
        made = make(tmp_path / "model")
        made.inputs = [{"hidden": made.inputs[0]["hidden"][:, :1]}]
        for process in (ITER, SHIFT):
            written = made.smoothed(tmp_path / f"out{process.get('symmetric')}", process)
            assert made.error_of(written) <= 1e-5  # not so if it is no number

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("process", [ITER, SHIFT], ids=str)
    def test_dead_channels_are_left_alone(
        self, make: Make, tmp_path: Path, dtype: torch.dtype, process: dict[str, Any]
    ) -> None:
        def kill(state: State) -> None:
            state[f"layers.0.{INPUT}.weight"][5] = 0  # a channel that is always zero
            state["layers.0.mlp.up_proj.weight"][7] = 0
            for name in "qkv":  # a channel that nobody reads
                state[f"layers.1.self_attn.{name}_proj.weight"][:, 2] = 0
            state["layers.1.mlp.down_proj.weight"][:, 4] = 0

        made = make(tmp_path / "model", dtype, kill)
        written = made.smoothed(tmp_path / "out", process)
        assert all(bool(torch.isfinite(value).all()) for value in written.values())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert made.error_of(written) <= tolerance
        assert float(written[f"layers.0.{INPUT}.weight"][5]) == 0
        q = "layers.0.self_attn.q_proj.weight"
        assert torch.equal(written[q][:, 5], made.state[q][:, 5])
        assert float(written[f"layers.1.{INPUT}.weight"][2]) == float(made.state[f"layers.1.{INPUT}.weight"][2])

    def test_a_norm_that_gives_nothing_but_zeros_is_given_no_bias(self, make: Make, tmp_path: Path) -> None:
        def kill(state: State) -> None:
            state[f"layers.1.{INPUT}.weight"].zero_()

        made = make(tmp_path / "model", change=kill)
        written, result = made.carried_out(made.planned(SHIFT), tmp_path / "out")
        (left,) = [note for note in result.smoothed if note.skipped]
        assert (left.source, left.skipped) == (f"layers.1.{INPUT}", "only zeros reached their readers")
        assert {name for name in written if name not in made.state and name.startswith("layers.1.self_attn")} == set()
        assert f"layers.1.{INPUT}.bias" not in written
        assert bool(written[f"layers.0.{INPUT}.bias"].any())
        for name in (f"{name}_proj.{part}" for name in "qk" for part in ("weight", "bias")):
            assert torch.equal(written[f"layers.1.self_attn.{name}"], made.state[f"layers.1.self_attn.{name}"])
        assert made.error_of(written) <= 1e-5

    def test_where_no_sample_has_anything_but_zeros_biases_are_zero(self, make: Make, tmp_path: Path) -> None:
        """Which tensors are written is planned before samples are run; the weights of the norm do not tell."""
        made = make(tmp_path / "model")
        plan = made.planned(SHIFT)
        silence = [{"hidden": torch.zeros_like(one["hidden"])} for one in made.inputs]
        written, result = made.carried_out(plan, tmp_path / "out", silence)
        assert f"layers.0.{INPUT}" in {note.source for note in result.smoothed if note.skipped}
        assert not written[f"layers.0.{INPUT}.bias"].any()
        assert made.error_of(written) <= 1e-5

    def test_an_expert_without_tokens_keeps_its_weights(
        self, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        written: dict[bool, State] = {}
        only = ITER | {"enable_subgraph_type": ["up-down"]}
        caplog.set_level(logging.WARNING)
        for calls_idle in (False, True):
            caplog.clear()
            made = make(tmp_path / f"model{calls_idle}", moe=True, calls_idle=calls_idle)
            plan = made.planned(only)
            written[calls_idle], result = made.carried_out(plan, tmp_path / f"out{calls_idle}", made.inputs)
            for i in range(2):
                for name in ("gate", "up", "down"):
                    whole = f"layers.{i}.mlp.experts.2.{name}_proj.weight"
                    assert torch.equal(written[calls_idle][whole], made.state[whole])
            skipped = [note.source for note in result.smoothed if note.skipped]
            assert skipped == [f"layers.{i}.mlp.experts.2.up_proj" for i in range(2)]
            assert sum("layers.1.mlp.experts.2.up_proj" in one.getMessage() for one in caplog.records) == 1
        assert all(torch.equal(written[False][name], written[True][name]) for name in written[False])

    def test_activations_that_are_not_finite_are_refused(self, make: Make, tmp_path: Path) -> None:
        made = make(tmp_path / "model")
        plan = made.planned(ITER)
        made.inputs[2]["hidden"][0, 3, 3] = float("nan")
        with pytest.raises(InvalidModelError, match="NaN or infinity"):
            made.carried_out(plan, tmp_path / "out", made.inputs)
        assert not (tmp_path / "out").exists()


class Struck(Exception):
    """The failure that is injected."""


def strike_at(monkeypatch: pytest.MonkeyPatch, edit: int, before: Callable[[], None]) -> None:
    """Let one of the edits fail; ``before`` is called whenever a subgraph is about to be changed."""
    real, plain = weights_module._edited, UnitWeights.apply  # pyright: ignore[reportPrivateUsage]
    count = iter(range(10**6))

    def edited(view: Any, change: Any) -> Any:
        if next(count) == edit:
            raise Struck
        return real(view, change)

    def apply(self: UnitWeights, edits: Any) -> None:
        before()
        plain(self, edits)

    monkeypatch.setattr(weights_module, "_edited", edited)
    monkeypatch.setattr(UnitWeights, "apply", apply)


@pytest.mark.parametrize(("process", "edits"), [(ITER, 12), (SHIFT, 19)], ids=["symmetric", "shifted"])
def test_a_failure_in_the_middle_of_a_subgraph_leaves_it_as_it_was(
    made: Made, process: dict[str, Any], edits: int
) -> None:
    """Wherever it strikes: weights, module and statistics are those from before the subgraph, bit by bit."""
    smoother = create_processor(IterSmoothConfig(**process), "process[0]")
    model = made.open()
    smoother.adopt(discover(model, made.inputs[0]), model)
    model = model.with_additions(smoother.additions())
    unit = model.units[0]
    block = model.module.get_submodule("layers.0")
    for strike in range(edits + 1):
        model.load(unit.parameters, torch.device("cpu"))
        observer = InputObserver()
        for info in unit.linears:
            observer.watch(info.name, model.module.get_submodule(info.name), {Need.CHANNELS})
        with torch.no_grad():
            for one in made.inputs:
                block(one["hidden"])
        observer.stop()
        weights = UnitWeights(model, unit, live=True)
        work = UnitWork(unit.name, {}, observer.statistics, None, torch.device("cpu"), lambda *_: None, weights=weights)
        kept: list[tuple[State, dict[str, InputStatistics]]] = []

        def now(work: UnitWork = work, weights: UnitWeights = weights) -> tuple[State, dict[str, InputStatistics]]:
            live = {name: value.clone() for name, value in block.named_parameters()}
            return live | {f"view of {name}": view.load() for name, view in weights.edited()}, dict(work.statistics)

        with pytest.MonkeyPatch.context() as patch:
            strike_at(patch, strike, lambda kept=kept, now=now: kept.append(now()))
            if strike == edits:
                smoother.process(work)  # there are no more of them
            else:
                with pytest.raises(Struck):
                    smoother.process(work)
                (before, known), (after, still_known) = kept[-1], now()
                assert before.keys() == after.keys()
                assert all(torch.equal(before[name], after[name]) for name in before)
                assert known == still_known
        model.unload([*unit.parameters, *unit.added])
        assert all(value.is_meta for value in block.parameters())

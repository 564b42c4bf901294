"""``--probe``: the plan says how long the run will take; nothing else is different for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.checkpoint.writer import ShardedWriter
from slim_core.errors import SlimError
from slim_core.phases import Phase
from slim_core.processors.linear_quant import LinearQuant
from slim_core.progress import SilentProgress
from slim_core.recipe import Recipe, recipe_from_dict
from slim_core.runners import probe as probing
from slim_core.runners.plan import Plan
from slim_core.runners.plan_text import render_summary
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_llm.quantize import TextSamples
from slim_llm.service import LlmService

ModelFolder = Callable[..., Path]
Content = Callable[..., dict[str, bytes]]
Asked = Callable[..., tuple[QuantRequest, Recipe]]
INT8: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True}
STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True}

LEARNED: dict[str, Any] = {"act": TOKEN, "weight": INT8}


def linear(act: dict[str, Any], weight: dict[str, Any] = INT8) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}}


CASES: dict[str, dict[str, Any]] = {
    "dynamic": {"process": [linear(TOKEN)]},
    "static": {"process": [linear(STATIC)]},
    "smoothed": {"process": [{"type": "flex_smooth_quant"}, linear(STATIC)], "propagate": "quantized"},
    "gptq": {"process": [{"type": "quarot"}, linear(TOKEN, INT8 | {"method": "gptq"})]},
    "trained": {"process": [{"type": "autoround_quant", "iters": 2, "strategies": [{"qconfig": LEARNED}]}]},
    "ahead": {
        "prior": [{"process": [{"type": "adapt_rotation", "stage": 1, "steps": 6}]}],
        "process": [{"type": "adapt_rotation", "stage": 2}, linear(TOKEN)],
    },
}


@pytest.fixture(autouse=True)
def _quick(no_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_WRITTEN", 1 << 20)


@pytest.fixture
def asked(dataset: Path) -> Asked:
    def ask(model: Path, out: Path, spec: dict[str, Any], **options: Any) -> tuple[QuantRequest, Recipe]:
        spec = {"save": [{"type": "ascendv1_saver"}], "dataset": {"path": str(dataset)}, **spec}
        request = QuantRequest(model_path=model, save_path=out, model_type="t", device="cpu", force=True, **options)
        return request, recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec})

    return ask


def carried_out(request: QuantRequest, recipe: Recipe) -> tuple[RunResult, Plan]:
    plans: list[Plan] = []
    return LlmService().quantize(request, recipe, SilentProgress(), plans.append), plans[0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe_16"])
@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same(
    case: str, family: str, asked: Asked, model_folder: ModelFolder, content: Content, tmp_path: Path
) -> None:
    model = model_folder(family)
    before = {path: path.read_bytes() for path in model.iterdir()}
    carried_out(*asked(model, tmp_path / "plain", CASES[case]))
    drawn = torch.get_rng_state()
    _, plan = carried_out(*asked(model, tmp_path / "out", CASES[case], probe=True))
    assert plan.time is not None
    assert not plan.time.unknown
    assert torch.equal(torch.get_rng_state(), drawn)
    assert content(tmp_path / "out") == content(tmp_path / "plain")
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    assert "  time       about " in render_summary(plan)
    assert plan.time.rough == ("training" if case == "trained" else "")
    expected = {"dynamic": {Phase.QUANTIZING}, "ahead": {Phase.QUANTIZING, Phase.STAGES}, "trained": {"training"}}
    spent = {phase for phase, seconds in plan.time.parts.items() if seconds > 0}
    assert spent >= expected.get(case, {Phase.FORWARDS, Phase.QUANTIZING})
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["predicted_seconds"] == plan.time.seconds
    assert report["predicted_phases"] == plan.time.parts
    assert "<td>time</td>" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_the_report_tells_where_the_time_went(asked: Asked, model_folder: ModelFolder, tmp_path: Path) -> None:
    began = time.perf_counter()
    carried_out(*asked(model_folder("llama"), tmp_path / "out", CASES["static"]))
    took = time.perf_counter() - began
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    (record,) = report["times"]
    assert 0 < sum(record["phases"].values()) < took
    assert sum(record["phases"].values()) == pytest.approx(report["seconds"], rel=0.5)
    assert {Phase.FORWARDS, Phase.QUANTIZING, Phase.LOADING} <= record["phases"].keys()
    assert 0 < record["writing"] < took
    assert 0 < record["reading"] < took
    for unit in report["units"]:
        assert sum(unit["phases"].values()) == pytest.approx(unit["seconds"], rel=0.2, abs=0.01)
    written = sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").glob("*.safetensors"))
    assert written <= report["peak_disk"] <= report["predicted_peak_disk"]
    assert report["predicted_seconds"] is None
    assert "<td>disk</td>" in (page := (tmp_path / "out" / "report.html").read_text("utf-8"))
    assert "<td>time</td>" not in page


def test_a_dry_run_leaves_nothing(asked: Asked, model_folder: ModelFolder, tmp_path: Path) -> None:
    plan = LlmService().plan(*asked(model_folder("llama"), tmp_path / "out", CASES["static"], dry_run=True, probe=True))
    assert "  time       about " in render_summary(plan)
    assert list(tmp_path.iterdir()) == []
    assert all(parameter.is_meta for parameter in plan.model.module.parameters())


def test_without_it_nothing_is_said(asked: Asked, model_folder: ModelFolder, tmp_path: Path) -> None:
    plan = LlmService().plan(*asked(model_folder("llama"), tmp_path / "out", CASES["static"]))
    assert "\n  time " not in render_summary(plan)


def test_a_refused_plan_is_not_probed(
    asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slim_core.job.probe", lambda *_args, **_kwargs: pytest.fail("it was"))
    given = asked(model_folder("llama"), tmp_path / "out", CASES["static"], probe=True, max_memory="host=1KiB")
    plan = LlmService().plan(*given)
    assert plan.refusal is not None
    assert plan.time is None


def test_ctrl_c(asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[Path]] = []

    def interrupted(_self: LinearQuant, work: Any) -> None:
        if work.name == "model.layers.0":
            held.append(list(tmp_path.iterdir()))
            raise KeyboardInterrupt

    monkeypatch.setattr(LinearQuant, "process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LlmService().plan(*asked(model_folder("llama"), tmp_path / "out", CASES["static"], probe=True))
    assert held == [[]]  # what the probe writes to has no name, so that not even a kill would leave it behind
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told_and_the_run_goes_on(
    asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> ShardedWriter:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(probing, "nameless_writer", full)
        _, plan = carried_out(*asked(model_folder("llama"), tmp_path / "out", CASES["static"], probe=True))
    assert "time       not predicted: the probe failed: [Errno 28] No space left on device" in render_summary(plan)


def test_samples_that_are_not_at_hand_are_not_made(
    asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextSamples, "at_hand", lambda *_: False)
    plan = LlmService().plan(*asked(model_folder("llama"), tmp_path / "out", CASES["static"], probe=True))
    assert "time       not predicted: its calibration inputs were not captured yet" in render_summary(plan)
    plan = LlmService().plan(*asked(model_folder("llama"), tmp_path / "out", CASES["dynamic"], probe=True))
    assert "time       about " in render_summary(plan)


@pytest.mark.parametrize("case", ["dynamic", "gptq"])
def test_when_its_time_is_over(
    case: str, asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did not get to is put in proportion to what it did."""
    monkeypatch.setattr(probing.probe, "__kwdefaults__", {"quantized": False, "patience": 0.0})
    plan = LlmService().plan(*asked(model_folder("qwen3_moe"), tmp_path / "out", CASES[case], probe=True))
    assert plan.time is not None
    assert 0.3 < plan.time.guessed < 1
    assert "which did not get to" in plan.time.summary()


def test_every_kind_of_unit_and_of_linears_is_tried_once(
    asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    finish = LinearQuant._quantized  # pyright: ignore[reportPrivateUsage]

    def noted(self: LinearQuant, linear: Any, work: Any) -> Any:
        made.append(linear.info.name)
        return finish(self, linear, work)

    monkeypatch.setattr(LinearQuant, "_quantized", noted)
    # The first and the last block have 16 experts, the one between them is dense.
    LlmService().plan(*asked(model_folder("qwen3_moe_16"), tmp_path / "out", CASES["static"], probe=True))
    assert not any(name.startswith("model.layers.2.") for name in made)
    assert sum(name.startswith("model.layers.1.") for name in made) == 7
    experts = {name.split(".")[5] for name in made if ".experts." in name}
    assert len(experts) == 4
    assert len(made) == len(set(made)) == 7 + 4 + 4 * 3


def test_a_problem_of_the_model_is_told(
    asked: Asked, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: LinearQuant, work: Any) -> None:
        raise SlimError("a weight is broken", where=work.name)

    monkeypatch.setattr(LinearQuant, "process", broken)
    plan = LlmService().plan(*asked(model_folder("llama"), tmp_path / "out", CASES["dynamic"], probe=True))
    assert "the probe failed: model.layers.0: a weight is broken" in render_summary(plan)

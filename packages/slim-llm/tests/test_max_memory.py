"""``--max_memory``: the same output with one expert at a time in memory, or a refusal that says what takes how much."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slim_core import commands
from slim_core.errors import UnsupportedError
from slim_core.model.expert_weights import ExpertsOnCall
from slim_core.model.experts import expert_layers
from slim_core.model.structure import discover
from slim_core.processors.linear_quant import LinearQuant
from slim_core.progress import SilentProgress
from slim_core.quantization.statistics import hessian_bytes
from slim_core.recipe import Recipe, recipe_from_dict
from slim_core.runners.plan import Plan
from slim_core.runners.plan_text import render_summary
from slim_core.runners.run import RunResult
from slim_core.runners.spill import Spill
from slim_core.service import QuantRequest
from slim_llm.models.loading import open_model
from slim_llm.service import LlmService
from slim_llm.vocabulary import example_input

ModelFolder = Callable[..., Path]
INT8: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True}

STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True}


def linear(act: dict[str, Any], weight: dict[str, Any] = INT8, **names: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, **names}


SMOOTHED = [{"type": "iter_smooth"}, linear(STATIC | {"method": "histogram"})]
WEIGHTED = [{"type": "iter_smooth"}, linear(TOKEN, INT8 | {"method": "ssz", "ext": {"weighted": True}})]
GPTQ = [linear(TOKEN, INT8 | {"method": "gptq"}, exclude=["*.1.*.down_proj"])]
STARVED = {"min_tokens_per_expert": 40, "route_starved_experts": True}
ROTATED = [{"type": "quarot"}, linear(STATIC)]
TRAINED = [{"type": "autoround_quant", "iters": 1, "strategies": [{"qconfig": {"act": TOKEN, "weight": INT8}}]}]


@pytest.fixture
def asked(dataset: Path) -> Callable[..., tuple[QuantRequest, Recipe]]:
    def ask(model: Path, out: Path, process: list[dict[str, Any]], **options: Any) -> tuple[QuantRequest, Recipe]:
        names = ("max_memory", "resume", "dry_run", "config_path")
        request = {key: options.pop(key) for key in names if key in options}
        data = {"path": str(dataset)} | options.pop("dataset", {})
        spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": data, **options}
        return (
            QuantRequest(model_path=model, save_path=out, model_type="t", device="cpu", force=True, **request),
            recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
        )

    return ask


def carried_out(request: QuantRequest, recipe: Recipe) -> tuple[RunResult, Plan]:
    plans: list[Plan] = []
    return LlmService().quantize(request, recipe, SilentProgress(), plans.append), plans[0]


def just_too_little(request: QuantRequest, recipe: Recipe) -> str:
    """A budget that whole blocks do not fit into."""
    return f"host={LlmService().plan(request, recipe).memory.peak - 1}"


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts of the model had weights, looked at whenever one is called."""
    counts: list[int] = []
    enter = ExpertsOnCall._enter  # pyright: ignore[reportPrivateUsage]

    def looked_at(self: Any, key: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        enter(self, key, module, args, kwargs)
        linears = [info for unit in self._model.units for info in unit.linears]
        present = 0
        for layer in expert_layers(self._model.module, linears):
            for members in layer.experts.values():
                modules = [self._model.module.get_submodule(name) for name in members.values()]
                present += any(not m.weight.is_meta for m in modules if isinstance(m, nn.Linear))
        counts.append(present)

    monkeypatch.setattr(ExpertsOnCall, "_enter", looked_at)
    return counts


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("family", "process", "options"),
    [
        ("qwen3_moe_16", [linear(STATIC)], {}),
        pytest.param("qwen3_moe_16", SMOOTHED, {}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe_16", WEIGHTED, {}, marks=pytest.mark.slow),
        ("qwen3_moe_16", GPTQ, {"dataset": STARVED, "propagate": "quantized"}),
        ("qwen3_moe_16", [*SMOOTHED[:1], *GPTQ], {"propagate": "quantized"}),
        pytest.param("qwen3_moe_16", ROTATED, {}, marks=pytest.mark.slow),
        ("gpt_oss_16", [linear(STATIC)], {}),  # biases; two linears interleaved in a transposed stack
        ("gpt_oss_16", [linear(STATIC, exclude=["*.2.*_proj"])], {"propagate": "quantized"}),
        pytest.param("llama4_16", SMOOTHED, {}, marks=pytest.mark.slow),  # all tokens are given to every expert
        ("mixtral", WEIGHTED, {}),
        ("deepseek_v3", SMOOTHED, {}),  # shared experts, which stay with their block
        ("jetmoe", [linear(STATIC)], {}),  # experts that are single linears, in attentions too
    ],
)
def test_writes_the_same_with_one_expert_at_a_time(
    content: Any,
    asked: Any,
    model_folder: ModelFolder,
    tmp_path: Path,
    resident: list[int],
    family: str,
    process: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    given = (model_folder(family), tmp_path / "whole", process)
    whole, plan = carried_out(*asked(*given, **options))
    assert not plan.memory.by_expert
    assert not resident
    budget = just_too_little(*asked(*given, **options))
    one, limited = carried_out(*asked(given[0], tmp_path / "one", process, max_memory=budget, **options))
    assert limited.memory.by_expert
    assert limited.memory.peak < plan.memory.peak
    assert max(resident) == 1  # none for what stands in for quantized linears
    assert content(tmp_path / "one") == content(tmp_path / "whole")
    assert one.block_forwards == whole.block_forwards
    assert [(r.name, r.tokens, r.low, r.high) for r in one.linears] == [
        (r.name, r.tokens, r.low, r.high) for r in whole.linears
    ]
    assert one.experts == whole.experts
    assert one.smoothed == whole.smoothed


@pytest.mark.usefixtures("no_plots")
def test_a_run_that_was_killed_is_resumed(
    killed: Any, content: Any, asked: Any, model_folder: ModelFolder, tmp_path: Path
) -> None:
    model = model_folder("qwen3_moe_16")
    carried_out(*asked(model, tmp_path / "whole", SMOOTHED))
    budget = just_too_little(*asked(model, tmp_path / "out", SMOOTHED))
    with killed(LinearQuant, "model.layers.2"):
        carried_out(*asked(model, tmp_path / "out", SMOOTHED, max_memory=budget))
    result, plan = carried_out(*asked(model, tmp_path / "out", SMOOTHED, max_memory=budget, resume=True))
    assert plan.memory.by_expert
    assert result.resumed_units >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_may_be_resumed_without_the_budget_it_began_with(
    asked: Any, model_folder: ModelFolder, tmp_path: Path
) -> None:
    """What is written does not depend on it, so it is no part of what identifies a run."""
    model = model_folder("qwen3_moe_16")
    budget = just_too_little(*asked(model, tmp_path / "out", SMOOTHED))
    kept: list[str] = []
    for options in ({}, {"max_memory": budget}):
        plan = LlmService().plan(*asked(model, tmp_path / "out", SMOOTHED, **options))
        # How much is free changes from one moment to the next.
        kept.append(re.sub(r"free cpu memory .* GiB", "", render_summary(plan).partition("  memory")[0]))
    assert kept[0] == kept[1]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("process", [[linear(STATIC)], SMOOTHED, GPTQ, TRAINED])
@pytest.mark.parametrize("options", [{}, {"propagate": "quantized"}])
def test_writes_the_same_with_activations_on_disk(
    content: Any,
    asked: Any,
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    process: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr("slim_core.runners.beginning.Spill", partial(Spill, at_least=1))
    given = model_folder("llama")
    _, plan = carried_out(*asked(given, tmp_path / "whole", process, **options))
    assert not plan.memory.spills
    budget = just_too_little(*asked(given, tmp_path / "disk", process, **options))
    _, limited = carried_out(*asked(given, tmp_path / "disk", process, max_memory=budget, **options))
    assert limited.memory.spills
    assert content(tmp_path / "disk") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "process", "options", "why"),
    [
        ("qwen3_moe_16", TRAINED, {}, "(autoround_quant learns all weights of a block together)"),
        ("qwen3_moe_16", SMOOTHED, {"runner": "model_wise"}, "(runner: model_wise keeps all blocks in memory"),
        ("qwen3_moe_16", [linear(TOKEN)], {}, "(no block is loaded, and every linear is quantized by itself)"),
        ("llama", [linear(STATIC)], {}, "(the model has no routed experts that could be in memory one at a time)"),
    ],
)
def test_refused_before_anything_is_written(
    asked: Any,
    model_folder: ModelFolder,
    tmp_path: Path,
    family: str,
    process: list[dict[str, Any]],
    options: dict[str, Any],
    why: str,
) -> None:
    given = (model_folder(family), tmp_path / "out", process)
    budget = "host=1KiB"
    plan = LlmService().plan(*asked(*given, max_memory=budget, **options))
    assert not plan.memory.by_expert
    with pytest.raises(UnsupportedError) as caught:
        carried_out(*asked(*given, max_memory=budget, **options))
    assert why in caught.value.what
    assert caught.value.where == "--max_memory"
    assert list(tmp_path.iterdir()) == []


def test_hessians_that_do_not_fit_are_named_first(asked: Any, model_folder: ModelFolder, tmp_path: Path) -> None:
    """One for what gate and up read, one for what down reads, of every expert; those of a block at a time."""
    given = (model_folder("qwen3_moe_16"), tmp_path / "out", [linear(TOKEN, INT8 | {"method": "gptq"})])
    options = {"propagate": "quantized"}  # weights are in memory beside them
    plan = LlmService().plan(*asked(*given, max_memory="host=1KiB", **options))
    assert plan.memory.by_expert
    hessians = next(share for share in plan.memory.shares if share.what.startswith("Hessians"))
    attention = 2 * hessian_bytes(32)  # query, key and value; the output
    assert hessians.nbytes == 16 * (hessian_bytes(32) + hessian_bytes(24)) + attention
    assert plan.refusal is not None
    assert ", even with one expert at a time in memory" in plan.refusal.what
    sizes = plan.refusal.what.partition(": ")[2]
    assert sizes.index("kernels") < sizes.index("Hessians of the inputs of model.layers.0") < sizes.index("weights")
    enough = plan.refusal.remedy.split()[1].rstrip(",") if plan.refusal.remedy else ""
    assert LlmService().plan(*asked(*given, max_memory=enough, **options)).refusal is None


def test_weights_that_are_gone_before_the_most_is_taken_do_not_count(
    asked: Any, model_folder: ModelFolder, tmp_path: Path
) -> None:
    """GPTQ takes more beside the Hessians than these small blocks, so that experts on call would be no help."""
    given = (model_folder("qwen3_moe_16"), tmp_path / "out", GPTQ)
    plan = LlmService().plan(*asked(*given, max_memory=just_too_little(*asked(*given))))
    assert not plan.memory.by_expert
    assert plan.memory.spills
    assert next(share for share in plan.memory.shares if share.what.startswith("weights")).nbytes == 0


def test_a_dry_run_shows_the_plan_and_the_refusal(
    asked: Any, model_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "apiversion: modelslim_v1\nspec:\n  process: [{type: linear_quant, qconfig: {act: {dtype: int8, scope: "
        "per_tensor, symmetric: false}, weight: {dtype: int8, scope: per_channel, symmetric: true}}}]\n"
        f"  save: [{{type: ascendv1_saver}}]\n  dataset: {dataset}\n"
    )
    options = {"max_memory": "host=1MiB", "dry_run": True, "config_path": recipe}
    request, _ = asked(model_folder("qwen3_moe_16"), tmp_path / "out", [linear(STATIC)], **options)
    commands.quantize(request)
    said = capsys.readouterr().out
    assert "the budget for that is 1.0 MiB for the host; so experts are in memory one at a time" in said
    assert "The run itself would be refused: " in said
    assert "the run would take about" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_moe_16", "gpt_oss_16", "llama4_16", "deepseek_v3", "longcat", "jetmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_structure_is_the_same(model_folder: ModelFolder, family: str, dtype: torch.dtype) -> None:
    """Explored with one expert at a time in memory."""
    found: list[Any] = []
    for by_expert in (False, True):
        model = open_model(model_folder(family, dtype))
        structure = discover(model, example_input(model), by_expert=by_expert)
        graphs = [(g.type, g.source, g.targets, g.columns.tolist(), g.direct) for g in structure.subgraphs()]
        found.append((graphs, structure.refused()))
        assert all(parameter.is_meta for parameter in model.module.parameters())
    assert found[0] == found[1]

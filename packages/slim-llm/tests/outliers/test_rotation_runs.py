"""Runs with ``quarot``: always the same, no forward but the proof, resumed where they were killed, told in the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.processors.linear_quant import LinearQuant
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py
QUAROT: dict[str, Any] = {"type": "quarot"}


def test_always_the_same_and_nobody_elses_random_numbers(
    rules: Any, content: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder = model_folder("qwen3_moe")
    state = torch.get_rng_state()
    for name in ("a", "b"):
        quantize(folder, tmp_path / name, process=[QUAROT, rules["dynamic"]])
        torch.rand(1)
        state_now = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(1)
    torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state_now)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_without_data_there_is_no_forward_but_the_proof_and_weights_are_read_once(
    rules: Any, naive: ModuleType, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    folder = model_folder("llama")
    rows: dict[str, list[int]] = {}
    forwards: list[str] = []
    read, forward = Checkpoint.rows, LlamaDecoderLayer.forward

    def counted(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        rows.setdefault(name, []).extend(range(start, min(stop, self.meta(name).shape[0])))
        return read(self, name, start, stop)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(Checkpoint, "rows", counted)
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *a, **k: (forwards.append(""), forward(self, *a, **k))[1]
    )
    monkeypatch.setattr("slim_llm.quantize.open_tokenizer", refused)

    def planned(_plan: Any) -> None:
        assert 0 < len(forwards) < 60  # a few of one block, the three being alike
        forwards.clear()
        rows.clear()

    LlmService().quantize(
        QuantRequest(model_path=folder, save_path=tmp_path / "out", model_type="tiny", device="cpu", force=True),
        recipe_from_dict(
            {"apiversion": "modelslim_v1", "spec": {"process": [QUAROT, rules["dynamic"]], "dataset": "none.jsonl"}}
        ),
        SilentProgress(),
        planned,
    )
    assert forwards == []
    written = naive.read(tmp_path / "out")
    linears = [f"{module}.weight" for module in written.quantized()]
    assert set(linears) <= set(rows)
    for name in linears:
        assert sorted(rows[name]) == list(range(len(written.tensors[name])))


@pytest.mark.parametrize("rule", ["dynamic", "static"])
def test_a_run_that_was_killed_is_resumed(
    rules: Any,
    killed: Any,
    content: Any,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    rule: str,
) -> None:
    model, process = model_folder("qwen2"), [QUAROT, rules[rule]]
    quantize(model, tmp_path / "whole", process=process)
    with killed(LinearQuant, "model.layers.1"):
        quantize(model, tmp_path / "out", process=process)
    assert quantize(model, tmp_path / "out", process=process, resume=True).resumed_units >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_plan_says_what_is_rotated(rules: Any, model_folder: ModelFolder, dataset: Path, tmp_path: Path) -> None:
    from slim_core.runners.plan_text import render_summary

    request = QuantRequest(
        model_path=model_folder("deepseek_v3"), save_path=tmp_path / "out", model_type="tiny", device="cpu", force=True
    )
    spec = {"process": [QUAROT, rules["dynamic"]], "dataset": str(dataset)}
    plan = LlmService().plan(request, recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}))
    text = render_summary(plan)
    assert "quarot: hidden states of 32 channels rotated, 3 value paths, 6 low ranks" in text
    assert "no calibration data needed" in text

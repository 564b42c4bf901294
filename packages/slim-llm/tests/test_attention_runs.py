"""Runs that quantize attentions: the written scales are those of plain forwards over all samples, whatever the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify import verify_folder
from slim_core.processors.dynamic_cache import DynamicCache as DynamicCacheProcessor
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan_text import render_plan
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
BLOCKS, SAMPLES, LENGTH = 3, 5, 24
RECIPE = "tiny_best_practice.yaml"
LINEAR = {
    "type": "linear_quant",
    "qconfig": {
        "act": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"},
        "weight": {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"},
    },
}
CACHE: dict[str, Any] = {"type": "dynamic_cache"}
KERNEL: dict[str, Any] = {"type": "fa3_quant"}
C8 = [{"type": "group", "configs": [LINEAR, CACHE]}]
ATTENTION = "model.layers.{}.self_attn"
ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.mark.parametrize(
    ("family", "dtype", "symmetric"),
    [
        ("llama", torch.bfloat16, True),
        ("qwen2", torch.float32, False),
        ("qwen3", torch.float16, True),
        ("gemma3", torch.bfloat16, False),
        ("mistral", torch.bfloat16, True),
        ("phi3", torch.bfloat16, True),
        ("glm4", torch.bfloat16, True),
    ],
)
def test_scales_of_the_cache_are_those_of_plain_forwards(
    naive_attention: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    symmetric: bool,
) -> None:
    process = [LINEAR, CACHE | {"qconfig": {"symmetric": symmetric}}]
    result = quantize(model_folder(family, dtype), tmp_path / "out", process=process)
    assert result.block_forwards == BLOCKS * SAMPLES
    written = naive.read(tmp_path / "out")
    states = naive_attention.cached_states(naive_attention.load(model_folder(family, dtype), dtype), token_ids)
    for layer in range(BLOCKS):
        naive_attention.check_cache(written, ATTENTION.format(layer), states[layer], symmetric, dtype)
    description = written.description
    assert description["kv_cache_type"] == description["kv_quant_type"] == "C8"
    assert description["model_quant_type"] == "W8A8_DYNAMIC"
    assert sum(kind == "C8" for kind in description.values()) == 4 * BLOCKS + 2
    report = verify_folder(tmp_path / "out", model_folder(family, dtype))
    assert not report.problems
    assert report.compared
    assert not [w for w in report.warnings if "ignores it" not in w]


def test_the_order_of_the_samples_does_not_matter(
    content: Any, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, dataset: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(f"{line}\n" for line in reversed(dataset.read_text().splitlines())))
    process = [CACHE | {"include": ["*.0.*"]}, KERNEL | {"qconfig": {"ext": {"ratio": 0.99}}, "exclude": ["*.0.*"]}]
    for name, data in (("a", dataset), ("b", turned)):
        quantize(model_folder("llama"), tmp_path / name, process=process, dataset=str(data))
    assert content(tmp_path / "a", RECIPE) == content(tmp_path / "b", RECIPE)


def record_attention(model: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Any]]:
    """Query, key and value as transformers hands them to an attention function that was registered for it."""
    seen: dict[int, list[Any]] = {}

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault(module.layer_idx, []).append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "recording", recording)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "recording", sdpa_mask)
    model.set_attn_implementation("recording")
    with torch.no_grad():
        for each in ids:
            model(input_ids=torch.tensor([each]), use_cache=False)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("fp8_e4m3", 448)])
def test_scales_of_the_kernel_are_those_of_plain_forwards(
    naive_attention: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: str,
    largest: int,
) -> None:
    details = {"fa_q": {"dtype": dtype, "ext": {"ratio": 0.99}}, "fa_k": {"dtype": dtype}, "fa_v": {"dtype": dtype}}
    quantize(model_folder(family), tmp_path / "out", process=[KERNEL | {"details": details}])
    written = naive.read(tmp_path / "out")
    seen = record_attention(naive_attention.load(model_folder(family)), token_ids, monkeypatch)
    for layer in range(BLOCKS):
        for index, (name, share) in enumerate((("fa_q", "0.99"), ("fa_k", "0.9999"), ("fa_v", "1"))):
            states = [sample[index] for sample in seen[layer]]
            expected = []
            for head in range(states[0].shape[1]):
                values = np.sort(np.concatenate([s[:, head].float().abs().flatten().numpy() for s in states]))
                outside = int(np.floor(len(values) * (1 - float(share)) + 1e-9))
                scale = values[len(values) - 1 - outside] / np.float32(largest)
                expected.append([float(torch.tensor(scale).bfloat16())])
            prefix = f"{ATTENTION.format(layer)}.{name}"
            assert written.tensors[f"{prefix}.scale"].tolist() == expected
            offset = written.tensors[f"{prefix}.offset"]
            assert offset.dtype == (torch.int8 if dtype == "int8" else torch.float32)
            assert offset.shape == (len(expected), 1)
            assert not bool(offset.float().any())
        kind = "INT8" if dtype == "int8" else "FP8"
        assert written.description[f"{ATTENTION.format(layer)}.quant_type"] == kind
    assert written.description["fa_quant_type"] == "FAKQuant"
    assert not verify_folder(tmp_path / "out", model_folder(family)).problems


def test_propagating_quantized_states(
    naive_attention: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
) -> None:
    """The range of a block is that of a model whose earlier blocks are deployed, linears and cache."""
    model = model_folder("llama")
    result = quantize(model, tmp_path / "out", process=C8, propagate="quantized")
    assert result.block_forwards == 2 * BLOCKS * SAMPLES
    quantize(model, tmp_path / "float", process=C8)
    written, plain = naive.read(tmp_path / "out"), naive.read(tmp_path / "float")
    prefix, scales = naive_attention.load(model), {}
    for layer in range(BLOCKS):
        naive_attention.check_cache(
            written,
            ATTENTION.format(layer),
            naive_attention.cached_states(prefix, token_ids, scales)[layer],
            True,
            torch.bfloat16,
        )
        found, usual = (naive_attention.stored_cache(each, ATTENTION.format(layer)) for each in (written, plain))
        same = all(torch.equal(found[name][0], usual[name][0]) for name in "kv")
        assert same == (layer == 0)
        naive.deploy(prefix, written, f"model.layers.{layer}.")
        scales |= {(layer, name): parts for name, parts in found.items()}


def test_the_cache_alone_is_propagated(
    naive_attention: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
) -> None:
    """With no linear quantized, the second block still sees what the quantized cache of the first one does."""
    quantize(model_folder("llama"), tmp_path / "out", process=[CACHE], propagate="quantized")
    written = naive.read(tmp_path / "out")
    scales = {(0, name): parts for name, parts in naive_attention.stored_cache(written, ATTENTION.format(0)).items()}
    model = naive_attention.load(model_folder("llama"))
    naive_attention.check_cache(
        written, ATTENTION.format(1), naive_attention.cached_states(model, token_ids, scales)[1], True, torch.bfloat16
    )
    assert written.description["model_quant_type"] == "FLOAT"


@pytest.mark.parametrize(
    ("process", "runner"), [([LINEAR, CACHE], "layer_wise"), ([CACHE, LINEAR], "layer_wise"), (C8, "model_wise")]
)
def test_the_same_bytes_whatever_the_runner_and_the_grouping(
    content: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, process: list[Any], runner: str
) -> None:
    quantize(model_folder("mistral"), tmp_path / "usual", process=C8)
    result = quantize(model_folder("mistral"), tmp_path / "out", process=process, runner=runner)
    assert result.block_forwards == BLOCKS * SAMPLES
    assert content(tmp_path / "out", RECIPE) == content(tmp_path / "usual", RECIPE)


@pytest.mark.parametrize(("unit", "propagate"), [("model.layers.1", "quantized"), ("model.layers.2", "float")])
def test_a_run_that_was_killed_is_resumed(
    killed: Any,
    content: Any,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    unit: str,
    propagate: str,
) -> None:
    model = model_folder("qwen2")
    whole = quantize(model, tmp_path / "whole", process=C8, propagate=propagate)
    with killed(DynamicCacheProcessor, unit):
        quantize(model, tmp_path / "out", process=C8, propagate=propagate)
    result = quantize(model, tmp_path / "out", process=C8, propagate=propagate, resume=True)
    assert result.resumed_units >= 1
    assert result.attentions == whole.attentions
    assert [record.name for record in result.attentions] == [ATTENTION.format(i) for i in range(BLOCKS)]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "qconfig", [{"scope": "per_token"}, {"dtype": "fp8_e4m3", "scope": "per_token"}, {"dtype": "mxfp4"}]
)
def test_dynamic_states_need_no_data(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, qconfig: dict[str, Any]
) -> None:
    process = [LINEAR, KERNEL | {"qconfig": qconfig}]
    result = quantize(model_folder("llama"), tmp_path / "out", process=process, dataset=str(tmp_path / "nothing"))
    assert result.block_forwards == result.samples == 0
    written = naive.read(tmp_path / "out")
    assert not [name for name in written.tensors if ".fa_" in name]
    assert "fa_quant_type" not in written.description
    kinds = {written.description[f"{ATTENTION.format(i)}.quant_type"] for i in range(BLOCKS)}
    dtype = {"int8": "INT8", "fp8_e4m3": "FP8", "mxfp4": "MXFP4"}[qconfig.get("dtype", "int8")]
    assert kinds == {f"{dtype}_DYNAMIC"}
    assert len(result.attentions) == BLOCKS
    assert not verify_folder(tmp_path / "out").problems


def test_what_the_plan_and_the_report_say(model_folder: ModelFolder, dataset: Path, tmp_path: Path) -> None:
    process = [
        LINEAR,
        KERNEL | {"include": ["*.1.self_attn", "*.9.*"], "qconfig": {"ext": {"ratio": 0.99}}},
        CACHE | {"exclude": ["*.2.*"]},
    ]
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": process, "dataset": str(dataset)}})
    request = QuantRequest(
        model_path=model_folder("llama"), save_path=tmp_path / "out", model_type="tiny", device="cpu", force=True
    )
    plan = LlmService().plan(request, recipe)
    assert plan.attention_counts() == {"C8 int8 per_channel": 1, "FAQuant int8 per_head": 1, "FLOAT": 1}
    text = render_plan(plan)
    assert "attentions 1 C8 int8 per_channel, 1 FAQuant int8 per_head, 1 stay FLOAT" in text
    assert "  self_attn         4:2 x 8    FAQuant int8 per_head  spec.process[1]" in text
    assert "excluded by spec.process[2].exclude" in text
    assert "spec.process[1].include: pattern '*.9.*' matches no attention of the decoder blocks" in text
    assert "spec.process[2] names 1 attentions that spec.process[1] has taken (first wins)" in text
    assert "vllm-ascend has no class for standard attention that is FAKQuant (1 attentions" in text
    LlmService().quantize(request, recipe, SilentProgress())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in report["attentions"]}
    assert [row["becomes"] for row in rows.values()] == ["C8 int8 per_channel", "FAQuant int8 per_head", "FLOAT"]
    assert set(rows[ATTENTION.format(0)]["states"]) == {"key", "value"}
    query = rows[ATTENTION.format(1)]["states"]["query"]
    assert query["low"] <= query["clip_low"] < 0 < query["clip_high"] <= query["high"]
    assert query["clip_high"] < query["high"] or query["clip_low"] > query["low"]
    assert rows[ATTENTION.format(1)]["tokens"] > 50
    assert rows[ATTENTION.format(2)]["states"] == {}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 C8 int8 per_channel, 1 FAQuant int8 per_head, 1 FLOAT" in page


def test_recipes_about_linears_alone_say_nothing_of_attentions(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    quantize(model_folder("llama"), tmp_path / "out", process=[LINEAR])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["attentions"] == []
    assert "Attentions" not in (tmp_path / "out" / "report.html").read_text()


def test_states_that_are_not_finite_are_named(
    naive_attention: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    model = naive_attention.load(model_folder("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 0] = float("inf")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    with pytest.raises(InvalidModelError, match=r"model\.layers\.1\.self_attn: its value holds NaN or infinity"):
        quantize(folder, tmp_path / "out", process=[CACHE])

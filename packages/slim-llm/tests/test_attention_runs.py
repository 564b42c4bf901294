"""Runs that quantize attentions: the written scales are those of plain forwards over all samples, whatever the way."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slim_core.errors import InvalidModelError, SlimError, UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.processors.dynamic_cache import DynamicCache as DynamicCacheProcessor
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan_text import render_plan
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.service import LlmService

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
BLOCKS, SAMPLES, LENGTH = 3, 5, 24
TEXT = (
    "The yield expression is used when defining a generator function. Using a yield expression in the body of a "
    "function causes that function to be a generator function.\n"
)
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
Cached = dict[int, list[tuple[Tensor, Tensor]]]


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr("slim_core.evaluation.report.draw_plots", lambda _data: {})


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that tell of time and of the recipe."""
    skipped = ("report.json", "report.html", "tiny_best_practice.yaml")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in skipped}


class Recorder(DynamicCache):
    """What a plain forward puts into its cache; keys and values may be quantized on the way, with scales from files."""

    def __init__(self, scales: dict[tuple[int, str], tuple[Tensor, Tensor]] | None = None, config: Any = None) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.scales = scales or {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.seen[layer_idx] = (key_states, value_states)
        return self._cached(key_states, layer_idx, "k"), self._cached(value_states, layer_idx, "v")

    def _cached(self, state: Tensor, layer: int, name: str) -> Tensor:
        """``(clamp(round(x / s + z)) - z) * s`` channel by channel, in numpy."""
        if (layer, name) not in self.scales:
            return state
        scale, offset = (part.numpy().reshape(1, state.shape[1], 1, -1) for part in self.scales[layer, name])
        codes = np.clip(np.round(state.float().numpy() / scale + offset), -128, 127)
        return torch.from_numpy((codes - offset) * scale).to(state.dtype)


def cached_states(model: Any, ids: list[list[int]], scales: dict[tuple[int, str], Any] | None = None) -> Cached:
    found: Cached = {}
    for each in ids:
        cache = Recorder(scales, model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([each]), use_cache=True, past_key_values=cache)
        for layer, states in cache.seen.items():
            found.setdefault(layer, []).append(states)
    return found


def cache_parameters(states: list[Tensor], symmetric: bool, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Scale and offset of every channel, head by head, from all samples; plain float32 arithmetic."""
    scales, offsets = [], []
    for head in range(states[0].shape[1]):
        for channel in range(states[0].shape[3]):
            values = np.concatenate([state[:, head, :, channel].float().flatten().numpy() for state in states])
            low, high = np.float32(min(values.min(), 0)), np.float32(max(values.max(), 0))
            scale = max(-low, high) / np.float32(127) if symmetric else high / np.float32(255) - low / np.float32(255)
            scale = np.float32(float(torch.tensor(float(max(scale, np.float32(2.0**-23)))).to(dtype)))
            scales.append(float(scale))
            offsets.append(0.0 if symmetric else float(np.clip(np.round(-low / scale) - 128, -128, 127)))
    return scales, offsets


def stored_cache(written: Any, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: tuple(written.tensors[f"{prefix}.{name}_proj.kv_cache_{part}"] for part in ("scale", "offset"))
        for name in "kv"
    }


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def check_cache(written: Any, prefix: str, states: list[tuple[Tensor, Tensor]], symmetric: bool, dtype: Any) -> None:
    for index, (scale, offset) in enumerate(stored_cache(written, prefix).values()):
        want = cache_parameters([pair[index] for pair in states], symmetric, dtype)
        assert (scale.tolist(), offset.tolist()) == want
        assert scale.dtype == offset.dtype == torch.float32


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
    states = cached_states(load(model_folder(family, dtype), dtype), token_ids)
    for layer in range(BLOCKS):
        check_cache(written, ATTENTION.format(layer), states[layer], symmetric, dtype)
    description = written.description
    assert description["kv_cache_type"] == description["kv_quant_type"] == "C8"
    assert description["model_quant_type"] == "W8A8_DYNAMIC"
    assert sum(kind == "C8" for kind in description.values()) == 4 * BLOCKS + 2
    report = verify_folder(tmp_path / "out", model_folder(family, dtype))
    assert not report.problems
    assert report.compared
    assert not [w for w in report.warnings if "ignores it" not in w]


def test_the_order_of_the_samples_does_not_matter(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, dataset: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(f"{line}\n" for line in reversed(dataset.read_text().splitlines())))
    process = [CACHE | {"include": ["*.0.*"]}, KERNEL | {"qconfig": {"ext": {"ratio": 0.99}}, "exclude": ["*.0.*"]}]
    for name, data in (("a", dataset), ("b", turned)):
        quantize(model_folder("llama"), tmp_path / name, process=process, dataset=str(data))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def record_attention(model_folder: Path, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Any]]:
    """Query, key and value as transformers hands them to an attention function that was registered for it."""
    seen: dict[int, list[Any]] = {}

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault(module.layer_idx, []).append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "recording", recording)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "recording", sdpa_mask)
    model = load(model_folder, attn_implementation="recording")
    with torch.no_grad():
        for each in ids:
            model(input_ids=torch.tensor([each]), use_cache=False)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("fp8_e4m3", 448)])
def test_scales_of_the_kernel_are_those_of_plain_forwards(
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
    seen = record_attention(model_folder(family), token_ids, monkeypatch)
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
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
) -> None:
    """The range of a block is that of a model whose earlier blocks are deployed, linears and cache."""
    model = model_folder("llama")
    result = quantize(model, tmp_path / "out", process=C8, propagate="quantized")
    assert result.block_forwards == 2 * BLOCKS * SAMPLES
    quantize(model, tmp_path / "float", process=C8)
    written, plain = naive.read(tmp_path / "out"), naive.read(tmp_path / "float")
    prefix, scales = load(model), {}
    for layer in range(BLOCKS):
        check_cache(
            written, ATTENTION.format(layer), cached_states(prefix, token_ids, scales)[layer], True, torch.bfloat16
        )
        found, usual = (stored_cache(each, ATTENTION.format(layer)) for each in (written, plain))
        same = all(torch.equal(found[name][0], usual[name][0]) for name in "kv")
        assert same == (layer == 0)
        naive.deploy(prefix, written, f"model.layers.{layer}.")
        scales |= {(layer, name): parts for name, parts in found.items()}


def test_the_cache_alone_is_propagated(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
) -> None:
    """With no linear quantized, the second block still sees what the quantized cache of the first one does."""
    quantize(model_folder("llama"), tmp_path / "out", process=[CACHE], propagate="quantized")
    written = naive.read(tmp_path / "out")
    scales = {(0, name): parts for name, parts in stored_cache(written, ATTENTION.format(0)).items()}
    model = load(model_folder("llama"))
    check_cache(written, ATTENTION.format(1), cached_states(model, token_ids, scales)[1], True, torch.bfloat16)
    assert written.description["model_quant_type"] == "FLOAT"


@pytest.mark.parametrize(
    ("process", "runner"), [([LINEAR, CACHE], "layer_wise"), ([CACHE, LINEAR], "layer_wise"), (C8, "model_wise")]
)
def test_the_same_bytes_whatever_the_runner_and_the_grouping(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, process: list[Any], runner: str
) -> None:
    quantize(model_folder("mistral"), tmp_path / "usual", process=C8)
    result = quantize(model_folder("mistral"), tmp_path / "out", process=process, runner=runner)
    assert result.block_forwards == BLOCKS * SAMPLES
    assert content(tmp_path / "out") == content(tmp_path / "usual")


@pytest.mark.parametrize(("unit", "propagate"), [("model.layers.1", "quantized"), ("model.layers.2", "float")])
def test_a_run_that_was_killed_is_resumed(
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
    propagate: str,
) -> None:
    model = model_folder("qwen2")
    whole = quantize(model, tmp_path / "whole", process=C8, propagate=propagate)
    process = DynamicCacheProcessor.process

    def failing(self: Any, work: Any) -> None:
        process(self, work)
        if work.name == unit:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(DynamicCacheProcessor, "process", failing)
        with pytest.raises(RuntimeError, match="killed"):
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


def windows() -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(TEXT)["input_ids"]
    return [part for i in range(0, len(ids), LENGTH) if len(part := ids[i : i + LENGTH]) > 1]


def evaluate(model: Path, written: Path, tmp_path: Path) -> Any:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    request = EvalRequest(model_path=model, text=text, quantized=written, device="cpu", sequence_length=LENGTH)
    return LlmService().evaluate(request, SilentProgress())


def perplexity(model: Any, **options: Callable[[], Any]) -> float:
    loss, count = 0.0, 0
    for part in windows():
        arguments = {name: make() for name, make in options.items()}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([part]), **({"use_cache": bool(options)} | arguments)).logits
        log = functional.log_softmax(logits[0, :-1].double(), -1)
        loss -= float(log[torch.arange(len(part) - 1), torch.tensor(part[1:])].sum())
        count += len(part) - 1
    return math.exp(loss / count)


@pytest.mark.parametrize(("family", "symmetric"), [("llama", True), ("gemma3", False), ("phi3", True)])
def test_evaluation_computes_with_the_written_cache(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, symmetric: bool
) -> None:
    folder, out = model_folder(family), tmp_path / "out"
    quantize(folder, out, process=[LINEAR, CACHE | {"qconfig": {"symmetric": symmetric}}])
    written = naive.read(out)
    deployed = load(folder)
    naive.deploy(deployed, written)
    scales = {
        (layer, name): parts
        for layer in range(BLOCKS)
        for name, parts in stored_cache(written, ATTENTION.format(layer)).items()
    }
    expected = perplexity(deployed, past_key_values=lambda: Recorder(scales))
    result = evaluate(folder, out, tmp_path)
    assert result.quantized_perplexity == pytest.approx(expected, rel=1e-4)
    assert result.perplexity == pytest.approx(perplexity(load(folder)), rel=1e-4)
    # Without the cache the number is another one by far more than that.
    assert abs(perplexity(deployed) - expected) > 20 * abs(result.quantized_perplexity - expected)


def test_evaluation_computes_with_the_written_kernel(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = model_folder("llama"), tmp_path / "out"
    details = {"fa_q": {}, "fa_k": {}, "fa_v": {"scope": "per_token"}}
    quantize(folder, out, process=[KERNEL | {"details": details}])
    written = naive.read(out)

    def quantized(state: Tensor, layer: int, name: str) -> Tensor:
        values = state.float().numpy()
        if name == "fa_v":
            scale = np.maximum(np.abs(values).max(-1, keepdims=True) / np.float32(127), np.float32(2.0**-23))
        else:
            scale = written.tensors[f"{ATTENTION.format(layer)}.{name}.scale"].numpy().reshape(1, -1, 1, 1)
        return torch.from_numpy(np.clip(np.round(values / scale), -128, 127) * scale).to(state.dtype)

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = zip((query, key, value), ("fa_q", "fa_k", "fa_v"), strict=True)
        states = [quantized(state, module.layer_idx, name) for state, name in named]
        return sdpa_attention_forward(module, *states, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "kernel", kernel)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "kernel", sdpa_mask)
    expected = perplexity(load(folder, attn_implementation="kernel"))
    result = evaluate(folder, out, tmp_path)
    assert result.quantized_perplexity == pytest.approx(expected, rel=1e-4)
    assert result.quantized_perplexity != pytest.approx(result.perplexity, rel=1e-4)


def test_what_the_plan_and_the_report_say(model_folder: ModelFolder, dataset: Path, tmp_path: Path) -> None:
    process = [
        LINEAR,
        KERNEL | {"include": ["*.1.self_attn", "*.9.*"], "qconfig": {"ext": {"ratio": 0.99}}},
        CACHE | {"exclude": ["*.2.*"]},
    ]
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": process, "dataset": str(dataset)}})
    request = QuantRequest(
        model_path=model_folder("llama"), save_path=tmp_path / "out", model_type="tiny", device="cpu"
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


def make_model(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            elif path.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention knows no interface, with one head of keys and values for all queries."""
    config = transformers.FalconConfig(vocab_size=3072, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    return make_model(tmp_path_factory.mktemp("falcon"), config)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 without experts."""
    config = transformers.DeepseekV3Config(
        vocab_size=3072,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        first_k_dense_replace=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    return make_model(tmp_path_factory.mktemp("latent"), config)


def test_a_model_that_shows_only_its_cache(
    naive: ModuleType, falcon: Path, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(falcon, out, process=C8)
    written = naive.read(out)
    states = cached_states(load(falcon), token_ids)
    for layer in range(BLOCKS):
        check_cache(written, f"transformer.h.{layer}.self_attention", states[layer], True, torch.bfloat16)
    deployed = load(falcon)
    naive.deploy(deployed, written)
    scales = {
        (layer, name): parts
        for layer in range(BLOCKS)
        for name, parts in stored_cache(written, f"transformer.h.{layer}.self_attention").items()
    }
    expected = perplexity(deployed, past_key_values=lambda: Recorder(scales))
    assert evaluate(falcon, out, tmp_path).quantized_perplexity == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.self_attention: cannot become FAQuant: its query"):
        quantize(falcon, tmp_path / "other", process=[KERNEL])


def test_a_hybrid_whose_first_layers_keep_no_keys(
    naive: ModuleType, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
) -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=3072,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    folder, out = make_model(tmp_path / "model", config), tmp_path / "out"
    result = quantize(folder, out, process=[CACHE])
    assert [record.name for record in result.attentions] == [ATTENTION.format(3)]
    written, model = naive.read(out), load(folder)
    states = cached_states(model, token_ids)
    assert set(states) == {3}
    check_cache(written, ATTENTION.format(3), states[3], True, torch.bfloat16)
    scales = {(3, name): parts for name, parts in stored_cache(written, ATTENTION.format(3)).items()}
    expected = perplexity(model, past_key_values=lambda: Recorder(scales, model.config))
    assert evaluate(folder, out, tmp_path).quantized_perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("process", [[KERNEL], [LINEAR, KERNEL]])
def test_latent_attention(
    naive: ModuleType, latent: Path, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path, process: list[Any]
) -> None:
    out = tmp_path / "out"
    result = quantize(latent, out, process=process)
    assert not [warning for warning in result.warnings if "no class for latent" in warning]
    written = naive.read(out)
    states = cached_states(load(latent), token_ids)
    for layer in range(BLOCKS):
        values = torch.cat([pair[0].float().abs().flatten() for pair in states[layer]])
        scale = written.tensors[f"{ATTENTION.format(layer)}.fa_v.scale"]
        assert scale.tolist() == [[float((values.max() / 127).bfloat16())]]
        assert written.tensors[f"{ATTENTION.format(layer)}.fa_q.scale"].shape == (4, 1)
        assert written.tensors[f"{ATTENTION.format(layer)}.fa_k.scale"].shape == (1, 1)
    report = verify_folder(out, latent, engine=None)
    assert not report.problems
    (entry,) = [e for e in report.loadable if e.engine == "vllm-ascend" and e.place == "attention"]
    assert (entry.kind, entry.loadable) == ("FAKQuant", True)
    scores = evaluate(latent, out, tmp_path)
    assert scores.quantized_perplexity == pytest.approx(scores.perplexity, rel=0.1)
    assert 0 < scores.kl_divergence < 0.1
    with pytest.raises(UnsupportedError, match=r"cannot become C8: it caches a compressed latent .*use fa3_quant"):
        quantize(latent, tmp_path / "other", process=[CACHE])


def test_evaluation_refuses_what_it_cannot_reach(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder, out = model_folder("llama"), tmp_path / "out"
    quantize(folder, out, process=[CACHE])
    path = out / "quant_model_description.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"model.elsewhere.quant_type": "INT8_DYNAMIC"}))
    with pytest.raises(UnsupportedError, match=r"model\.elsewhere: the files quantize 1 attentions"):
        evaluate(folder, out, tmp_path)
    path.write_text(json.dumps(description | {f"{ATTENTION.format(0)}.quant_type": "INT8_DYNAMIC"}))
    with pytest.raises(SlimError, match="both a quantized cache and FAQuant"):
        evaluate(folder, out, tmp_path)


def test_states_that_are_not_finite_are_named(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    model = load(model_folder("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 0] = float("inf")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    with pytest.raises(InvalidModelError, match=r"model\.layers\.1\.self_attn: its value holds NaN or infinity"):
        quantize(folder, tmp_path / "out", process=[CACHE])

"""Evaluation computes with quantized attentions what a plain model computes with the written scales."""

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
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slim_core.errors import SlimError, UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest
from slim_llm.service import LlmService

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
BLOCKS, SAMPLES, LENGTH = 3, 5, 24
TEXT = (
    "The yield expression is used when defining a generator function. Using a yield expression in the body of a "
    "function causes that function to be a generator function.\n"
)
CACHE: dict[str, Any] = {"type": "dynamic_cache"}
KERNEL: dict[str, Any] = {"type": "fa3_quant"}
ATTENTION = "model.layers.{}.self_attn"
ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("no_plots")


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
    rules: Any,
    naive_attention: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    family: str,
    symmetric: bool,
) -> None:
    folder, out = model_folder(family), tmp_path / "out"
    quantize(folder, out, process=[rules["dynamic"], CACHE | {"qconfig": {"symmetric": symmetric}}])
    written = naive.read(out)
    deployed = naive_attention.load(folder)
    naive.deploy(deployed, written)
    scales = {
        (layer, name): parts
        for layer in range(BLOCKS)
        for name, parts in naive_attention.stored_cache(written, ATTENTION.format(layer)).items()
    }
    expected = perplexity(deployed, past_key_values=lambda: naive_attention.Recorder(scales))
    result = evaluate(folder, out, tmp_path)
    assert result.quantized_perplexity == pytest.approx(expected, rel=1e-4)
    assert result.perplexity == pytest.approx(perplexity(naive_attention.load(folder)), rel=1e-4)
    # Without the cache the number is another one by far more than that.
    assert abs(perplexity(deployed) - expected) > 20 * abs(result.quantized_perplexity - expected)


def test_evaluation_computes_with_the_written_kernel(
    naive_attention: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    expected = perplexity(naive_attention.load(folder, attn_implementation="kernel"))
    result = evaluate(folder, out, tmp_path)
    assert result.quantized_perplexity == pytest.approx(expected, rel=1e-4)
    assert result.quantized_perplexity != pytest.approx(result.perplexity, rel=1e-4)


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
    rules: Any,
    naive_attention: ModuleType,
    naive: ModuleType,
    falcon: Path,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    quantize(falcon, out, process=[{"type": "group", "configs": [rules["dynamic"], CACHE]}])
    written = naive.read(out)
    states = naive_attention.cached_states(naive_attention.load(falcon), token_ids)
    for layer in range(BLOCKS):
        naive_attention.check_cache(
            written, f"transformer.h.{layer}.self_attention", states[layer], True, torch.bfloat16
        )
    deployed = naive_attention.load(falcon)
    naive.deploy(deployed, written)
    scales = {
        (layer, name): parts
        for layer in range(BLOCKS)
        for name, parts in naive_attention.stored_cache(written, f"transformer.h.{layer}.self_attention").items()
    }
    expected = perplexity(deployed, past_key_values=lambda: naive_attention.Recorder(scales))
    assert evaluate(falcon, out, tmp_path).quantized_perplexity == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.self_attention: cannot become FAQuant: its query"):
        quantize(falcon, tmp_path / "other", process=[KERNEL])


def test_a_hybrid_whose_first_layers_keep_no_keys(
    naive_attention: ModuleType, naive: ModuleType, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
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
    written, model = naive.read(out), naive_attention.load(folder)
    states = naive_attention.cached_states(model, token_ids)
    assert set(states) == {3}
    naive_attention.check_cache(written, ATTENTION.format(3), states[3], True, torch.bfloat16)
    scales = {(3, name): parts for name, parts in naive_attention.stored_cache(written, ATTENTION.format(3)).items()}
    expected = perplexity(model, past_key_values=lambda: naive_attention.Recorder(scales, model.config))
    assert evaluate(folder, out, tmp_path).quantized_perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("linears", [[], ["dynamic"]])
def test_latent_attention(
    rules: Any,
    naive_attention: ModuleType,
    naive: ModuleType,
    latent: Path,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    linears: list[str],
) -> None:
    out = tmp_path / "out"
    result = quantize(latent, out, process=[*(rules[scheme] for scheme in linears), KERNEL])
    assert not [warning for warning in result.warnings if "no class for latent" in warning]
    written = naive.read(out)
    states = naive_attention.cached_states(naive_attention.load(latent), token_ids)
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

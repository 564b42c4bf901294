"""Where scales can move from keys to queries: layouts of rotary embedding found by proof, in real architectures."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slim_core.model.query_keys import QueryKey
from slim_core.model.structure import Structure, discover
from slim_llm.models.loading import open_model
from slim_llm.vocabulary import example_input

KV_HEADS, DIM = 2, 8
NONE = [0, 1, 2, 3, 4, 5, 6, 7]
HALF = [0, 1, 2, 3] * 2
INTERLEAVED = [0, 0, 1, 1, 2, 2, 3, 3]
PARTIAL = [0, 1, 0, 1, 2, 3, 4, 5]
QUARTER = [0, 0, 1, 2, 3, 4, 5, 6]
PROJECTIONS, NORMS = ("k_proj", "q_proj"), ("k_norm", "q_norm")
ALL_HEADS = {"num_key_value_heads": None, "head_dim": None}
# config, settings, what makes key and query, channels of a head that share a scale, whether all heads share them
EXPECTED: dict[str, tuple[str, dict[str, Any], tuple[str, str], list[int], bool]] = {
    "llama": ("LlamaConfig", {}, PROJECTIONS, HALF, False),
    "qwen2, with biases": ("Qwen2Config", {}, PROJECTIONS, HALF, False),
    "qwen3": ("Qwen3Config", {}, NORMS, HALF, True),
    "gemma3, 1 + weight": ("Gemma3TextConfig", {}, NORMS, HALF, True),
    "phi3": ("Phi3Config", {}, ("qkv_proj", "qkv_proj"), HALF, False),
    "glm4, interleaved half of the head": ("Glm4Config", {}, PROJECTIONS, [0, 0, 1, 1, 2, 3, 4, 5], False),
    "cohere, norms of their own for every head": (
        "CohereConfig",
        {"use_qk_norm": True},
        NORMS,
        INTERLEAVED,
        False,
    ),
    "olmo2, a norm over all heads": ("Olmo2Config", {}, NORMS, HALF, False),
    "ernie": ("Ernie4_5Config", {}, PROJECTIONS, INTERLEAVED, False),
    "hunyuan, norm behind the embedding": (
        "HunYuanDenseV1Config",
        {},
        ("key_layernorm", "query_layernorm"),
        NONE,
        True,
    ),
    "phi, half of the head": (
        "PhiConfig",
        {"qk_layernorm": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ("k_layernorm", "q_layernorm"),
        PARTIAL,
        True,
    ),
    "stablelm, a quarter of the head": ("StableLmConfig", {}, PROJECTIONS, QUARTER, False),
    "gpt_neox, fused by head": ("GPTNeoXConfig", ALL_HEADS, ("query_key_value",) * 2, QUARTER, False),
    "falcon, one key head": ("FalconConfig", ALL_HEADS, ("query_key_value",) * 2, HALF, True),
    "opt, no rotary embedding": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, PROJECTIONS, NONE, False),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "deepseek_v3": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
        | {"qk_nope_head_dim": 8, "first_k_dense_replace": 2},
        "caches a compressed latent",
    ),
    "llama4, norm without weight behind the embedding": (
        "Llama4TextConfig",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "moe_layers": []},
        "no way to scale",
    ),
    "falcon, keys repeated before they are cached": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, **ALL_HEADS},
        "its states have the shape [1, 4,",
    ),
    "gemma3n, keys that later layers take over": (
        "Gemma3nTextConfig",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16, "intermediate_size": [48] * 4}
        | {"activation_sparsity_pattern": [0.0] * 4},
        "later layers take over its keys",
    ),
}


def structure(config: str, settings: dict[str, Any], dtype: torch.dtype, folder: Path) -> Structure:
    base = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": DIM}
    base |= {"num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64}
    base |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = {key: value for key, value in {**base, **settings}.items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**given)).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape) * 0.3
        else:
            parameter *= 5
    model.save_pretrained(folder)
    streamed = open_model(folder)
    return discover(streamed, example_input(streamed), query_keys=True)


def check_layout(place: QueryKey, sources: tuple[str, str], pairing: list[int], shared: bool) -> None:
    assert (place.key.module.rpartition(".")[2], place.query.module.rpartition(".")[2]) == sources
    count = max(pairing) + 1
    heads = [0] * place.kv_heads if shared else range(place.kv_heads)
    assert place.channels.tolist() == [head * count + scale for head in heads for scale in pairing]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPECTED)
def test_families(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, settings, sources, pairing, shared = EXPECTED[family]
    found = structure(config, settings, dtype, tmp_path)
    assert len(found.keys) == 2
    for number, (unit, keys) in enumerate(found.keys.items()):
        assert unit.endswith(f".{number}")
        assert not keys.refused
        (place,) = keys.found
        assert place.attention.startswith(f"{unit}.")
        check_layout(place, sources, pairing, shared)
        assert {place.key.plus_one, place.query.plus_one} == {family.startswith("gemma")}


@pytest.mark.parametrize("family", REFUSED)
def test_attentions_that_cannot_be_smoothed_are_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    config, settings, reason = REFUSED[family]
    found = structure(config, settings, torch.float32, tmp_path)
    reasons = [why for keys in found.keys.values() for why in keys.refused.values()]
    assert reasons
    assert not [place for keys in found.keys.values() for place in keys.found]
    assert all(reason in why for why in reasons)


def test_what_later_layers_take_over_is_left_alone(tmp_path: Path) -> None:
    """The block of the layer alone does not show that its keys and values have more readers."""
    assert [graph.type for graph in structure("LlamaConfig", {}, torch.float32, tmp_path).subgraphs()].count("ov") == 2
    model = open_model(tmp_path)
    model.units = [
        replace(unit, attentions=tuple(replace(info, shared=True) for info in unit.attentions)) for unit in model.units
    ]
    found = discover(model, example_input(model), query_keys=True)
    assert [graph.type for graph in found.subgraphs()].count("ov") == 0
    assert found.refused()["model.layers.1.self_attn.v_proj"] == "later layers take over its values"
    assert set(found.keys["model.layers.1"].refused) == {"model.layers.1.self_attn"}


def test_keys_that_something_else_reads_are_not_smoothed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    plain = attention.forward

    @wraps(plain)
    def spying(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = plain(self, hidden_states, *args, **kwargs)
        return output + self.k_proj(hidden_states).mean(-1, keepdim=True), weights  # pyright: ignore

    monkeypatch.setattr(attention, "forward", spying)
    found = structure("LlamaConfig", {}, torch.float32, tmp_path)
    assert all("no way to scale" in why for keys in found.keys.values() for why in keys.refused.values())
    assert not [place for keys in found.keys.values() for place in keys.found]


def test_nothing_is_left_changed(tmp_path: Path) -> None:
    structure("Qwen3Config", {}, torch.float32, tmp_path)
    model = open_model(tmp_path)
    stored = {name: model.source.load(name).clone() for name in model.source}
    discover(model, example_input(model), query_keys=True)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert all(torch.equal(model.source.load(name), value) for name, value in stored.items())


def test_only_what_was_asked_for_is_looked_for(tmp_path: Path) -> None:
    structure("LlamaConfig", {}, torch.float32, tmp_path)
    model = open_model(tmp_path)
    found = discover(model, example_input(model))
    assert found.subgraphs()
    assert not [place for keys in found.keys.values() for place in keys.found]

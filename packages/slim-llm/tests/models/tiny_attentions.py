"""Tiny models whose attentions are tapped, what the taps see of them, and what a tap could leave behind."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import GeneralInterface

from slim_llm.models.attention import Attentions

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OLD: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MLA: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}
NEXT: dict[str, Any] = {
    **SMALL,
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 6,
    "sliding_window": 64,
}
# Family to configuration class, settings, and (heads, kv_heads, key_dim, value_dim) of its attentions.
MODERN: dict[str, tuple[str, dict[str, Any], tuple[int, int, int, int]]] = {
    "llama": ("LlamaConfig", SMALL, (4, 2, 8, 8)),
    "qwen2": ("Qwen2Config", SMALL, (4, 2, 8, 8)),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 16}, (4, 2, 16, 16)),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "sliding_window": 64}, (4, 2, 8, 8)),
    "phi3": ("Phi3Config", SMALL, (4, 2, 8, 8)),
    "glm4": ("Glm4Config", SMALL, (4, 2, 8, 8)),
    "gpt_neox": ("GPTNeoXConfig", {**OLD, "intermediate_size": 48}, (4, 4, 8, 8)),
    "opt": ("OPTConfig", {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32}, (4, 4, 8, 8)),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}, (4, 4, 8, 8)),
    "qwen3_next": ("Qwen3NextConfig", NEXT, (4, 2, 8, 8)),
}
FALLBACK: dict[str, tuple[str, dict[str, Any], tuple[int, int, int, int]]] = {
    "falcon": ("FalconConfig", OLD, (4, 1, 8, 8)),
    "bloom": ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}, (4, 4, 8, 8)),
    "mpt": ("MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 4}, (4, 4, 8, 8)),
    "gptj": ("GPTJConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}, (4, 4, 8, 8)),
    "gemma3n": ("Gemma3nTextConfig", SHARED, (4, 2, 8, 8)),
}
FAMILIES = MODERN | FALLBACK
Seen = dict[str, list[tuple[Tensor | None, Tensor, Tensor]]]


def build(name: str, settings: dict[str, Any], implementation: str | None = None) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            elif path.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def family(name: str, implementation: str | None = None) -> Any:
    kind, settings, _ = FAMILIES[name]
    return build(kind, settings, implementation)


def tokens(seed: int = 0, batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({"use_cache": False} | options)).logits


def observe(model: nn.Module, ids: Tensor) -> tuple[Seen, Tensor]:
    """What the taps of all attentions see in one forward, and its logits."""
    attentions = Attentions(model)
    seen: Seen = {info.name: [] for info in attentions.attentions}
    taps = {name: lambda *states, name=name: seen[name].append(states) for name in seen}
    with attentions.tapped(taps):
        logits = run(model, ids)
    return seen, logits


def hooks(model: nn.Module) -> list[object]:
    """Everything a tap could leave behind on a model or on transformers."""
    left: list[object] = [vars(AttentionInterface).get(name) for name in ("get_interface", "__getitem__", "get")]
    left += [vars(GeneralInterface).get("__getitem__")]
    for module in model.modules():
        left += [len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module))]
    return left

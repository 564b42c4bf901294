"""A tiny random instance of any causal language model of the installed transformers, made from its config class.

Sizes are shrunk by the names of their fields, the same for all. ``HINTS`` has what must fit together in a way that only
one class knows of; it is about building a small one, and Slim knows nothing of it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TOKENIZER", "build", "causal_models", "save", "tiny_config"]

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
VOCABULARY = 3072
HIDDEN, HEADS, HEAD_DIM, LAYERS, MOST_LAYERS, EXPERTS = 64, 4, 16, 4, 8, 4
# The first pattern that fits the whole name of a field gives the most that it may be.
_CAPS: list[tuple[str, int]] = [
    (r"vocab_size|vocab_size_per_layer_input|decoder_vocab_size|unpadded_vocab_size", VOCABULARY),
    (r"\w*(vocab|vocab_size|vocab_size_base)", 512),
    (r"split_ngram_parts", 4),
    (r"hidden_size_per_layer_input|router_hidden_size", 16),
    (r"mamba_num_heads|mamba_n_heads|num_heads_mamba", 8),
    (r"(num_)?(key_value|kv)_heads|kv_n_heads|num_kv_heads|\w*_key_value_heads|linear_num_key_heads", 2),
    (r"index_n_heads|n_mamba_heads", 2),
    (r"\w*(attention_heads|num_heads|n_heads?|value_heads|query_groups)", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"attention_head_dim|mamba_headdim", 2 * HEAD_DIM),
    (r"\w*(head_dim|head_size|d_head|dim_head|d_kv|kv_channels|mamba_dim_head)|rotary_dim", HEAD_DIM),
    (r"hidden_size|n_embd|d_model|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|lru_width", HIDDEN),
    (r"\w*embedding_size|hidden_size_global|out_hidden_size|adapter_\w+_dim|vision_output_dim", HIDDEN),
    (r"projector_\w+_dim|backbone_hidden_size|ple_embed_dim", HIDDEN),
    (r"attention_hidden_size|mamba_d_ssm|time_step_rank|mamba_dt_rank", 2 * HIDDEN),
    (r"(moe|expert)\w*(intermediate_size|ffn_hidden_size)", 24),
    (r"shared\w*intermediate_size", 40),
    (r"\w*(intermediate_size|ffn_hidden_size|ffn_dim|mlp_dim|d_ff|dim_ff|dff|d_inner|n_inner|feed_forward_size)", 96),
    (r"intermediate_size_mlp|ffn_round_up_to_multiple_of|block_multiple_of", 48),
    (r"\w*(lora_rank|laurel_rank|lowrank|adapter_rank|d_rel)", 16),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|topk_group|n_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_hidden_layers|num_layers|n_layers?|num_blocks|\w*(encoder|decoder)_layers|depth", LAYERS),
    (r"num_kv_shared_layers|num_nextn_predict_layers|conf_num_hidden_layers|num_global_layers", 1),
    (r"num_layers_per_stack", 2),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"n_groups|mamba_n_groups|mamba_ngroups|o_groups", 2),
    (r"\w*sliding_window(_size)?|attention_window_size|window_size|local_attention", 16),
    (r"index_topk", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions", 256),
    (r"model_max_length|rel_extent|attention_chunk_size|max_source_positions", 256),
    (r"image_size|crop_size", 56),
]
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_blocks")
# Lists that say something of every layer, but by the index of another list or in a way that follows from it.
_DERIVED = {"moe_layers", "attention_layers"}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_ROPE = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_CONVOLUTIONS = ["conv", "conv", "full_attention", "conv"]
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_HEAD = {"head_dim": HEAD_DIM}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": HIDDEN,
    "eos_token_id": VOCABULARY - 1,
}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": LAYERS} | {
    "num_kv_shared_layers": LAYERS,
    "layer_types": _SLIDING,
}
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "cohere_compass_text": {"layer_types": _SLIDING, "rope_parameters": _ROPE},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {"audio_config": {"adapter_input_size": HIDDEN}},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ...},
    "granitemoehybrid": {"layer_types": _MIXED, **_MAMBA},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD | {"num_experts": EXPERTS, "moe_topk": 2, "moe_intermediate_size": 24},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "laguna": {"layer_types": _SLIDING},
    "lfm2": {
        "layer_types": _CONVOLUTIONS,
        "full_attn_idxs": [2],
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": True,
    },
    "lfm2_moe": {"layer_types": _CONVOLUTIONS, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": _SLIDING, "mlp_layer_types": _SPARSE},
    "minimax_m3_vl_text": {"mlp_layer_types": _SPARSE},
    "ministral": _HEAD | {"layer_types": _SLIDING},
    "nemotron": _HEAD | {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ("local", "lsh", "local", "lsh"),
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 5},
    "zamba2": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 5, "n_mamba_heads": 4, "num_key_value_heads": HEADS},
}


def causal_models() -> dict[str, str]:
    """Model types that ``AutoModelForCausalLM`` knows, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: str(cls) for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of a small model of this type that has every kind of block; ``changes`` to its fields."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    hints = HINTS.get(model_type, {})
    return cls(**_merged(_merged(_shrunk(_default(cls, hints)), hints), changes))


def build(model_type: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A model with random weights under which logits differ from token to token and all experts get some.

    Args:
        changes: fields of its configuration that are to be otherwise.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **changes)
    torch.manual_seed(sum(map(ord, model_type)))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    randomize(model)
    return model


def save(model: Any, folder: Path) -> None:
    """The model as transformers writes it, and a tokenizer."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)


def _default(cls: Any, hints: dict[str, Any]) -> Any:
    try:
        return cls()
    except Exception:  # noqa: BLE001 - classes refuse their own defaults in many ways
        return cls(**hints)


def _shrunk(config: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    settings: dict[str, Any] = {}
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = {"model_type": value.model_type, **_shrunk(value)} if value.model_type else _shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if (cap := _cap(name)) is not None:
                settings[name] = cap if name == "vocab_size" else min(value, cap)
            elif re.fullmatch(r"\w*token_(id|index)|unk_index|mask_index", name) and value >= VOCABULARY:
                settings[name] = VOCABULARY - 1 - sum(map(ord, name)) % 50
        elif name == "eos_token_id" and isinstance(value, list):
            settings[name] = VOCABULARY - 1
        elif name == "rope_parameters" and isinstance(value, dict):
            settings[name] = _shrunk_rope(value)
    if "kv_lora_rank" in fields and isinstance(fields.get("num_key_value_heads"), int):
        settings["num_key_value_heads"] = settings.get("num_attention_heads", HEADS)
    if "is_decoder" in fields:  # without it some would look ahead
        settings["is_decoder"] = True
    return settings | _shrunk_depth(config, fields)


def _cap(name: str) -> int | None:
    return next((most for pattern, most in _CAPS if re.fullmatch(pattern, name)), None)


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections of the rotated channels shrink with the channels."""
    result = dict(rope)
    for key, value in rope.items():
        if isinstance(value, dict):
            result[key] = _shrunk_rope(value)
        elif key == "mrope_section":
            part = rope.get("partial_rotary_factor", 1.0)
            half = int(HEAD_DIM * part) // 2
            first = half - 2 * (half // 3)
            result[key] = [first, half // 3, half // 3]
    return result


def _shrunk_depth(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """As many layers as there are kinds of them, so many at least that blocks follow each other."""
    depth = next((name for name in _DEPTHS if isinstance(getattr(config, name, None), int)), None)
    count: int = getattr(config, depth) if depth else 0
    if depth is None:  # nemotron_h
        count = max((len(value) for name, value in fields.items() if name == "layers_block_type"), default=0)
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 1 and name not in _DERIVED
    }
    if not lists:
        return {}
    kinds = [repr([value[i] for value in lists.values()]) for i in range(count)]
    chosen = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:MOST_LAYERS]
    for i in range(count):
        if len(chosen) < min(count, LAYERS) and i not in chosen:
            chosen.append(i)
    chosen.sort()
    result: dict[str, Any] = {name: [value[i] for i in chosen] for name, value in lists.items()}
    for name, values in result.items():
        if (cap := _cap(name)) is not None:
            result[name] = [min(value, cap) for value in values]
    return result | ({depth: len(chosen)} if depth else {})


def _merged(settings: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    result = dict(settings)
    for name, value in hints.items():
        inner = result.get(name)
        result[name] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return {name: value for name, value in result.items() if value is not ...}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights of products get entries that keep the size of what they multiply, norms and biases some variety.

    All else (decay rates, convolutions, position tables) stays as its author draws it.
    """
    generator = torch.Generator().manual_seed(7)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            experts = parameter.dim() == 3 and "proj" in name
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise(parameter) * parameter.shape[-1] ** -0.5)
            elif experts or (parameter.dim() == 2 and name.endswith("weight")):  # routers have classes of their own
                inner = min(parameter.shape[-2:]) if experts else parameter.shape[-1]
                parameter.copy_(noise(parameter) * inner**-0.5)
            elif parameter.dim() == 1 and "norm" in type(module).__name__.lower():
                parameter.add_(noise(parameter) * 0.1)
            elif name.endswith("bias") and (parameter.dim() == 2 or type(module).__name__ in ("Linear", "Conv1D")):
                parameter.copy_(noise(parameter) * 0.1)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("score_correction_bias"):
                buffer.copy_(noise(buffer) * 0.1)
            elif name == "tid2eid":  # the experts of every token
                choices = torch.rand(len(buffer), EXPERTS, generator=generator).argsort(-1)
                buffer.copy_(choices[:, : buffer.shape[1]])

"""Configurations of tiny vision-language models, one of every family, and how its tensors are named on disk.

The fields of ``config.json`` are those of published checkpoints, also where transformers has renamed them since. Sizes
are chosen so that no two that could be mixed up are equal: twice the inner size of an expert is not the hidden size.
"""

from __future__ import annotations

from typing import Any

from tiny_processors import token_id

__all__ = ["CLIP_NAMES", "FAMILIES", "PREFIXES", "VOCABULARY"]

VOCABULARY = 448  # a few more rows than tokens, as published embeddings have
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
_HEAD = {"head_dim": 16}
_QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
_EIGHT = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _ids(family: str, **names: str) -> dict[str, int]:
    return {key: token_id(family, token) for key, token in names.items()}


def _qwen_ids(family: str) -> dict[str, int]:
    return _ids(
        family,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _qwen2(family: str, architecture: str, vision: dict[str, Any]) -> dict[str, Any]:
    """The text model's fields lie flat beside those of the whole model."""
    return {
        **_TEXT,
        "architectures": [architecture],
        "model_type": family,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"model_type": family, **_QWEN_VISION, **vision},
        **_qwen_ids(family),
        **_ids(family, bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>"),
    }


def _qwen3(family: str, architecture: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return {
        "architectures": [architecture],
        "model_type": family,
        "tie_word_embeddings": False,
        "text_config": {**_TEXT, **_HEAD, "model_type": f"{family}_text", "rope_scaling": rope, **text},
        "vision_config": {**_QWEN_VISION, "model_type": family, "hidden_act": "gelu_pytorch_tanh"}
        | {"intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64, **vision},
        **_qwen_ids(family),
    }


def _glm(family: str, architecture: str, text: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    ids = _ids(
        family,
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>",
        video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )
    parts = "glm4v_moe" if family == "glm4v_moe" else "glm4v"
    return {
        "architectures": [architecture],
        "model_type": family,
        "tie_word_embeddings": False,
        "text_config": {**_TEXT, "model_type": f"{parts}_text", "partial_rotary_factor": 0.5, "rope_scaling": rope}
        | {"pad_token_id": token_id(family, "<|endoftext|>"), **text},
        "vision_config": {**_QWEN_VISION, "model_type": parts if family == "glm46v" else family, "hidden_act": "silu"}
        | {"intermediate_size": 64, "out_hidden_size": 64, "image_size": 32}
        | ({"model_type": "glm4v_vision"} if family == "glm46v" else {}),
        **ids,
    }


def _llava(family: str, architecture: str, text: dict[str, Any], vision: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": family,
        "tie_word_embeddings": False,
        "text_config": _TEXT | text,
        "vision_config": vision,
        **rest,
    }


_DEEPSTACK = {"deepstack_visual_indexes": [0, 1, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": _qwen2(
        "qwen2_vl", "Qwen2VLForConditionalGeneration", {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    ),
    "qwen2_5_vl": _qwen2(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"intermediate_size": 48, "out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [2]}
        | {"hidden_act": "silu", "tokens_per_second": 2},
    ),
    "qwen3_vl": _qwen3("qwen3_vl", "Qwen3VLForConditionalGeneration", {"num_hidden_layers": 4}, _DEEPSTACK),
    "qwen3_vl_moe": _qwen3(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {"num_hidden_layers": 4, "num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
        | {"norm_topk_prob": True, **_EIGHT},
        _DEEPSTACK,
    ),
    "qwen3_5": _qwen3(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {"num_hidden_layers": 4, "partial_rotary_factor": 0.5, "linear_conv_kernel_dim": 4}
        | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
        {},
    ),
    "glm4v": _glm("glm4v", "Glm4vForConditionalGeneration", {}),
    "glm46v": _glm("glm46v", "Glm46VForConditionalGeneration", {}),
    "glm4v_moe": _glm(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"routed_scaling_factor": 1.0, "norm_topk_prob": True, "attention_bias": True, **_EIGHT},
    ),
    "internvl": _llava(
        "internvl",
        "InternVLForConditionalGeneration",
        {"model_type": "qwen3", **_HEAD},
        {"model_type": "internvl_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        | {"num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8], "attention_bias": True},
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **_ids("internvl", image_token_id="<IMG_CONTEXT>"),
    ),
    "gemma3": _llava(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 16, "sliding_window_pattern": 2}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, **_HEAD},
        _SIGLIP,
        mm_tokens_per_image=4,
        **_ids("gemma3", boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>")
        | _ids("gemma3", image_token_index="<image_soft_token>"),
    )
    | {"tie_word_embeddings": True},
    "llava": _llava(
        "llava",
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32},
        image_seq_length=16,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **_ids("llava", image_token_index="<image>"),
    ),
    "mistral3": _llava(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "sliding_window": None, **_HEAD},
        {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        | {"num_attention_heads": 2, "head_dim": 16, "image_size": 64, "patch_size": 8, "rope_theta": 10000.0},
        spatial_merge_size=2,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        **_ids("mistral3", image_token_index="[IMG]"),
    ),
    "idefics3": _llava(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        {"model_type": "llama"} | _ids("idefics3", pad_token_id="<|end_of_text|>"),
        {"model_type": "idefics3_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        **_ids("idefics3", image_token_id="<image>", pad_token_id="<|end_of_text|>"),
    ),
    "kimi_k25": _llava(
        "kimi_k25",
        "KimiK25ForConditionalGeneration",
        {"model_type": "kimi_k2", "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, **_EIGHT},
        {"model_type": "kimi_k25_vision", "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4}
        | {"num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48},
        projection_hidden_size=32,
        **_ids("kimi_k25", image_token_id="<|media_pad|>", video_token_id="<|kimi_k25_video_placeholder|>")
        | _ids("kimi_k25", vision_start_token_id="<|media_begin|>", vision_end_token_id="<|media_end|>"),
    ),
    "aya_vision": _llava(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        {"model_type": "cohere2", "sliding_window": 16, "layer_norm_eps": 1e-5, "logit_scale": 0.25, **_HEAD},
        _SIGLIP,
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **_ids("aya_vision", image_token_index="<|IMG_PATCH|>"),
    )
    | {"tie_word_embeddings": True},
}
# What the names of the tensors of a published checkpoint begin with: of the blocks of the text decoder, of the vision
# encoder, of what joins them, and of the rest. Every tensor has one of these, and each of these has a tensor.
_QWEN2_NAMES = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.", "visual.blocks.", "visual.merger.")
_QWEN3_NAMES = ("model.language_model.layers.", "model.language_model.embed_tokens.", "model.language_model.norm.")
_QWEN3_NAMES += ("lm_head.", "model.visual.blocks.", "model.visual.merger.", "model.visual.patch_embed.proj.")
_LLAVA_NAMES = ("language_model.model.layers.", "language_model.model.embed_tokens.", "language_model.model.norm.")
_LLAVA_NAMES += ("multi_modal_projector.",)
_CLIP_START = "vision_tower.vision_model.pre_layrnorm."
CLIP_NAMES = tuple(f"vision_tower.vision_model.{part}." for part in ("embeddings", "encoder.layers", "post_layernorm"))
_GLM_NAMES = ("model.visual.downsample.", "model.visual.embeddings.position_embedding.", "model.visual.post_layernorm.")
_GLM_NAMES = (*_QWEN3_NAMES, *_GLM_NAMES, "model.visual.post_conv_layernorm.")
PREFIXES: dict[str, tuple[str, ...]] = {
    "qwen2_vl": (*_QWEN2_NAMES, "visual.patch_embed.proj."),
    "qwen2_5_vl": (*_QWEN2_NAMES, "visual.patch_embed.proj."),
    "qwen3_vl": (*_QWEN3_NAMES, "model.visual.pos_embed.", "model.visual.deepstack_merger_list."),
    "qwen3_vl_moe": (*_QWEN3_NAMES, "model.visual.pos_embed.", "model.visual.deepstack_merger_list."),
    "qwen3_5": (*_QWEN3_NAMES, "model.visual.pos_embed."),
    "glm4v": _GLM_NAMES,
    "glm46v": _GLM_NAMES,
    "glm4v_moe": _GLM_NAMES,
    "internvl": (*_LLAVA_NAMES, "language_model.lm_head.", "vision_tower.embeddings.", "vision_tower.encoder.layer."),
    "gemma3": (*_LLAVA_NAMES, *CLIP_NAMES),
    "llava": (*_LLAVA_NAMES, "language_model.lm_head.", *CLIP_NAMES, _CLIP_START),
    "mistral3": (
        *_LLAVA_NAMES,
        "language_model.lm_head.",
        "vision_tower.patch_conv.",
        "vision_tower.ln_pre.",
        "vision_tower.transformer.layers.",
    ),
    "idefics3": (
        "model.text_model.layers.",
        "model.text_model.embed_tokens.",
        "model.text_model.norm.",
        "lm_head.",
        "model.vision_model.embeddings.",
        "model.vision_model.encoder.layers.",
        "model.vision_model.post_layernorm.",
        "model.connector.modality_projection.proj.",
    ),
    "kimi_k25": (
        *_LLAVA_NAMES[:3],
        "language_model.lm_head.",
        "mm_projector.pre_norm.",
        "mm_projector.proj.",
        "vision_tower.patch_embed.proj.",
        "vision_tower.patch_embed.pos_emb.weight",
        "vision_tower.encoder.blocks.",
        "vision_tower.encoder.final_layernorm.",
    ),
    "aya_vision": (*_LLAVA_NAMES, *CLIP_NAMES),
}

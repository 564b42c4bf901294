"""A tiny random instance of any image-text-to-text model of the installed transformers, with its own processor.

The model is made as in ``tiny_models``: from its config class, sizes shrunk by the names of their fields. The processor
is the class that transformers has for the model, with its own image processor and a tokenizer of a few hundred tokens
that has every special token which the processor's source names. ``HINTS`` has what must fit together in a way that only
one class knows of; it is about building a small one, and Slim knows nothing of it.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import randomize, tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

__all__ = ["build_pictures", "picture_models"]

_ORDINARY = 384
_SENTENCES = ("Describe this image in detail. What is written in the table?", "A red square stands beside a circle.")
_IMAGE, _PATCH = 32, 8
_SPECIAL = re.compile(r"""["'](<[^<>"'\s{}]{1,40}>|<\|[^"'{}]{1,30}\|>|\[[A-Z_]{2,12}\])["']""")
_NAMED = re.compile(r"tokenizer\.(\w+_token)(?:_id)?\b")
_TEMPLATE = (
    "{%- for message in messages -%}{{- message['role'] ~ ': ' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
# Processors that are not listed by model type.
_PROCESSORS = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "fast_vlm": "LlavaProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "kosmos-2": "Kosmos2Processor",
    "kosmos-2.5": "Kosmos2_5Processor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
    "vision-encoder-decoder": "TrOCRProcessor",
}
_IMAGE_PROCESSORS = {
    "diffusion_gemma": "gemma4",
    "fast_vlm": "llava",
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "qwen3_vl_moe": "qwen3_vl",
    "instructblipvideo": "instructblip",
    "vision-encoder-decoder": "vit",
}
_VIDEOS = {"minicpmv4_7": "MiniCPMV4_6VideoProcessor"}


def picture_models() -> dict[str, str]:
    """Model types that ``AutoModelForImageTextToText`` knows, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    names: dict[str, Any] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return {kind: str(cls) for kind, cls in names.items()}


_POOLED = {"size": {"height": 32, "width": 32}}
_TILE = {"text_config": {"hidden_size": 64}}
_ROPE3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
# What does not follow from the names of fields.
HINTS: dict[str, dict[str, Any]] = {
    "aria": {
        "projector_patch_to_query_dict": {49: 16, 196: 64},
        "vision_config": {"image_size": 490, "patch_size": 70},
    },
    "chameleon": {
        "vocabulary_map": {"IMGIMGBSZ": 300, "<image>": 388},
        "vq_config": {
            "num_embeddings": 64,
            "resolution": 32,
            "channel_multiplier": [1, 1, 2],
            "base_channels": 32,
            "embed_dim": 16,
            "latent_channels": 16,
        },
    },
    "cohere_compass": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                k: {"rope_type": "default", "rope_theta": 10000.0} for k in ("full_attention", "sliding_attention")
            },
        }
    },
    "granite_docling": {},
    "cosmos3_omni": {"vision_config": {"deepstack_visual_indexes": [0, 1, 2]}},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 1,
        "vision_end_token_id": 1,
        "vision_config": {"deepstack_visual_indexes": [0, 1, 2]},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 64}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 24],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        }
    },
    "granite4_vision": {
        "image_grid_pinpoints": _PINPOINTS,
        "deepstack_layer_map": [[-1, 0], [-2, 1]],
        "downsample_rate": "1/2",
        "image_seq_length": 16,
        "vision_feature_select_strategy": "default",
        "spatial_target_layers": [2, 3],
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "paddleocr_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    },
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 1,
        "vision_end_token_id": 1,
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
    },
    "glm_ocr": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    },
    "glmga": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    },
    "diffusion_gemma": {},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
        "vision_config": {
            "sam_config": {"downsample_channels": [32, 64], "global_attn_indexes": [1, 3], "window_size": 2}
        },
    },
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {"downsample_channels": [32, 64], "global_attn_indexes": [1, 3], "window_size": 2}
        }
    },
    "fuyu": {"patch_size": 8},
    "lfm2_vl": {"vision_config": {"num_patches": 64}},
    "gemma3n": {"vision_config": {"hidden_size": 2048}},
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "patch_size": 16,
        }
    },
    "florence2": {
        "vision_config": {
            "depths": [1, 1, 1, 1],
            "embed_dim": [16, 32, 64, 64],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "patch_size": [7, 3, 3, 3],
            "window_size": 4,
            "projection_dim": 64,
        }
    },
    "emu3": {
        "vocabulary_map": {f"<|visual token {i:06d}|>": 300 + i for i in range(64)}
        | {"<|extra_200|>": 299, "<image>": 388},
        "vq_config": {"codebook_size": 64, "base_channels": 32, "channel_multiplier": [1, 1, 2], "hidden_size": 64},
    },
    "janus": {
        "vision_config": {"num_image_tokens": 16, "projection_dim": 64},
        "vq_config": {
            "base_channels": 32,
            "num_embeddings": 64,
            "channel_multiplier": [1, 1, 2],
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
    },
    "idefics": {"cross_layer_interval": 2},
    "kosmos-2": {"text_config": {"max_position_embeddings": 512}},
    "kosmos-2.5": {"text_config": {"max_position_embeddings": 4096}},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llava_next": {"image_grid_pinpoints": _PINPOINTS, "image_seq_length": 16},
    "llava_next_video": {"image_grid_pinpoints": _PINPOINTS, "image_seq_length": 16},
    "llava_onevision": {"image_grid_pinpoints": _PINPOINTS},
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
        "text_config": {"cross_attention_layers": [1, 3]},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1], "text_hidden_size": 64}},
    "muse_glimmer": {"out_hidden_size": 256, "projector_hidden_size": 64},
    "muse_spark": {"out_hidden_size": 256, "projector_hidden_size": 64},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "vision_hidden_size": 64,
        "projector_hidden_size": 64,
    },
    "paligemma": {"projection_dim": 64},
    "gemma4_unified": {"vision_config": {"patch_size": 16, "mm_embed_dim": 64, "output_proj_dims": 64}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [32, 32]}
            | {"use_post_transformer_norm": False},
        }
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "shieldgemma2": {"tie_word_embeddings": True, "mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci2", "hidden_size": 1280}},
}
# For each type: settings of its image processor, and arguments of its processor.
IMAGES: dict[str, dict[str, Any]] = {
    "dots3_note": {"temporal_patch_size": 1},
    "perception_lm": {"tile_size": 32, "max_num_tiles": 4},
    "step3p7": {"patch_size": 32, "vision_patch_size": 8, "size": {"height": 64, "width": 64}},
    "fast_vlm": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    "molmo2": {"overlap_margins": [1, 1]},
    "aria": {"max_image_size": 980, "min_image_size": 336},
    "cosmos3_edge": {"temporal_patch_size": 1},
    "deepseek_vl_hybrid": {"high_res_size": {"height": 64, "width": 64}},
    "ernie4_5_vl_moe": {"temporal_patch_size": 1},
    "cohere2_vision": {"patch_size": 2},
    "video_llama_3": {"temporal_patch_size": 1},
    "paddleocr_vl": {"temporal_patch_size": 1},
    "muse_glimmer": {"temporal_patch_size": 2, "max_image_tokens": 64},
    "muse_spark": {"temporal_patch_size": 2, "max_image_tokens": 64},
    "lfm2_vl": {"encoder_patch_size": 8, "tile_size": 32, "min_image_tokens": 4, "max_image_tokens": 16},
    "deepseek_ocr2": {"tile_size": 32, "size": {"height": 64, "width": 64}},
    "unlimited_ocr": {"tile_size": 32, "size": {"height": 64, "width": 64}},
    "gemma4": {"patch_size": 16, "max_soft_tokens": 70},
    "idefics": {"image_size": 32},
    "kosmos-2.5": {"max_patches": 64},
    "pix2struct": {"max_patches": 64},
    "janus": {"size": {"height": 32, "width": 32}, "min_size": 8},
    "fuyu": {"patch_size": {"height": 8, "width": 8}, "size": {"height": 64, "width": 64}},
    "granite4_vision": {"image_grid_pinpoints": _PINPOINTS},
    "llava_next": {"image_grid_pinpoints": _PINPOINTS},
    "llava_next_video": {"image_grid_pinpoints": _PINPOINTS},
    "llava_onevision": {"image_grid_pinpoints": _PINPOINTS},
    "paligemma": {"image_seq_length": 16},
    "florence2": {"image_seq_length": 2},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "perception_lm": {"patch_size": 16, "pooling_ratio": 1},
    "deepseek_ocr2": {"patch_size": 8},
    "unlimited_ocr": {"patch_size": 8},
    "deepseek_vl": {"num_image_tokens": 16},
    "deepseek_vl_hybrid": {"num_image_tokens": 16},
    "janus": {"num_image_tokens": 16},
    "granite4_vision": {"downsample_rate": "1/2", "patch_size": 8, "num_additional_image_tokens": 1},
    "florence2": {"num_additional_image_tokens": 0},
    "cohere2_vision": {},
    "qianfan_ocr": {"image_seq_length": 4},
    "ovis2": {"image_seq_length": 16},
    "kosmos-2": {"num_patch_index_tokens": 16},
    "gemma3n": {"image_seq_length": 256},
    "fast_vlm": {"patch_size": 32},
    "llava_onevision": {"num_image_tokens": 16},
    "llava_next": {"num_additional_image_tokens": 1},
    "llava_next_video": {"num_additional_image_tokens": 1},
    "shieldgemma2": {"image_seq_length": 4},
    "smolvlm": {"image_seq_len": 4},
    "granite_docling": {"image_seq_len": 1},
    "t5gemma2": {"image_seq_length": 4},
    "vipllava": {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    "aria": {"size_conversion": {490: 16, 980: 64}},
    "blip-2": {"num_query_tokens": 32},
    "instructblip": {"num_query_tokens": 32},
}
# What stands for a picture in a prompt, where it is not the processor's image token; empty: there is no chat template.
TEMPLATES: dict[str, str] = {
    "hunyuan_vl": "<image_start_token><image_token><image_end_token>",
    "qianfan_ocr": "<image>",
    "pp_chart2table": "<img><imgpad></img>",
} | dict.fromkeys(
    (
        "paligemma",
        "blip",
        "blip-2",
        "git",
        "instructblip",
        "fuyu",
        "florence2",
        "pix2struct",
        "udop",
        "kosmos-2",
        "kosmos-2.5",
        "pp_formulanet",
        "idefics",
        "got_ocr2",
    ),
    "",
)
TOKENS: dict[str, dict[str, str]] = {
    k: {"audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
    for k in ("gemma4", "gemma4_unified", "diffusion_gemma")
} | {"cohere_compass": {"image_token": "<|IMAGE_PAD|>"}}
# Fields of the configuration that hold the id of a special token, where their names do not say of which.
IDS: dict[str, dict[str, str]] = {
    "pp_chart2table": {"image_token_index": "<imgpad>", "image_token_id": "<imgpad>"},
    "llama4": {"image_token_index": "<|patch|>", "image_token_id": "<|patch|>"},
    "ovis2": {"image_token_id": "<IMG_ATOM>"},
    "shieldgemma2": {"image_token_index": "<image_token>", "image_token_id": "<image_token>"},
    "t5gemma2": {"image_token_index": "<image_token>", "image_token_id": "<image_token>"},
    "step3p7": {"image_token_id": "<im_patch>"},
    "molmo2": {"image_patch_id": "<im_patch>"},
}
# Special tokens that the source of the processor does not spell out.
MORE: dict[str, tuple[str, ...]] = {
    "pp_chart2table": ("<img>", "<imgpad>", "</img>"),
    "fuyu": ("|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|"),
    "minimax_m3_vl": ("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
    "smolvlm": tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
}


def build_pictures(model_type: str, folder: Path) -> nn.Module:
    """Write a model with random weights and its processor; gives the model."""
    from transformers import AutoModelForImageTextToText

    hints = HINTS.get(model_type, {})
    config = tiny_config(model_type, **_deep(_small_pictures(tiny_config(model_type, **hints)), hints))
    _set_tokens(IDS.get(model_type, {}), config, *_write_processor(model_type, config, folder))
    torch.manual_seed(sum(map(ord, model_type)))
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return model


def _deep(one, other):
    result = dict(one)
    for k, v in other.items():
        result[k] = _deep(result[k], v) if isinstance(v, dict) and isinstance(result.get(k), dict) else v
    return result


def _small_pictures(config: Any) -> dict[str, Any]:
    """Changes to the fields of a configuration and its parts that make pictures small."""
    from transformers import PreTrainedConfig

    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = _small_pictures(value)
        elif name == "image_size":
            changes[name] = [_IMAGE, _IMAGE] if isinstance(value, (list, tuple)) else _IMAGE
        elif name == "patch_size" and isinstance(value, (int, list, tuple)):
            changes[name] = [_PATCH, _PATCH] if isinstance(value, (list, tuple)) else _PATCH
    return {name: value for name, value in changes.items() if value != {}}


def _tokenizer(special: list[str], named: dict[str, str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_ORDINARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(special)
    own = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=4096, extra_special_tokens=named, **own
    )


def processor_class(model_type: str) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    name = _PROCESSORS.get(model_type) or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name == "PixtralProcessor" and not transformers.utils.is_torchvision_available():
        from slim_vlm.processor import _pixtral

        return _pixtral()
    return processor_class_from_name(name) if name else None


def _write_processor(model_type: str, config: Any, folder: Path) -> Any:
    """The files of tokenizer and processor, laid out as published; gives the tokenizer and named tokens."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    cls = processor_class(model_type)
    if cls is None:
        raise ValueError("transformers has no processor for it")
    listed = IMAGE_PROCESSOR_MAPPING_NAMES[_IMAGE_PROCESSORS.get(model_type, model_type)]
    wanted = "torchvision" if transformers.utils.is_torchvision_available() else "pil"
    name = str(listed.get(wanted) or next(iter(listed.values())))
    hints = IMAGES.get(model_type, {})
    settings: dict[str, Any] = {}
    try:
        image_class: Any = get_image_processor_class_from_name(name)
        settings = _image_settings(image_class(), config) | hints
        image = image_class(**settings)
    except ImportError:
        settings, image = dict(hints), None
    kind = name.removesuffix("Pil")
    settings |= {"image_processor_type": kind, "processor_class": cls.__name__}
    source = inspect.getsource(sys.modules[cls.__module__])
    own = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")
    given = TOKENS.get(model_type, {})
    attributes = {name for name in _NAMED.findall(source) if name not in own}
    if 'hasattr(tokenizer, "image_token")' in source:  # then the processor knows them by itself
        attributes = set()
    named = {name: given.get(name, f"<{name}>") for name in sorted(attributes | set(given))}
    special = ["<s>", "</s>", "<pad>", "<unk>", "<image>", *MORE.get(model_type, ()), *_SPECIAL.findall(source)]
    tokenizer = _tokenizer(list(dict.fromkeys([*special, *named.values()])), named)
    arguments = _fitting(cls, config) | ARGUMENTS.get(model_type, {})
    tokenizer.save_pretrained(folder)
    _write(folder / "preprocessor_config.json", settings)
    _write(folder / "processor_config.json", {**arguments, "processor_class": cls.__name__})
    video: dict[str, str] = {}
    if "video_processor" in cls.get_attributes():
        own_video = _VIDEOS.get(model_type) or cls.__name__.replace("Processor", "VideoProcessor")
        video["video_processor_type"] = own_video if hasattr(transformers, own_video) else "Qwen2VLVideoProcessor"
        _write(folder / "video_preprocessor_config.json", video)
    if "feature_extractor" in cls.get_attributes():
        _write(folder / "preprocessor_config.json", settings | {"feature_extractor_type": "WhisperFeatureExtractor"})
    if image is not None:
        parts = dict.fromkeys(cls.get_attributes()) | {"image_processor": image, "tokenizer": tokenizer}
        if "video_processor" in parts and wanted == "torchvision":
            parts["video_processor"] = getattr(transformers, video["video_processor_type"])()
        processor = _lenient(cls)(**parts, **arguments)
        found = {name: getattr(processor, name, None) for name in dir(processor) if name.endswith("_token")}
        named |= {name: str(token) for name, token in found.items() if isinstance(token, (str, AddedToken))}
    token = TEMPLATES.get(model_type, named.get("image_token", "<image>"))
    if token:
        (folder / "chat_template.jinja").write_text(_TEMPLATE.replace("IMAGE", token))
    return tokenizer, named


def _fitting(cls: Any, config: Any) -> dict[str, Any]:
    """Arguments of a processor that have the name of a field of the configuration."""
    arguments: dict[str, Any] = {}
    for name in inspect.signature(cls.__init__).parameters:
        value = getattr(config, name, None) or getattr(getattr(config, "vision_config", None), name, None)
        if isinstance(value, (int, str)) and not name.endswith("_token"):
            arguments[name] = value
    return arguments


def _lenient(cls: Any) -> Any:
    """The class, but parts may be None."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        return None if argument is None else cls.check_argument_for_proper_class(self, argument_name, argument)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check, "__module__": cls.__module__})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=list) + "\n", encoding="utf-8")


def _image_settings(default: Any, config: Any) -> dict[str, Any]:
    settings = {k: v for k, v in default.to_dict().items() if k not in ("image_processor_type", "processor_class")}
    for name in ("size", "crop_size", "max_image_size"):
        value = settings.get(name)
        if isinstance(value, dict):
            kept = {key: side for key, side in value.items() if side is not None}
            settings[name] = dict.fromkeys(kept, _IMAGE)
            if set(kept) == {"shortest_edge", "longest_edge"} and kept["longest_edge"] > 1e4:
                settings[name] = {"shortest_edge": 1024, "longest_edge": 3072}
    for name in ("min_pixels", "max_pixels"):
        if settings.get(name):
            settings[name] = 1024 if name == "min_pixels" else 3072
    vision = getattr(config, "vision_config", None) or config
    for name in ("patch_size", "temporal_patch_size"):
        if isinstance(settings.get(name), int):
            value = getattr(vision, name, _PATCH)
            settings[name] = value if isinstance(value, int) else value[0]
    return settings


def _set_tokens(ids: dict[str, str], config: Any, tokenizer: Any, named: dict[str, str]) -> None:
    """Ids of special tokens in a configuration are those of the tokenizer."""
    from transformers import PreTrainedConfig

    for part in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        for name in list(vars(part)):
            match = re.fullmatch(r"(\w+_token)_(id|index)", name)
            token = ids.get(name) or (named.get(match[1]) if match else None)
            if token:
                setattr(part, name, tokenizer.convert_tokens_to_ids(token))

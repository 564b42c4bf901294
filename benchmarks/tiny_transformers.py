"""Tiny instances of the diffusion transformers of diffusers, and a short call of each that one can make up.

``tiny_transformers.json`` has the arguments of their classes: ``small`` what takes the place of every argument of that
name, and what a class has beside that.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CALLS", "call_for", "config_for", "transformer_classes"]

Call = Callable[[Mapping[str, Any], Callable[..., Tensor], float], dict[str, Any]]
"""From a configuration, what draws noise of a shape, and a time step from 0 to 1000 to keyword arguments."""

TEXT, FRAMES, SIDE = 6, 2, 8


def transformer_classes() -> list[str]:
    """Names of all ``*Transformer*Model`` that diffusers exports."""
    import diffusers

    return sorted(name for name in dir(diffusers) if "Transformer" in name and name.endswith("Model"))


def config_for(name: str) -> dict[str, Any]:
    """Arguments that make a tiny instance of a class."""
    import diffusers

    every = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    small = {key: value for keys, value in every["small"].items() for key in keys.split()}
    known = inspect.signature(inspect.unwrap(getattr(diffusers, name).__init__)).parameters
    return {key: value for key, value in small.items() if key in known} | every.get(name, {})


def _picture(config: Mapping[str, Any], noise: Callable[..., Tensor], time: float) -> dict[str, Any]:
    """Latents of a picture and states of a text."""
    width = next(
        config[key]
        for key in (
            "text_embed_dim",
            "joint_attention_dim",
            "caption_channels",
            "cap_feat_dim",
            "cross_attention_dim",
            "context_in_dim",
        )
        if config.get(key)
    )
    return {
        "hidden_states": noise(1, config["in_channels"], SIDE, SIDE),
        "encoder_hidden_states": noise(1, TEXT, width),
        "timestep": torch.tensor([time]),
    }


def _tokens(config: Mapping[str, Any], noise: Callable[..., Tensor], time: float) -> dict[str, Any]:
    """Latents that are tokens, with places."""
    axes = len(config["axes_dims_rope"])
    places = torch.zeros(16, axes)
    places[:, -2:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": noise(1, 16, config["in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, config["joint_attention_dim"]),
        "timestep": torch.tensor([time / 1000]),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, axes),
    }


def _video(config: Mapping[str, Any], noise: Callable[..., Tensor], time: float) -> dict[str, Any]:
    """Latents of a video ``(batch, channels, frames, height, width)`` and states of a text."""
    width = next(config[key] for key in ("text_embed_dim", "text_dim", "caption_channels") if config.get(key))
    return {
        "hidden_states": noise(1, config["in_channels"], FRAMES, SIDE, SIDE),
        "encoder_hidden_states": noise(1, TEXT, width),
        "timestep": torch.tensor([int(time)]),
    }


def _frames_first(config: Mapping[str, Any], noise: Callable[..., Tensor], time: float) -> dict[str, Any]:
    return _video(config, noise, time) | {"hidden_states": noise(1, FRAMES, config["in_channels"], SIDE, SIDE)}


def _mask() -> Tensor:
    return torch.ones(1, TEXT, dtype=torch.int64)


_PIXELS = torch.tensor([[64.0, 64.0]])
_CORNER = torch.zeros(1, 2)

CALLS: dict[str, Call] = {
    "AceStepTransformer1DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 16, c["audio_acoustic_hidden_dim"]),
        "timestep": torch.tensor([time / 1000]),
        "timestep_r": torch.tensor([time / 1000]),
        "encoder_hidden_states": noise(1, TEXT, c["encoder_hidden_size"]),
        "context_latents": noise(1, 16, c["in_channels"] - c["audio_acoustic_hidden_dim"]),
    },
    "AllegroTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time)
        | {
            "attention_mask": torch.ones(1, FRAMES, SIDE, SIDE),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "image_rotary_emb": _allegro_rope(c),
        }
    ),
    "AnyFlowTransformer3DModel": lambda c, noise, time: (
        _frames_first(c, noise, time)
        | {"timestep": torch.full((1, FRAMES), time), "r_timestep": torch.full((1, FRAMES), time)}
    ),
    "AnyFlowFARTransformer3DModel": lambda c, noise, time: (
        _frames_first(c, noise, time)
        | {
            "timestep": torch.full((1, FRAMES), time),
            "r_timestep": torch.full((1, FRAMES), time),
            "chunk_partition": [1, 1],
        }
    ),
    "AuraFlowTransformer2DModel": lambda c, noise, time: _picture(c, noise, time / 1000),
    "BriaFibo2Transformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], SIDE, SIDE),
        "timestep": torch.tensor([time / 1000]),
        "encoder_hidden_states": noise(1, 1 + len(c["injection_layer_ids"]), TEXT, c["cap_feat_dim"]),
    },
    "BriaFiboTransformer2DModel": lambda c, noise, time: (
        _tokens(c, noise, time)
        | {
            "text_encoder_layers": [
                noise(1, TEXT, c["text_encoder_dim"]) for _ in range(c["num_layers"] + c["num_single_layers"])
            ]
        }
    ),
    "BriaTransformer2DModel": _tokens,
    "ChromaTransformer2DModel": lambda c, noise, time: (
        _tokens(c, noise, time) | {"attention_mask": torch.ones(1, TEXT + 16, dtype=torch.bool)}
    ),
    "ChronoEditTransformer3DModel": _video,
    "CogVideoXTransformer3DModel": _frames_first,
    "CogView3PlusTransformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time) | {"original_size": _PIXELS, "target_size": _PIXELS, "crop_coords": _CORNER}
    ),
    "CogView4Transformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time) | {"original_size": _PIXELS, "target_size": _PIXELS, "crop_coords": _CORNER}
    ),
    "ConsisIDTransformer3DModel": lambda c, noise, time: (
        _frames_first(c, noise, time)
        | {
            "id_cond": noise(1, c["LFE_id_dim"]),
            "id_vit_hidden": [noise(1, 9, c["LFE_vit_dim"]) for _ in range(c["LFE_num_scale"])],
        }
    ),
    "CosmosTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time) | {"timestep": torch.tensor([time / 1000])}
    ),
    "DiTTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], SIDE, SIDE),
        "timestep": torch.tensor([int(time)]),
        "class_labels": torch.tensor([3]),
    },
    "DreamLiteTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], 4, 4),
        "encoder_hidden_states": noise(1, TEXT, c["cross_attention_dim"]),
        "timestep": torch.tensor([int(time)]),
    },
    "EasyAnimateTransformer3DModel": _video,
    "ErnieImageTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], SIDE, SIDE),
        "timestep": torch.tensor([time]),
        "text_bth": noise(1, TEXT, c["text_in_dim"]),
        "text_lens": torch.tensor([TEXT]),
    },
    "Flux2Transformer2DModel": lambda c, noise, time: _tokens(c, noise, time) | {"guidance": torch.tensor([3.5])},
    # Every other call edits a picture.
    "Flux3Transformer2DModel": lambda c, noise, time: (
        _tokens(c, noise, time)
        | (
            {"image_cond_hidden_states": noise(1, 16, c["cond_in_channels"]), "image_cond_ids": torch.ones(16, 4)}
            if time % 400 == 100
            else {}
        )
    ),
    "FluxTransformer2DModel": lambda c, noise, time: (
        _tokens(c, noise, time) | {"pooled_projections": noise(1, c["pooled_projection_dim"])}
    ),
    "GlmImageTransformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time)
        | {
            "prior_token_id": torch.arange(16)[None],
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": _PIXELS,
            "crop_coords": _CORNER,
        }
    ),
    "HeliosTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time) | {"indices_hidden_states": torch.arange(FRAMES)[None]}
    ),
    "HiDreamImageTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], SIDE, SIDE),
        "timesteps": torch.tensor([int(time)]),
        "encoder_hidden_states_t5": noise(1, TEXT, 32),
        "encoder_hidden_states_llama3": noise(4, 1, TEXT, 32),
        "pooled_embeds": noise(1, 32),
    },
    "HunyuanImageTransformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time)
        | {
            "encoder_attention_mask": _mask(),
            "encoder_hidden_states_2": noise(1, TEXT, c["text_embed_2_dim"]),
            "encoder_attention_mask_2": _mask(),
        }
    ),
    "HunyuanVideo15Transformer3DModel": lambda c, noise, time: (
        _video(c, noise, time)
        | {
            "timestep": torch.tensor([time]),
            "encoder_attention_mask": _mask(),
            "encoder_hidden_states_2": noise(1, TEXT, c["text_embed_2_dim"]),
            "encoder_attention_mask_2": _mask(),
            "image_embeds": noise(1, 4, c["image_embed_dim"]),
        }
    ),
    "HunyuanVideoTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time)
        | {
            "encoder_attention_mask": _mask(),
            "pooled_projections": noise(1, c["pooled_projection_dim"]),
            "guidance": torch.tensor([6000.0]),
        }
    ),
    "HunyuanVideoFramepackTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time)
        | {
            "encoder_attention_mask": _mask(),
            "pooled_projections": noise(1, c["pooled_projection_dim"]),
            "guidance": torch.tensor([6000.0]),
            "image_embeds": noise(1, 4, c["image_proj_dim"]),
            "indices_latents": torch.arange(FRAMES),
            "latents_clean": noise(1, c["in_channels"], 1, SIDE, SIDE),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": noise(1, c["in_channels"], 2, SIDE, SIDE),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": noise(1, c["in_channels"], 4, SIDE, SIDE),
            "indices_latents_history_4x": torch.arange(4),
        }
    ),
    "Ideogram4Transformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, TEXT + 16, c["in_channels"]),
        "timestep": torch.tensor([time / 1000]),
        "encoder_hidden_states": noise(1, TEXT + 16, c["llm_features_dim"]),
        "position_ids": torch.arange(TEXT + 16)[None, :, None].expand(1, -1, 3).contiguous(),
        "segment_ids": torch.zeros(1, TEXT + 16, dtype=torch.int64),
        "indicator": torch.tensor([[3] * TEXT + [2] * 16]),
    },
    "JoyImageEditTransformer3DModel": _video,
    "JoyImageEditPlusTransformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 16, c["in_channels"], 1, 2, 2),
        "timestep": torch.tensor([int(time)]),
        "encoder_hidden_states": noise(1, TEXT, c["text_dim"]),
        "encoder_hidden_states_mask": _mask(),
        "shape_list": [[(1, 4, 4)]],
    },
    "Kandinsky5Transformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, FRAMES, SIDE, SIDE, c["in_visual_dim"]),
        "encoder_hidden_states": noise(1, TEXT, c["in_text_dim"]),
        "timestep": torch.tensor([time]),
        "pooled_projections": noise(1, c["in_text_dim2"]),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(SIDE // 2), torch.arange(SIDE // 2)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": [1.0, 1.0, 1.0],
    },
    "Kandinsky6Transformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, FRAMES, SIDE, SIDE, 2 * c["in_visual_dim"] + 1),
        "encoder_hidden_states": noise(1, TEXT, c["in_text_dim"]),
        "pooled_projections": noise(1, c["in_text_dim2"]),
        "timestep": torch.tensor([time]),
        "audio_hidden_states": noise(1, 5, c["in_audio_dim"]),
    },
    "Kandinsky6SRTransformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, FRAMES, SIDE, SIDE, 2 * c["in_visual_dim"] + 1),
        "timestep": torch.tensor([time]),
    },
    "MiniMaxH3Transformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 8, 4 * c["in_channels"]),
        "audio_hidden_states": noise(1, 4, c["audio_in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, c["text_dim"]),
        "timestep": torch.tensor([time / 1000]),
        "timestep_indices": torch.zeros(TEXT + 12, dtype=torch.int64),
        "token_tags": torch.tensor([1] * TEXT + [0] * 8 + [2] * 4),
        "position_ids": torch.arange(TEXT + 12)[:, None].expand(-1, 3).contiguous(),
        "video_indices": torch.arange(TEXT, TEXT + 8),
        "audio_indices": torch.arange(TEXT + 8, TEXT + 12),
        "text_indices": torch.arange(TEXT),
    },
    "Krea2Transformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 16, c["in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, c["num_text_layers"], c["text_hidden_dim"]),
        "timestep": torch.tensor([time / 1000]),
        "position_ids": torch.zeros(TEXT + 16, 3),
    },
    "LTXVideoTransformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 2 * 4 * 4, c["in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, c["caption_channels"]),
        "timestep": torch.tensor([time]),
        "encoder_attention_mask": _mask(),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    },
    "LTX2VideoTransformer3DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 2 * 4 * 4, c["in_channels"]),
        "audio_hidden_states": noise(1, 5, c["audio_in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, c["caption_channels"]),
        "audio_encoder_hidden_states": noise(1, TEXT, c["caption_channels"]),
        "timestep": torch.tensor([time]),
        "encoder_attention_mask": _mask(),
        "audio_encoder_attention_mask": _mask(),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
    },
    "LatteTransformer3DModel": lambda c, noise, time: _video(c, noise, time),
    "LongCatImageTransformer2DModel": _tokens,
    "Lumina2Transformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time / 1000) | {"encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool)}
    ),
    "MiniMaxMusic3Transformer1DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], 12),
        "timestep": torch.tensor([time / 1000]),
        "encoder_hidden_states": noise(1, 12, c["condition_dim"]),
    },
    "MochiTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time) | {"encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool)}
    ),
    "MotifVideoTransformer3DModel": lambda c, noise, time: _video(c, noise, time) | {"encoder_attention_mask": _mask()},
    "NucleusMoEImageTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 16, c["in_channels"]),
        "img_shapes": [(1, 4, 4)],
        "encoder_hidden_states": noise(1, TEXT, c["joint_attention_dim"]),
        "encoder_hidden_states_mask": _mask(),
        "timestep": torch.tensor([time / 1000]),
    },
    "OmniGenTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], SIDE, SIDE),
        "timestep": torch.tensor([time / 1000]),
        "input_ids": torch.arange(TEXT)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, TEXT + 17, TEXT + 17),
        "position_ids": torch.arange(TEXT + 17)[None],
    },
    "OvisImageTransformer2DModel": _tokens,
    "PRXTransformer2DModel": lambda c, noise, time: _picture(c, noise, time / 1000),
    "PixArtTransformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    ),
    "QwenImageTransformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 16, c["in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, c["joint_attention_dim"]),
        "encoder_hidden_states_mask": _mask(),
        "timestep": torch.tensor([time / 1000]),
        "img_shapes": [[(1, 4, 4)]],
    },
    "QwenImage21Transformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, 16, c["in_channels"]),
        "encoder_hidden_states": noise(1, TEXT, c["context_in_dim"]),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "timestep": torch.tensor([time / 1000]),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * TEXT + [True] * 4]),
    },
    "SD3Transformer2DModel": lambda c, noise, time: (
        _picture(c, noise, time)
        | {
            "encoder_hidden_states": noise(1, TEXT, c["joint_attention_dim"]),
            "pooled_projections": noise(1, c["pooled_projection_dim"]),
        }
    ),
    "SanaTransformer2DModel": _picture,
    "SanaVideoTransformer3DModel": _video,
    "SanaWMTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time)
        | {
            "timestep": torch.full((1, 1, FRAMES), time),
            "encoder_hidden_states": noise(1, 1, TEXT, c["caption_channels"]),
            "mask": torch.ones(1, 1, 1, TEXT, dtype=torch.int64),
        }
    ),
    "SkyReelsV2Transformer3DModel": _video,
    "Transformer2DModel": lambda c, noise, time: {
        "hidden_states": noise(1, c["in_channels"], 4, 4),
        "encoder_hidden_states": noise(1, TEXT, c["cross_attention_dim"]),
        "timestep": torch.tensor([int(time)]),
    },
    "TransformerTemporalModel": lambda c, noise, time: {
        "hidden_states": noise(4, c["in_channels"], 4, 4),
        "timestep": torch.tensor([int(time)]),
        "num_frames": 4,
    },
    "WanAnimateTransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time)
        | {
            "hidden_states": noise(1, c["in_channels"], FRAMES + 1, SIDE, SIDE),
            "encoder_hidden_states": noise(1, 512, c["text_dim"]),  # what is ahead of these is taken for a picture
            "encoder_hidden_states_image": noise(1, 5, c["image_dim"]),
            "pose_hidden_states": noise(1, c["latent_channels"], FRAMES, SIDE, SIDE),
            "face_pixel_values": noise(1, 3, 5, 16, 16),
        }
    ),
    "WanTransformer3DModel": _video,
    "WanVACETransformer3DModel": lambda c, noise, time: (
        _video(c, noise, time) | {"control_hidden_states": noise(1, c["vace_in_channels"], FRAMES, SIDE, SIDE)}
    ),
    "ZImageTransformer2DModel": lambda c, noise, time: {
        "x": [noise(c["in_channels"], 1, SIDE, SIDE)],
        "t": torch.tensor([time / 1000]),
        "cap_feats": [noise(TEXT, c["cap_feat_dim"])],
    },
}


def _allegro_rope(config: Mapping[str, Any]) -> list[Any]:
    width, count = config["attention_head_dim"] // 3, FRAMES * (SIDE // 2) ** 2
    sides = (FRAMES, SIDE // 2, SIDE // 2)
    angles = [torch.outer(torch.arange(float(side)), 1 / 100 ** (torch.arange(0, width, 2) / width)) for side in sides]
    tables = [torch.cat([angle, angle], 1) for angle in angles]
    grids = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
    return [[(table.cos(), table.sin()) for table in tables], [grid.reshape(1, count) for grid in grids]]


def call_for(name: str, config: Mapping[str, Any], number: int = 0) -> dict[str, Any]:
    """Keyword arguments of one short call; each number makes another."""
    generator = torch.Generator().manual_seed(number)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {**CALLS[name](config, noise, 900.0 - 200 * number), "return_dict": False}

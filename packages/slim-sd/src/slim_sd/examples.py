"""Small calls of transformers, made up from their configurations: with them blocks are explored without a capture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["example_call"]

_TEXT = 6  # tokens of text
_SIDE = 8  # latent pixels of a side, a multiple of every patch


def example_call(module: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    """Keyword arguments of one short call, always the same; None for a class that is not known."""
    maker = _MAKERS.get(type(module).__name__)
    if maker is None:
        return None
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return maker(config, noise)


_Noise = Callable[..., Tensor]


def _time(noise: _Noise, value: float) -> Tensor:
    return torch.full((1,), value, dtype=noise(1).dtype)


def _wan(config: Mapping[str, Any], noise: _Noise) -> dict[str, Any]:
    call = {
        "hidden_states": noise(1, config["in_channels"], 2, _SIDE, _SIDE),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, _TEXT, config["text_dim"]),
    }
    if (width := config.get("image_dim")) is not None:
        call["encoder_hidden_states_image"] = noise(1, (config.get("pos_embed_seq_len") or 514) // 2, width)
    return call


def _flux(config: Mapping[str, Any], noise: _Noise) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": noise(1, 16, config["in_channels"]),
        "encoder_hidden_states": noise(1, _TEXT, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "timestep": _time(noise, 0.5),
        "img_ids": torch.cat([torch.zeros(16, 1), places], 1),
        "txt_ids": torch.zeros(_TEXT, 3),
        **({"guidance": torch.tensor([3.5])} if config.get("guidance_embeds") else {}),
    }


def _hunyuan(config: Mapping[str, Any], noise: _Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config["in_channels"], 2, _SIDE, _SIDE),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, _TEXT, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, _TEXT, dtype=torch.int64),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        **({"guidance": _time(noise, 6000.0)} if config.get("guidance_embeds", True) else {}),
    }


def _qwen(config: Mapping[str, Any], noise: _Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 16, config["in_channels"]),
        "encoder_hidden_states": noise(1, _TEXT, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.ones(1, _TEXT, dtype=torch.int64),
        "timestep": _time(noise, 0.5),
        "img_shapes": [[(1, 4, 4)]],
    }


def _sd3(config: Mapping[str, Any], noise: _Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, config["in_channels"], _SIDE, _SIDE),
        "encoder_hidden_states": noise(1, _TEXT, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([500.0]),
    }


_MAKERS: dict[str, Callable[[Mapping[str, Any], _Noise], dict[str, Any]]] = {
    "WanTransformer3DModel": _wan,
    "FluxTransformer2DModel": _flux,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _sd3,
}

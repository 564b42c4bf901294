"""Tiny random pipelines of every diffusion model that Slim knows, written to disk offline.

``build(name, path)`` makes one from the classes of its components, with real tokenizers. Weights are drawn so that a
transformer's output has a spread of about one, as a trained model's has, and depend on the seed alone: both layouts of
a Wan model hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_components as parts
import tiny_tokenizers as tokenizers
import tiny_wan
import torch
from torch import nn

__all__ = ["NAMES", "ORIGINALS", "arguments", "build", "shrink_edited_pictures"]

_WIDTH = 32  # of text states
_TEXT: dict[str, Any] = {"joint_attention_dim": _WIDTH}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16}


def _flux(dtype: torch.dtype, sizes: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    config = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": _WIDTH}
    config |= {"guidance_embeds": True, "axes_dims_rope": (4, 4, 8), **_TEXT, **_HEADS, **sizes}
    clip, t5 = tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=parts.image_vae(channels=4),
        text_encoder=parts.clip_text(clip, _WIDTH).to(dtype),
        tokenizer=clip,
        text_encoder_2=parts.t5_encoder(t5, _WIDTH).to(dtype),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(**config).to(dtype),
    )


def _sd3(dtype: torch.dtype, sizes: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    config = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    config |= {"caption_projection_dim": 64, "pooled_projection_dim": 2 * _WIDTH, "pos_embed_max_size": 16}
    config |= {"dual_attention_layers": (0,), "qk_norm": "rms_norm", **_TEXT, **_HEADS, **sizes}
    clip, second, t5 = tokenizers.clip_tokenizer(), tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.image_vae(channels=4),
        text_encoder=parts.clip_text(clip, 16, projection=_WIDTH).to(dtype),
        tokenizer=clip,
        text_encoder_2=parts.clip_text(second, 16, projection=_WIDTH).to(dtype),
        tokenizer_2=second,
        text_encoder_3=parts.t5_encoder(t5, _WIDTH).to(dtype),
        tokenizer_3=t5,
        transformer=SD3Transformer2DModel(**config).to(dtype),
    )


def _hunyuan_video(dtype: torch.dtype, sizes: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    config = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    config |= {"text_embed_dim": _WIDTH, "pooled_projection_dim": _WIDTH, "rope_axes_dim": (4, 4, 8)}
    config |= {"mlp_ratio": 2.0, **_HEADS, **sizes}
    llama, clip = tokenizers.llama_tokenizer(), tokenizers.clip_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=parts.llama(llama, _WIDTH).to(dtype),
        tokenizer=llama,
        transformer=HunyuanVideoTransformer3DModel(**config).to(dtype),
        vae=parts.hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=parts.clip_text(clip, _WIDTH).to(dtype),
        tokenizer_2=clip,
    )


def _qwen_image(kind: str) -> Callable[[torch.dtype, dict[str, Any]], Any]:
    def make(dtype: torch.dtype, sizes: dict[str, Any]) -> Any:
        import diffusers

        config = {"in_channels": 64, "out_channels": 16, "num_layers": 2, "axes_dims_rope": (4, 4, 8)}
        config |= {**_TEXT, **_HEADS, **sizes}
        tokenizer = tokenizers.qwen_tokenizer()
        components = {
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            "vae": parts.qwen_vae(),
            "text_encoder": parts.qwen_vl(tokenizer, _WIDTH).to(dtype),
            "tokenizer": tokenizer,
            "transformer": diffusers.QwenImageTransformer2DModel(**config).to(dtype),
        }
        if kind != "QwenImagePipeline":
            components["processor"] = parts.qwen_processor(tokenizer)
        return getattr(diffusers, kind)(**components)

    return make


_MAKERS: dict[str, Callable[[torch.dtype, dict[str, Any]], Any]] = {
    **{name: tiny_wan.maker(name) for name in tiny_wan.FAMILIES},
    "flux": _flux,
    "sd3": _sd3,
    "hunyuan_video": _hunyuan_video,
    "qwen_image": _qwen_image("QwenImagePipeline"),
    "qwen_image_edit": _qwen_image("QwenImageEditPipeline"),
    "qwen_image_edit_plus": _qwen_image("QwenImageEditPlusPipeline"),
}
NAMES = tuple(_MAKERS)
ORIGINALS = tuple(tiny_wan.FAMILIES)  # those that have an original layout too


def build(
    name: str,
    path: Path,
    *,
    layout: str = "diffusers",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **sizes: Any,
) -> Path:
    """Write a tiny pipeline into a new folder.

    Args:
        name: one of ``NAMES``.
        path: the folder, made here.
        layout: ``diffusers``, or ``original`` for those of ``ORIGINALS``.
        seed: of all weights.
        dtype: of transformers, text and image encoders; VAEs are float32.
        shards: files that the weights of each transformer are split into (Diffusers: at least so many).
        sizes: arguments of the transformer's class in diffusers, such as ``num_layers``.

    Returns:
        ``path``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _MAKERS[name](dtype, sizes)
    for number, (component, module) in enumerate(sorted(pipeline.components.items())):
        if isinstance(module, nn.Module):
            parts.fill(module, 1000 * seed + number, output=component.startswith("transformer"))
    path.mkdir(parents=True)
    if layout == "original":
        tiny_wan.write_original(name, pipeline, path, shards)
        return path
    pipeline.save_pretrained(path, safe_serialization=True)
    for component in ("transformer", "transformer_2"):
        module = getattr(pipeline, component, None)
        if module is not None and shards > 1:
            (path / component / "diffusion_pytorch_model.safetensors").unlink()
            size = sum(value.nbytes for value in module.state_dict().values())
            module.save_pretrained(path / component, max_shard_size=size // shards)
    return path


def arguments(name: str, *, seed: int = 0, size: int = 32) -> dict[str, Any]:
    """Arguments of a pipeline's call that samples two steps of a tiny picture or video and returns its latents."""
    call: dict[str, Any] = {
        "prompt": "A red fox walks through fresh snow",
        "height": size,
        "width": size,
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    if name.startswith("wan"):
        call |= {"num_frames": 5, "max_sequence_length": 16, "negative_prompt": "blurred"}
    if name in tiny_wan.FROM_IMAGE or name.startswith("qwen_image_edit"):
        call["image"] = parts.picture(size, size, seed)
    if name.startswith("qwen"):
        call |= {"true_cfg_scale": 4.0, "negative_prompt": "blurred"}
    if name == "hunyuan_video":
        call |= {"num_frames": 5}
    if name in ("flux", "sd3"):
        call |= {"max_sequence_length": 16}
    return call


def shrink_edited_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipelines that edit pictures work on 32 x 32 pixels; by themselves they enlarge any to 1024 x 1024."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real: Any = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, real=real: real(32 * 32, ratio))

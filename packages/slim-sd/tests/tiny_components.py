"""Random text encoders, VAEs and processors of a few thousand parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import nn

__all__ = [
    "clip_text",
    "clip_vision",
    "fill",
    "hunyuan_vae",
    "image_vae",
    "llama",
    "picture",
    "qwen_processor",
    "qwen_vae",
    "qwen_vl",
    "t5_encoder",
    "umt5_encoder",
    "wan_vae",
]


def fill(module: nn.Module, seed: int, *, output: bool = False) -> None:
    """Draw every parameter anew: matrices keep the spread of what goes through them, gains are near one.

    Args:
        module: its parameters are overwritten; buffers, such as fixed embeddings of positions, stay.
        seed: of the draw, which depends on nothing else.
        output: it is a transformer of a pipeline; gates and tables of modulation get a spread that a trained one has.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim <= 1 or name.endswith("gamma"):
                centre = 1.0 if name.endswith(("norm.weight", "gamma")) or _is_gain(module, name) else 0.0
                parameter.copy_(centre + 0.1 * noise)
            elif "table" in name or name.endswith("modulation"):
                parameter.copy_(noise * (0.5 if output else 1.0))
            else:
                parameter.copy_(noise / math.sqrt(noise[0].numel()))


def _is_gain(module: nn.Module, name: str) -> bool:
    owner = module.get_submodule(name.rpartition(".")[0])
    return name.endswith("weight") and "norm" in type(owner).__name__.lower()


def t5_encoder(tokenizer: Any, width: int) -> Any:
    """The encoder of T5."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=_rounded(tokenizer), d_model=width, **_T5))


def umt5_encoder(tokenizer: Any, width: int) -> Any:
    """The encoder of umt5: T5 with biases of positions in every layer."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=_rounded(tokenizer), d_model=width, **_T5))


_T5: dict[str, Any] = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}


def clip_text(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    """CLIP's text encoder, with a projection if its width is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def clip_vision(width: int) -> Any:
    """CLIP's image encoder as Wan's image-to-video models have it: 16 heads, exact GELU."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 16}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14, hidden_act="gelu"))


def llama(tokenizer: Any, width: int) -> Any:
    """Llama without its head; the pipeline takes the states three layers before the end."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config)


def qwen_vl(tokenizer: Any, width: int) -> Any:
    """Qwen2.5-VL with both of its towers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": rope}
    text |= {"bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>")}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": width}
    vision |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1], "hidden_act": "silu"}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_processor(tokenizer: Any) -> Any:
    """Pictures and prompts of Qwen2.5-VL; pictures become a few dozen tokens at most."""
    from transformers import Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 3072}
    )

    class ForPictures(Qwen2VLProcessor):
        """Without torchvision there is no video processor, and none is needed."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        def save_pretrained(self, save_directory: Any, **_: Any) -> None:
            self.image_processor.save_pretrained(save_directory)
            self.tokenizer.save_pretrained(save_directory)

    ForPictures.__name__, ForPictures.__module__ = Qwen2VLProcessor.__name__, Qwen2VLProcessor.__module__
    return ForPictures(image_processor=images, tokenizer=tokenizer, video_processor=None)


def image_vae(channels: int) -> Any:
    """The VAE of FLUX and SD3, with one halving."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.36,
        shift_factor=0.11,
    )


def hunyuan_vae() -> Any:
    """HunyuanVideo's: 8 pixels and 4 frames in one latent."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def qwen_vae() -> Any:
    """Qwen-Image's: Wan2.1's VAE for single pictures, 8 pixels in one latent."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def wan_vae(channels: int) -> Any:
    """Wan2.1's (16 channels) or Wan2.2's (48, on patches of pixels)."""
    from diffusers import AutoencoderKLWan

    if channels == 16:
        return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    config: dict[str, Any] = {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "num_res_blocks": 2}
    config |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    config |= {"latents_mean": _published("MEAN"), "latents_std": _published("STD")}
    return AutoencoderKLWan(**config)


def _published(what: str) -> list[float]:
    from slim_sd.wan import vae as module

    return [float(value) for value in getattr(module, f"_{what}_48").split()]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coarse random patches, RGB."""
    generator = torch.Generator().manual_seed(1000 * seed + 100 * width + height)
    coarse = (torch.rand(4, 4, 3, generator=generator) * 255).byte().numpy()
    return Image.fromarray(coarse, "RGB").resize((width, height), Image.Resampling.BICUBIC)


def _rounded(tokenizer: Any) -> int:
    """More rows than tokens, as T5's vocabularies have them."""
    return -(-len(tokenizer) // 64) * 64

"""Tiny Wan pipelines, and how the original project lays their files out.

The original names are spelled out here once more, by plain replacement, so that a mistake in slim_sd shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny_components as parts
import tiny_tokenizers as tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["FAMILIES", "FROM_IMAGE", "maker", "original_transformer_names", "original_vae_names", "write_original"]

FAMILIES: dict[str, dict[str, Any]] = {
    "wan2_1_t2v": {"task": "t2v", "latents": 16, "transformer": {}, "shift": 5.0},
    "wan2_1_i2v": {
        "task": "i2v",
        "latents": 16,
        "transformer": {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 64},
        "shift": 5.0,
    },
    "wan2_2_t2v": {"task": "t2v", "latents": 16, "transformer": {}, "shift": 12.0, "boundary": 0.875},
    "wan2_2_i2v": {"task": "i2v", "latents": 16, "transformer": {"in_channels": 36}, "shift": 5.0, "boundary": 0.9},
    "wan2_2_ti2v": {
        "task": "ti2v",
        "latents": 48,
        "transformer": {"in_channels": 48, "out_channels": 48},
        "shift": 5.0,
    },
}
FROM_IMAGE = ("wan2_1_i2v", "wan2_2_i2v")


def maker(name: str) -> Callable[[torch.dtype, dict[str, Any]], Any]:
    """What makes the pipeline of one family, its weights not drawn yet."""

    def make(dtype: torch.dtype, sizes: dict[str, Any]) -> Any:
        from diffusers import (
            UniPCMultistepScheduler,
            WanImageToVideoPipeline,
            WanPipeline,
            WanTransformer3DModel,
        )

        family = FAMILIES[name]
        config: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 128, "num_layers": 2}
        config |= {"in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 32}
        config |= family["transformer"] | sizes
        tokenizer = tokenizers.t5_tokenizer()
        components: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": parts.umt5_encoder(tokenizer, config["text_dim"]).to(dtype),
            "vae": parts.wan_vae(family["latents"]),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=family["shift"]
            ),
            "transformer": WanTransformer3DModel(**config).to(dtype),
            "boundary_ratio": family.get("boundary"),
            "expand_timesteps": family["task"] == "ti2v",
        }
        if "boundary" in family:
            components["transformer_2"] = WanTransformer3DModel(**config).to(dtype)
        if family["task"] != "i2v":
            return WanPipeline(**components)
        if "image_dim" in family["transformer"]:
            from transformers import CLIPImageProcessor

            components["image_encoder"] = parts.clip_vision(config["image_dim"]).to(dtype)
            side = {"height": 28, "width": 28}
            components["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side)
        return WanImageToVideoPipeline(**components)

    return make


def write_original(name: str, pipeline: Any, path: Path, shards: int) -> None:
    """The files of a pipeline as the original project publishes them."""
    task = FAMILIES[name]["task"]
    folders = {"transformer": path}
    if pipeline.transformer_2 is not None:
        folders = {"transformer": path / "high_noise_model", "transformer_2": path / "low_noise_model"}
    for component, folder in folders.items():
        module = getattr(pipeline, component)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(_config(module.config, task), indent=2), encoding="utf-8")
        _write_shards(folder, original_transformer_names(module.state_dict()), shards)
    torch.save(_t5(pipeline.text_encoder.state_dict()), path / "models_t5_umt5-xxl-enc-bf16.pth")
    pipeline.tokenizer.save_pretrained(path / "google" / "umt5-xxl")
    vae = "Wan2.2_VAE.pth" if pipeline.vae.config.is_residual else "Wan2.1_VAE.pth"
    torch.save(original_vae_names(pipeline.vae.state_dict(), pipeline.vae.config), path / vae)
    if getattr(pipeline, "image_encoder", None) is not None:
        file = path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        torch.save(_clip(pipeline.image_encoder.state_dict()), file)


def _config(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": task,
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors")
        return
    names = sorted(tensors)
    placed: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[number::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file)
        placed |= dict.fromkeys(chosen, file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


_TRANSFORMER = (
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".norm_added_k.", ".norm_k_img."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),
)


def original_transformer_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ``WanTransformer3DModel`` under the names of the original project."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for theirs, ours in _TRANSFORMER:
            new = new.replace(theirs, ours)
        renamed[new] = value.detach().contiguous()
    return renamed


_T5 = (
    ("encoder.final_layer_norm", "norm"),
    ("shared.", "token_embedding."),
    ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention.", "attn."),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"),
)


def _t5(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "encoder.embed_tokens.weight":
            continue
        for theirs, ours in _T5:
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def original_vae_names(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    inside = (("norm1.", "residual.0."), ("conv1.", "residual.2."), ("norm2.", "residual.3."))
    inside += (("conv2.", "residual.6."), ("conv_shortcut.", "shortcut."))
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = re.sub(r"^quant_conv", "conv1", name)
        new = re.sub(r"^post_quant_conv", "conv2", new)
        new = (
            new.replace("coder.conv_in", "coder.conv1").replace("norm_out.", "head.0.").replace("conv_out.", "head.2.")
        )
        if "resnets." in new or re.match(r"encoder\.down_blocks\.\d+\.(conv|norm)", new):
            for theirs, ours in inside:
                new = new.replace("." + theirs, "." + ours)
        new = new.replace("mid_block.resnets.0", "middle.0").replace("mid_block.resnets.1", "middle.2")
        new = new.replace("mid_block.attentions.0", "middle.1")
        renamed[_vae_level(new, config["num_res_blocks"], config["is_residual"])] = value
    return renamed


def _vae_level(name: str, blocks: int, residual: bool) -> str:
    name = name.replace("encoder.down_blocks", "encoder.downsamples")
    if residual:
        name = re.sub(r"(downsamples\.\d+)\.resnets", r"\1.downsamples", name)
        name = re.sub(r"(downsamples\.\d+)\.downsampler", rf"\1.downsamples.{blocks}", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", r"upsamples.\1.upsamples", name)
        return re.sub(r"up_blocks\.(\d+)\.upsampler", rf"upsamples.\1.upsamples.{blocks + 1}", name)
    each = blocks + 2
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"upsamples.{int(m[1]) * each + int(m[2])}", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"upsamples.{int(m[1]) * each + blocks + 1}", name)


def _clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image half, with a head and a piece of the text half that are to be ignored."""
    plain = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    width = plain["embeddings.class_embedding"].numel()
    renamed: dict[str, Tensor] = {"log_scale": torch.tensor(1.0), "textual.norm.weight": torch.ones(8)}
    renamed["visual.head"] = torch.ones(width, 4)
    for name, value in plain.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "embeddings.class_embedding":
            renamed["visual.cls_embedding"] = value.reshape(1, 1, -1)
        elif name == "embeddings.position_embedding.weight":
            renamed["visual.pos_embedding"] = value[None]
        elif name == "embeddings.patch_embedding.weight":
            renamed["visual.patch_embedding.weight"] = value
        elif match is None:
            renamed["visual." + name.replace("pre_layrnorm", "pre_norm").replace("post_layernorm", "post_norm")] = value
        else:
            inner = {"self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
            inner |= {"layer_norm1": "norm1", "layer_norm2": "norm2"}
            begin = f"visual.transformer.{match[1]}"
            if match[2] == "self_attn.q_proj":
                of_all = [plain[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                renamed[f"{begin}.attn.to_qkv.{match[3]}"] = torch.cat(of_all)
            elif match[2] in inner:
                renamed[f"{begin}.{inner[match[2]]}.{match[3]}"] = value
    return renamed

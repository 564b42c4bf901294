"""Tiny random vision-language models in complete folders: configuration, weights, tokenizer, processor.

The files are laid out as the published checkpoints of each family are, not as transformers 5 would name things: keys of
``config.json`` that transformers has renamed since, prefixes of tensors, the axes of fused experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_families import CLIP_NAMES, FAMILIES, PREFIXES, VOCABULARY
from tiny_processors import ORDINARY, PROCESSORS, write_processor
from torch import Tensor, nn

__all__ = ["FAMILIES", "PREFIXES", "VOCABULARY", "build"]

# As transformers saves it, and as it is published.
_CLIP = (("vision_tower.", "vision_tower.vision_model."),)
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (
        ("language_model.model.blocks.", "language_model.model.layers."),
        ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
        ("model.mm_projector.pre_norm.", "mm_projector.pre_norm."),
    ),
}


def build(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    outliers: bool = False,
    layout: str = "published",
    **overrides: Any,
) -> Path:
    """Write a model of this family.

    Args:
        family: a key of ``FAMILIES``.
        folder: is made if it is not there.
        seed: of the weights. The global random numbers are left alone.
        dtype: of all floating-point weights.
        outliers: scale a few channels of the norms and of the embedding, so that a few channels of the activations are
            many times the others, as in trained models.
        layout: "published", or "resaved": fused experts with the axes that transformers 5 writes.
        overrides: fields of ``config.json`` that are to be otherwise; a dictionary goes into the one that is there,
            and a field of None is left out.

    Returns:
        ``folder``.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if layout not in ("published", "resaved"):
        raise ValueError(layout)
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.json"
    settings = _merged(FAMILIES[family], {"torch_dtype": str(dtype).removeprefix("torch."), **overrides})
    config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _randomize(model, torch.Generator().manual_seed(seed + sum(map(ord, family))))
    if outliers:
        _add_outliers(model)
    model.to(dtype).save_pretrained(folder)  # type: ignore[operator] - names go back to those of the checkpoint
    config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    _as_published(
        folder / "model.safetensors",
        renames=_CLIP if CLIP_NAMES[0] in PREFIXES[family] else _RENAMES.get(family, ()),
        turn_experts=layout == "published" and family == "qwen3_vl_moe",
    )
    write_processor(family, folder)
    assert ORDINARY + len(PROCESSORS[family].special) <= VOCABULARY
    return folder


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(settings)
    for name, value in changes.items():
        inner = result.get(name)
        result[name] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return {name: value for name, value in result.items() if value is not None or name == "sliding_window"}


def _as_published(path: Path, renames: tuple[tuple[str, str], ...], turn_experts: bool) -> None:
    """Put right what transformers does not turn back when it saves: the beginnings of some names; the axes of fused
    experts, which it has as (experts, outputs, inputs).
    """
    tensors: dict[str, Tensor] = {}
    for saved, tensor in load_file(path).items():
        begin, published = next((pair for pair in renames if saved.startswith(pair[0])), ("", ""))
        turned = turn_experts and saved.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        tensors[published + saved.removeprefix(begin)] = tensor.mT.contiguous() if turned else tensor
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Products keep the size of what they multiply; norms and biases get some variety; the rest stays as drawn."""
    seen: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in kind:
                parameter.add_(0.1 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() == 3 and "proj" in name:  # experts: (experts, outputs, inputs)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("weight") and parameter.dim() >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif parameter.dim() >= 2:  # learned positions and class tokens
                parameter.copy_(0.1 * noise)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


@torch.no_grad()
def _add_outliers(model: nn.Module) -> None:
    """A few channels, the same ones everywhere, are many times the others."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.shape[-1] % 32:
            continue
        channels = torch.tensor([5, 17, 23])
        if "norm" in type(module).__name__.lower() and weight.dim() == 1:
            weight[channels] = weight[channels].sign() * (weight[channels].abs() + 1.0) * torch.tensor([10.0, 3.0, 6.0])
        elif isinstance(module, nn.Embedding):
            weight[:, channels] *= torch.tensor([4.0, 4.0, 6.0])

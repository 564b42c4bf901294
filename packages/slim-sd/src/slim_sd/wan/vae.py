"""The VAE of the original Wan project in diffusers' ``AutoencoderKLWan``: sizes from shapes, and names.

Two architectures share the file's vocabulary. That of Wan2.1 lists residual blocks and resamplers one after the other;
that of Wan2.2 groups them by level, adds a shortcut past each level and works on 2x2 patches of pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError, UnsupportedError
from slim_sd.wan.pth_files import load_pth

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

__all__ = ["load_vae", "vae_config", "vae_names"]

# Mean and standard deviation of each of the 48 channels of Wan2.2's latents; those of Wan2.1 are diffusers' defaults.
_MEAN_48 = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
     0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
    -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
    -0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
"""
_STD_48 = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""
_STATISTICS: dict[int, dict[str, list[float]]] = {
    16: {},
    48: {
        "latents_mean": [float(value) for value in _MEAN_48.split()],
        "latents_std": [float(value) for value in _STD_48.split()],
    },
}
_REMEDY = "the file is not that of a Wan VAE, or is damaged; download it again"

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_ENDS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{part}.{theirs}": f"{part}.{ours}"
        for part in ("encoder", "decoder")
        for theirs, ours in {
            "conv1": "conv_in",
            "head.0": "norm_out",
            "head.2": "conv_out",
            "middle.1": "mid_block.attentions.0",
            **{
                f"middle.{2 * i}.{old}": f"mid_block.resnets.{i}.{new}"
                for i in (0, 1)
                for old, new in _RESIDUAL.items()
            },
        }.items()
    },
}
_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:(?:down|up)samples\.(\d+)\.)?(.+)")


@dataclass
class _Level:
    """One level of resolution: residual blocks, and what changes the resolution."""

    blocks: int = 0
    channels: int = 0
    resamples: bool = False
    in_time: bool = False


def load_vae(file: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The VAE in a file such as ``Wan2.1_VAE.pth`` or ``Wan2.2_VAE.pth``, for evaluation.

    Args:
        file: the original file.
        dtype: of the parameters; float32 is what the project itself decodes with.

    Raises:
        InvalidModelError, SecurityError: as :func:`slim_sd.wan.pth_files.load_pth`, or tensors are missing or have
            other shapes.
        UnsupportedError: another number of latent channels than 16 or 48, or attention between levels.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan

    tensors = load_pth(file)
    config = vae_config(tensors, str(file))
    names = vae_names(tensors, config)
    with init_empty_weights():
        vae = AutoencoderKLWan(**config)
    try:
        vae.load_state_dict({names[name]: value.to(dtype) for name, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise InvalidModelError(_first_problem(error), where=str(file), remedy=_REMEDY) from error
    return vae.eval().requires_grad_(False)


def vae_config(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Arguments of ``AutoencoderKLWan`` that the shapes of an original VAE's tensors imply.

    Raises:
        InvalidModelError: a tensor that says a size is missing.
        UnsupportedError: see :func:`load_vae`.
    """
    residual = any(name.startswith("encoder.downsamples.0.downsamples.") for name in tensors)
    levels = _levels(tensors, "encoder", residual, where)
    base, pixels = _shape(tensors, "encoder.conv1.weight", where)[:2]
    width = _shape(tensors, "decoder.head.0.gamma", where)[0]
    latents = _shape(tensors, "conv2.weight", where)[0]
    patch = math.isqrt(pixels // 3)
    if latents not in _STATISTICS:
        raise UnsupportedError(
            f"a VAE of {latents} latent channels; only those of 16 (Wan2.1) and 48 (Wan2.2) are known", where=where
        )
    times = [level.in_time for level in levels[:-1]]
    return {
        "base_dim": base,
        "decoder_base_dim": width * base // levels[0].channels,
        "z_dim": latents,
        "dim_mult": [level.channels // base for level in levels],
        "num_res_blocks": levels[0].blocks,
        "attn_scales": [],
        "temperal_downsample": times,
        "is_residual": residual,
        "in_channels": pixels,
        "out_channels": _shape(tensors, "decoder.head.2.weight", where)[0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(times),
        "scale_factor_spatial": 2 ** (len(levels) - 1) * max(patch, 1),
        **_STATISTICS[latents],
    }


def vae_names(names: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """The name in ``AutoencoderKLWan`` of every original name; a name of neither is kept."""
    return {name: _renamed(name, config["num_res_blocks"], config["is_residual"]) for name in names}


def _renamed(name: str, blocks: int, residual: bool) -> str:
    module, _, parameter = name.rpartition(".")
    for theirs, ours in _ENDS.items():
        if module == theirs or module.startswith(theirs + "."):
            return f"{ours}{module[len(theirs) :]}.{parameter}"
    match = _LEVEL.fullmatch(name)
    if match is None:
        return name
    part, first, second, rest = match[1], int(match[2]), match[3], match[4]
    module, _, parameter = rest.rpartition(".")
    inside = f"{_RESIDUAL[module]}.{parameter}" if module in _RESIDUAL else rest
    resnets = blocks if part == "encoder" else blocks + 1
    if residual:
        level, index = first, int(second or 0)
        place = f"resnets.{index}" if index < resnets else "downsampler" if part == "encoder" else "upsampler"
    elif part == "encoder":
        return f"encoder.down_blocks.{first}.{inside}"
    else:
        level, index = divmod(first, resnets + 1)
        place = f"resnets.{index}" if index < resnets else "upsamplers.0"
    return f"{part}.{'down' if part == 'encoder' else 'up'}_blocks.{level}.{place}.{inside}"


def _levels(tensors: Mapping[str, Tensor], part: str, residual: bool, where: str) -> list[_Level]:
    """The levels of the encoder, in the order of the file's indices."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _LEVEL.fullmatch(name)
        if match is not None and match[1] == part:
            found.setdefault((int(match[2]), int(match[3] or 0)), {})[match[4]] = value
    levels = [_Level()]
    for (first, _), entry in sorted(found.items()):
        if levels[-1].resamples or (residual and first >= len(levels)):
            levels.append(_Level())
        level = levels[-1]
        if any(name.startswith("residual.") for name in entry):
            level.blocks += 1
            level.channels = _shape(entry, "residual.2.weight", where)[0]
        elif any(name.startswith("resample.") for name in entry):
            level.resamples = True
            level.in_time = any(name.startswith("time_conv.") for name in entry)
        else:
            raise UnsupportedError(
                f"a VAE with {next(iter(entry))!r} between its residual blocks", where=where, remedy="use another VAE"
            )
    if not levels[-1].blocks or len({level.blocks for level in levels}) != 1:
        raise InvalidModelError(
            f"the {part} has levels of {', '.join(str(level.blocks) for level in levels)} residual blocks",
            where=where,
            remedy=_REMEDY,
        )
    return levels


def _shape(tensors: Mapping[str, Tensor], name: str, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise InvalidModelError(f"tensor {name!r} is missing", where=where, remedy=_REMEDY)
    shape = tuple(tensors[name].shape)
    if not shape or not all(shape):
        raise InvalidModelError(f"tensor {name!r} has the shape {list(shape)}", where=where, remedy=_REMEDY)
    return shape


def _first_problem(error: RuntimeError) -> str:
    """The line of a strict ``load_state_dict`` that names tensors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)].rstrip(".")

"""What surrounds an original Wan transformer in a pipeline: text encoder, tokenizer, image encoder, scheduler.

The encoders are those of transformers; names and sizes are taken from the tensors of the original files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError, SlimError, UnsupportedError
from slim_sd.wan.pth_files import load_pth

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

__all__ = [
    "CLIP_FILE",
    "TEXT_ENCODER_FILE",
    "TOKENIZER_FOLDER",
    "VAE_FILES",
    "Solver",
    "flow_scheduler",
    "image_processor",
    "load_image_encoder",
    "load_text_encoder",
    "load_tokenizer",
    "shift_for_size",
    "vae_file",
]

Solver = Literal["unipc", "dpm++"]

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
VAE_FILES = {16: "Wan2.1_VAE.pth", 48: "Wan2.2_VAE.pth"}  # by channels of latents
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

_CLIP_HEADS = 16  # of ViT-H/14; no shape tells them
_AGAIN = "download the file again"
_STEPS = 1000  # of training; time steps are 1000 times the level of noise

_T5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    **{f"attn.{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",  # goes through the activation
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None) -> UMT5EncoderModel:
    """The umt5 encoder of an original folder, for evaluation.

    Args:
        folder: the model folder, with ``models_t5_umt5-xxl-enc-bf16.pth``.
        dtype: of the parameters; None is that of the file, whose pages are then used where they are.

    Raises:
        InvalidModelError, SecurityError: the file is missing, truncated, not such an encoder, or refused.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    file = folder / TEXT_ENCODER_FILE
    tensors = load_pth(file)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        renamed[_t5_name(name)] = value
    sizes = _Sizes(tensors, str(file))
    vocabulary, width = sizes.of("token_embedding.weight", 2)
    inner = sizes.of("blocks.0.attn.q.weight", 2)[0]
    buckets, heads = sizes.of("blocks.0.pos_embedding.embedding.weight", 2)
    if inner % heads:
        raise InvalidModelError(f"{inner} rows of q cannot be {heads} heads", where=str(file), remedy=_AGAIN)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=sizes.of("blocks.0.ffn.fc1.weight", 2)[0],
        num_layers=_blocks(tensors, r"blocks\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    return _filled(UMT5EncoderModel, config, renamed, dtype, str(file))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of umt5 in ``google/umt5-xxl`` of an original folder.

    Raises:
        InvalidModelError: the folder is missing or no tokenizer can be read from it.
    """
    from transformers import AutoTokenizer

    path = folder / TOKENIZER_FOLDER
    if not path.is_dir():
        raise InvalidModelError(
            "the folder of the tokenizer is missing", where=str(path), remedy="download the model folder again"
        )
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise InvalidModelError(
            f"no tokenizer can be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(path),
            remedy="download the folder again",
        ) from error


def load_image_encoder(folder: Path, dtype: torch.dtype | None = None) -> CLIPVisionModel:
    """The image half of the CLIP model of an original image-to-video folder, for evaluation.

    Args:
        folder: the model folder, with ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``.
        dtype: of the parameters; None is that of the file.

    Raises:
        InvalidModelError, SecurityError: as :func:`load_text_encoder`.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    file = folder / CLIP_FILE
    tensors = {name.removeprefix("visual."): v for name, v in load_pth(file).items() if name.startswith("visual.")}
    sizes = _Sizes(tensors, str(file))
    width, channels, patch, _ = sizes.of("patch_embedding.weight", 4)
    positions = sizes.of("pos_embedding", 3)[1]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=sizes.of("transformer.0.mlp.0.weight", 2)[0],
        num_hidden_layers=_blocks(tensors, r"transformer\.(\d+)\."),
        num_attention_heads=_CLIP_HEADS,
        num_channels=channels,
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    # A projection to the space that texts share is left out: the pipeline takes the states before the last block.
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name != "head":
            renamed |= _clip_tensors(name, value)
    return _filled(CLIPVisionModel, config, renamed, dtype, str(file))


def image_processor(encoder: CLIPVisionModel) -> CLIPImageProcessor:
    """What the Diffusers layout of Wan has beside its image encoder: CLIP's own processor, at the encoder's size.

    The original project stretches the picture to the square; this one, as in every run with diffusers, crops it.
    """
    from transformers import CLIPImageProcessor

    side: Any = encoder.config.image_size
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def vae_file(folder: Path, channels: int) -> Path:
    """The VAE of an original folder, which need not be there.

    Args:
        folder: the model folder.
        channels: of the latents that the transformer makes.

    Raises:
        UnsupportedError: no Wan VAE has so many.
    """
    if channels not in VAE_FILES:
        raise UnsupportedError(
            f"latents of {channels} channels; Wan's VAEs have {' or '.join(str(known) for known in VAE_FILES)}",
            where=str(folder),
            remedy="out_dim in config.json may be wrong",
        )
    return folder / VAE_FILES[channels]


def flow_scheduler(solver: Solver, shift: float) -> SchedulerMixin:
    """The scheduler of flow matching that Wan samples with.

    Levels of noise s, spaced evenly over (0, 1], become shift * s / (1 + (shift - 1) * s); time steps are 1000 times
    that.

    Args:
        solver: ``unipc`` or ``dpm++``.
        shift: more of it spends more steps at high noise; 1 is none.
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}[solver]
    return kind(
        num_train_timesteps=_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=float(shift)
    )


def shift_for_size(width: int, height: int) -> float:
    """The shift by convention for a Wan2.1 video of this size in pixels: 3 up to 480p, 5 above it."""
    return 3.0 if width * height <= 832 * 480 else 5.0


class _Sizes:
    """Shapes of named tensors, with errors that name the file."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors = tensors
        self._where = where

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        found = self._tensors.get(name)
        if found is None or found.ndim != rank or not found.numel():
            problem = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise InvalidModelError(f"tensor {name!r} {problem}", where=self._where, remedy=_AGAIN)
        return tuple(found.shape)


def _blocks(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _t5_name(name: str) -> str:
    ends = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return ends.get(name, name)
    return f"encoder.block.{match[1]}.{_T5_BLOCK.get(match[2], match[2])}.weight"


def _clip_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """What one tensor is in transformers' model: renamed, without leading axes of one, q, k and v apart."""
    match = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is not None:
        begin, inner, parameter = f"encoder.layers.{match[1]}", match[2], match[3]
        if inner == "attn.to_qkv":
            parts = zip("qkv", value.chunk(3), strict=False)
            return {f"{begin}.self_attn.{letter}_proj.{parameter}": part for letter, part in parts}
        return {f"{begin}.{_CLIP_BLOCK.get(inner, inner)}.{parameter}": value}
    if name == "cls_embedding":
        return {"embeddings.class_embedding": value.flatten()}
    if name == "pos_embedding":
        return {"embeddings.position_embedding.weight": value[0]}
    ends = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm", "patch_embedding": "embeddings.patch_embedding"}
    module, _, parameter = name.rpartition(".")
    return {f"{ends.get(module, module)}.{parameter}": value}


def _filled(
    kind: Callable[..., Any], config: Any, tensors: dict[str, Tensor], dtype: torch.dtype | None, where: str
) -> Any:
    """A model of transformers with these tensors; every parameter must be among them, and nothing else."""
    model_class: Any = kind
    stored = next(iter(tensors.values())).dtype
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype or stored, output_loading_info=True
        )
    except SlimError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InvalidModelError(
            f"the tensors do not fit a {model_class.__name__}: {str(error).splitlines()[0]}",
            where=where,
            remedy=_AGAIN,
        ) from error
    for problem in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in report[f"{problem}_keys"])
        if names:
            raise InvalidModelError(
                f"{problem} tensor {names[0]!r} for a {model_class.__name__}", where=where, remedy=_AGAIN
            )
    return model.eval().requires_grad_(False)

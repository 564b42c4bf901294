"""Folders of the original Wan project: what they are, and the configuration of their transformers.

Wan2.1 has one transformer in the folder itself, Wan2.2's 14B models two of them in ``high_noise_model/`` and
``low_noise_model/``. What ``config.json`` leaves out (the widths of text and image states) is read from the shapes of
the tensors, and what it does say must agree with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.checkpoint.header import parse_object
from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError, UnsupportedError

__all__ = ["EXPERTS", "WanFamily", "family", "is_original", "transformer_config", "transformer_folders"]

EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}  # components of the pipeline

_TASKS = ("t2v", "i2v", "ti2v", "flf2v")
_REQUIRED = ("dim", "ffn_dim", "num_heads", "num_layers")
_DEFAULTS = {"in_dim": 16, "out_dim": 16, "freq_dim": 256, "text_len": 512}
# Arguments of the original class that are no choice: its published models have these values.
_FIXED: dict[str, Any] = {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}
_KNOWN = {*_REQUIRED, *_DEFAULTS, *_FIXED, "model_type", "eps", "patch_size", "text_dim"}
_DOWNLOAD = "download the folder again"


@dataclass(frozen=True)
class WanFamily:
    """What kind of original folder this is.

    Attributes:
        task: ``t2v``, ``i2v``, ``ti2v`` or ``flf2v``.
        experts: it has two transformers, for high and for low noise.
        image_encoder: the transformer attends to states of a CLIP image encoder.
        boundary_ratio: the share of the noise schedule down to which the expert of high noise works; None without
            experts. 0.875 for text, 0.9 for images, as the project's configuration says.
        default_shift: the shift of the noise schedule that its configuration names for 720p.
    """

    task: str
    experts: bool
    image_encoder: bool
    boundary_ratio: float | None
    default_shift: float


def is_original(folder: Path) -> bool:
    """Whether a folder is laid out as the original project publishes its models; never raises."""
    return any(_is_wan(candidate / "config.json") for candidate in (folder, *_expert_folders(folder).values()))


def transformer_folders(folder: Path) -> dict[str, Path]:
    """The folders of the transformers by the component of the pipeline that each is.

    Raises:
        InvalidModelError: one of two experts is missing.
    """
    experts = _expert_folders(folder)
    if not any(path.is_dir() for path in experts.values()):
        return {"transformer": folder}
    for path in experts.values():
        if not (path / "config.json").is_file():
            raise InvalidModelError(
                f"{path.name}/config.json is missing, though the other expert is there",
                where=str(folder),
                remedy="the model has two experts; download both",
            )
    return experts


def family(folder: Path) -> WanFamily:
    """What kind of model the folder holds; only ``config.json`` and headers of weights are read.

    Raises:
        InvalidModelError, UnsupportedError: as :func:`transformer_config`.
    """
    folders = transformer_folders(folder)
    first = next(iter(folders.values()))
    task = _read(first)["model_type"]
    experts = len(folders) > 1
    image_encoder = transformer_config(first).get("image_dim") is not None
    boundary = (0.9 if task == "i2v" else 0.875) if experts else None
    # wan/configs of Wan2.2: 12 for T2V-A14B, else 5; Wan2.1's command line: 5.
    return WanFamily(task, experts, image_encoder, boundary, 12.0 if experts and task == "t2v" else 5.0)


def transformer_config(folder: Path, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """The configuration of diffusers' ``WanTransformer3DModel`` for one original transformer.

    Args:
        folder: that of one transformer, see :func:`transformer_folders`.
        checkpoint: its weights, if they are open already; only shapes are looked at.

    Raises:
        InvalidModelError: ``config.json`` is missing, broken or has a wrong value, or tensors have other shapes.
        UnsupportedError: another kind of Wan model, such as VACE.
    """
    config = _read(folder)
    opened = Checkpoint(folder) if checkpoint is None else checkpoint
    try:
        shapes = {name: opened.meta(name).shape for name in opened}
    finally:
        if checkpoint is None:
            opened.close()
    where = str(folder / "config.json")
    dim = config["dim"]
    patch = _shape(shapes, "patch_embedding.weight", 5, folder)
    text = _shape(shapes, "text_embedding.0.weight", 2, folder)
    image = shapes.get("img_emb.proj.0.weight")
    positions = shapes.get("img_emb.emb_pos")
    for field, said, found in (
        ("dim", dim, patch[0]),
        ("in_dim", config["in_dim"], patch[1]),
        ("patch_size", tuple(config.get("patch_size", patch[2:])), tuple(patch[2:])),
        ("text_dim", config.get("text_dim", text[1]), text[1]),
        ("ffn_dim", config["ffn_dim"], _shape(shapes, "blocks.0.ffn.0.weight", 2, folder)[0]),
        ("freq_dim", config["freq_dim"], _shape(shapes, "time_embedding.0.weight", 2, folder)[1]),
        ("num_layers", config["num_layers"], _layers(shapes)),
        (
            "out_dim",
            config["out_dim"] * patch[2] * patch[3] * patch[4],
            _shape(shapes, "head.head.weight", 2, folder)[0],
        ),
    ):
        if said != found:
            raise InvalidModelError(
                f"{field} says {said}, the weights say {found}" + (" (times the patch)" if field == "out_dim" else ""),
                where=where,
                remedy="config.json and weights belong to different models",
            )
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(patch[2:]),
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": dim // config["num_heads"],
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": text[1],
        "freq_dim": config["freq_dim"],
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config["eps"],
        "image_dim": None if image is None else image[0],
        "added_kv_proj_dim": None if image is None else dim,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None if positions is None else positions[1],
    }


def _expert_folders(folder: Path) -> dict[str, Path]:
    return {component: folder / name for component, name in EXPERTS.items()}


def _is_wan(path: Path) -> bool:
    try:
        config = parse_object(path.read_bytes())
    except (OSError, ValueError):
        return False
    return config.get("_class_name") == "WanModel" or {"dim", "ffn_dim", "num_heads", "num_layers"} <= set(config)


def _read(folder: Path) -> dict[str, Any]:
    """``config.json`` with its defaults, every field checked."""
    path = folder / "config.json"
    where = str(path)
    try:
        config = parse_object(path.read_bytes())
    except FileNotFoundError:
        raise InvalidModelError("config.json is missing", where=str(folder), remedy=_DOWNLOAD) from None
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=where, remedy=_DOWNLOAD) from error
    except ValueError as error:
        raise InvalidModelError(f"not a JSON object: {error}", where=where, remedy=_DOWNLOAD) from error
    if config.get("_class_name", "WanModel") != "WanModel":
        raise UnsupportedError(
            f"_class_name is {config['_class_name']!r}; of the original Wan models only WanModel is known",
            where=where,
            remedy="use the Diffusers layout of the model",
        )
    task = config.get("model_type", "t2v")
    if task not in _TASKS:
        raise UnsupportedError(
            f"model_type {task!r} is none of {', '.join(_TASKS)}", where=where, remedy="use one of the known models"
        )
    unknown = sorted(name for name in config if name not in _KNOWN and not name.startswith("_"))
    if unknown:
        raise UnsupportedError(f"unknown field {unknown[0]!r}", where=where, remedy="the model is newer than Slim")
    for name in (*_REQUIRED, *_DEFAULTS):
        config[name] = _count(config.get(name, _DEFAULTS.get(name)), name, where)
    for name, only in _FIXED.items():
        value = config.get(name, only)
        if (list(value) if isinstance(value, tuple) else value) != only:
            raise UnsupportedError(f"{name} is {value!r}; diffusers' model only knows {only!r}", where=where)
    if config["dim"] % config["num_heads"]:
        raise InvalidModelError(
            f"dim {config['dim']} is no multiple of num_heads {config['num_heads']}", where=where, remedy=_DOWNLOAD
        )
    return config | {"model_type": task, "eps": _epsilon(config.get("eps", 1e-6), where)} | _optional(config, where)


def _optional(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "text_dim" in config:
        found["text_dim"] = _count(config["text_dim"], "text_dim", where)
    if "patch_size" in config:
        patch = config["patch_size"]
        if not isinstance(patch, list) or len(patch) != 3:
            raise InvalidModelError(f"patch_size must be three numbers, not {patch!r}", where=where, remedy=_DOWNLOAD)
        found["patch_size"] = [_count(size, "patch_size", where) for size in patch]
    return found


def _count(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        problem = "is missing" if value is None else f"must be a positive whole number, not {value!r}"
        raise InvalidModelError(f"{name} {problem}", where=where, remedy=_DOWNLOAD)
    return value


def _epsilon(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InvalidModelError(f"eps must be a number between 0 and 1, not {value!r}", where=where, remedy=_DOWNLOAD)
    return float(value)


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int, folder: Path) -> tuple[int, ...]:
    if name not in shapes or len(shapes[name]) != rank:
        problem = f"has {len(shapes[name])} dimensions, not {rank}" if name in shapes else "is missing"
        raise InvalidModelError(
            f"tensor {name!r} {problem}", where=str(folder), remedy="not the weights of a Wan model"
        )
    return tuple(shapes[name])


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    numbers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return len(numbers)

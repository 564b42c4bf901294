"""The pipeline that a diffusion model runs in, around transformers that are open already.

Everything else is loaded here, component by component, from the folder alone: text encoders, tokenizers, VAE,
scheduler. Weights come from safetensors, those of original Wan folders from ``.pth`` files that are read as data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slim_core.errors import InvalidModelError, UnexpectedError, UnsupportedError
from slim_sd.pipeline.components import load_component, quiet_libraries
from slim_sd.pipeline.folders import layout_of, pipeline_index, transformer_folders
from slim_sd.wan import files as wan_files
from slim_sd.wan import parts as wan_parts
from slim_sd.wan.parts import Solver
from slim_sd.wan.vae import load_vae

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["build_pipeline"]

_AGAIN = "download the folder again"


def build_pipeline(
    folder: Path,
    transformers: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype | None = None,
    solver: Solver | None = None,
    shift: float | None = None,
    from_image: bool = False,
) -> DiffusionPipeline:
    """The pipeline of a model folder in either layout, ready to be called, on the CPU.

    Args:
        folder: the model folder.
        transformers: modules for exactly the components that :func:`slim_sd.pipeline.folders.transformer_folders`
            names; they are used as they are.
        dtype: of text and image encoders and of the VAE; None is what their files are stored in. The VAE of Wan is
            always float32.
        solver: ``unipc`` or ``dpm++`` instead of the model's own scheduler, Wan only.
        shift: of the noise schedule, instead of the folder's own; for original folders, which name none,
            :attr:`slim_sd.wan.files.WanFamily.default_shift` holds.
        from_image: for Wan2.2 TI2V, which does both: the pipeline that begins with a picture.

    Raises:
        InvalidModelError: the folder is no diffusion model, or a component is missing, incomplete or broken.
        SecurityError: a ``.pth`` file holds more than tensors.
        UnsupportedError: a component or pipeline that is not one of diffusers, or a choice that it does not have.
    """
    expected = transformer_folders(folder)
    if set(transformers) != set(expected):
        raise UnexpectedError(
            f"transformers {sorted(transformers)} were given for {sorted(expected)}", remedy="report this as a bug"
        )
    with quiet_libraries():
        if layout_of(folder) == "original":
            return _original(folder, transformers, dtype, solver or "unipc", shift, from_image)
        return _diffusers(folder, transformers, dtype, solver, shift, from_image)


def _original(
    folder: Path,
    transformers: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    solver: Solver,
    shift: float | None,
    from_image: bool,
) -> DiffusionPipeline:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    family = wan_files.family(folder)
    _check_image(from_image, family.task == "ti2v", folder)
    config = wan_files.transformer_config(next(iter(wan_files.transformer_folders(folder).values())))
    vae = wan_parts.vae_file(folder, config["out_channels"])
    parts: dict[str, Any] = {
        "tokenizer": wan_parts.load_tokenizer(folder),
        "text_encoder": wan_parts.load_text_encoder(folder, dtype),
        "vae": load_vae(vae),
        "scheduler": wan_parts.flow_scheduler(solver, family.default_shift if shift is None else shift),
        "boundary_ratio": family.boundary_ratio,
        "expand_timesteps": family.task == "ti2v",
        "transformer_2": None,
        **transformers,
    }
    _check_width(parts["text_encoder"].config.d_model, config["text_dim"], folder / wan_parts.TEXT_ENCODER_FILE)
    _check_width(parts["vae"].config.z_dim, config["out_channels"], vae)
    if family.task not in ("i2v", "flf2v") and not from_image:
        return WanPipeline(**parts)
    if family.image_encoder:
        parts["image_encoder"] = wan_parts.load_image_encoder(folder, dtype)
        _check_width(parts["image_encoder"].config.hidden_size, config["image_dim"], folder / wan_parts.CLIP_FILE)
        parts["image_processor"] = wan_parts.image_processor(parts["image_encoder"])
    return WanImageToVideoPipeline(**parts)


def _diffusers(
    folder: Path,
    transformers: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    solver: Solver | None,
    shift: float | None,
    from_image: bool,
) -> DiffusionPipeline:
    import diffusers
    from diffusers import WanImageToVideoPipeline, WanPipeline

    index = pipeline_index(folder)
    where = str(folder / "model_index.json")
    kind: Any = getattr(diffusers, index["_class_name"], None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no pipeline {index['_class_name']!r}",
            where=where,
            remedy="install the version of diffusers that the model was published for",
        )
    _check_image(from_image, kind is WanPipeline and bool(index.get("expand_timesteps")), folder)
    if from_image:
        kind = WanImageToVideoPipeline
    wan = kind.__name__.startswith("Wan")
    components: dict[str, Any] = {**transformers}
    for name, entry in index.items():
        if isinstance(entry, list) and not name.startswith("_") and name not in components:
            single = torch.float32 if wan and name == "vae" else dtype
            components[name] = load_component(folder / name, entry[0], entry[1], single)
    components["scheduler"] = _rescheduled(components.get("scheduler"), solver, shift, str(folder / "scheduler"))
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **components)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise InvalidModelError(
            f"{kind.__name__} cannot be built from its components: {_line(error)}", where=where, remedy=_AGAIN
        ) from error


def _check_width(found: int, expected: int, file: Path) -> None:
    if found != expected:
        raise InvalidModelError(
            f"makes states of {found} channels, and the transformer takes {expected}",
            where=str(file),
            remedy="the file belongs to another model",
        )


def _check_image(asked: bool, possible: bool, folder: Path) -> None:
    if asked and not possible:
        raise UnsupportedError(
            "only a TI2V model can begin with a picture or without one", where=str(folder), remedy="leave it out"
        )


def _rescheduled(scheduler: Any, solver: Solver | None, shift: float | None, where: str) -> Any:
    """The scheduler with another solver or shift."""
    if scheduler is None or (solver is None and shift is None):
        return scheduler
    settings = dict(scheduler.config)
    if settings.get("use_flow_sigmas") and "flow_shift" in settings:  # UniPC and DPM-Solver++, as Wan has them
        if solver is not None:
            return wan_parts.flow_scheduler(solver, settings["flow_shift"] if shift is None else shift)
        return type(scheduler).from_config(settings, flow_shift=float(shift or 1.0))
    name = type(scheduler).__name__
    if solver is not None:
        raise UnsupportedError(
            f"the solver cannot be chosen: this model samples with {name}", where=where, remedy="leave the solver out"
        )
    if "shift" not in settings or settings.get("use_dynamic_shifting"):
        raise UnsupportedError(
            f"{name} takes no shift"
            + (", it depends on the size of the picture" if settings.get("use_dynamic_shifting") else ""),
            where=where,
            remedy="leave the shift out",
        )
    return type(scheduler).from_config(settings, shift=float(shift or 1.0))


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

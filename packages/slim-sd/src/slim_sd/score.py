"""Scoring of diffusion models: what the quantized files generate against what the original does, from equal noise."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slim_core.devices import resolve_devices
from slim_core.errors import InvalidModelError, SchemaValidateError, UnsupportedError
from slim_core.evaluation.report.data import finite
from slim_core.model.streamed import StreamedModel
from slim_core.progress import Progress
from slim_core.recipe import Recipe, load_recipe, recipe_from_dict
from slim_core.runners.simulated import simulated, simulating_taps
from slim_core.savers.mindie_folder import open_quantized
from slim_core.savers.quantized_folder import QuantizedFolder
from slim_core.service import EvalRequest
from slim_sd.calibration import expert_name
from slim_sd.pipeline.generation import planned_generation
from slim_sd.pipeline.sampling import Sampler
from slim_sd.recipe import SpecSd
from slim_sd.score_report import check_report_folder, write_score_report

__all__ = ["DiffusionScores", "StepScore", "score"]


@dataclass(frozen=True)
class StepScore:
    """How near the latents of both runs are after a sampling step, in decibels.

    Args:
        sqnr_db: power of the original's latents over that of the difference.
        psnr_db: the square of their range over the mean square of the difference.
    """

    sqnr_db: float
    psnr_db: float


@dataclass(frozen=True)
class DiffusionScores:
    """What the quantized files generate against the original.

    Args:
        steps: after every sampling step; the last is what is decoded.
        psnr_db: of the decoded pictures, whose values go from 0 to 1; None if the pipeline decodes none.
        frames: how many pictures that are.
        layers: how many linears were simulated.
    """

    steps: tuple[StepScore, ...]
    psnr_db: float | None
    frames: int
    layers: int

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of a table for people."""
        rows = [
            [str(number), _decibel(step.sqnr_db), _decibel(step.psnr_db)] for number, step in enumerate(self.steps, 1)
        ]
        if self.psnr_db is not None:
            rows.append([f"decoded ({self.frames} frames)", "", _decibel(self.psnr_db)])
        rows.append(["quantized linears", str(self.layers), ""])
        return ["step", "latents SQNR (dB)", "PSNR (dB)"], rows

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        steps = [{name: finite(value) for name, value in asdict(step).items()} for step in self.steps]
        return {"steps": steps, "psnr_db": finite(self.psnr_db), "frames": self.frames, "layers": self.layers}


def score(request: EvalRequest, progress: Progress) -> DiffusionScores:
    """Generate twice from the same noise, with the original and with the files written for it, and compare.

    As in MindIE-SD, quantized linears and attentions come from the files and everything else from the original.

    Raises:
        SchemaValidateError: nothing says what to compare or what to generate, or it does not fit the model.
        InvalidModelError: the files were written for another model.
    """
    if request.text is not None:
        raise SchemaValidateError("a diffusion model is not scored on text", where="--text", remedy="leave it out")
    if request.quantized is None:
        raise SchemaValidateError(
            "a diffusion model is scored by comparing what its quantized files generate",
            where="--quantized",
            remedy="give the folder that slim quant wrote",
        )
    if request.report is not None:
        check_report_folder(request.report)
    recipe = _recipe(request, request.quantized)
    spec = recipe.spec(SpecSd)
    generation = planned_generation(request.model_path, recipe, spec)
    devices = resolve_devices(request.device, explicit="device" in request.model_fields_set)
    names = spec.multimodal_sd_config.tensor_names
    steps = int(generation.arguments.get("num_inference_steps") or 0) or 1
    with ExitStack() as stack:
        sampler = stack.enter_context(Sampler(request.model_path, generation, devices.first, names))
        progress.start("Generating", {"original": steps, "quantized": steps})
        stack.callback(progress.stop)
        progress.begin("original")
        original = _Run(sampler)
        progress.done("original")
        progress.begin("quantized")
        layers = 0
        for component, model in sampler.models.items():
            folder = _folder_of(request.quantized, component, len(sampler.models))
            layers += stack.enter_context(_quantized(model, folder, devices.first))
        quantized = _Run(sampler)
        progress.done("quantized")
    scores = DiffusionScores(
        tuple(_step(first, second) for first, second in zip(original.latents, quantized.latents, strict=True)),
        _picture_psnr(original.decoded, quantized.decoded),
        0 if original.frames is None else len(original.frames),
        layers,
    )
    if request.report is not None:
        frames = (original.frames, quantized.frames)
        write_score_report(request.report, scores, generation, frames, request.quantized)
    return scores


class _Run:
    """One generation: the latents after every step and what they are decoded to."""

    def __init__(self, sampler: Sampler) -> None:
        self.latents: list[Tensor] = []
        options: dict[str, Any] = {}
        if "callback_on_step_end" in inspect.signature(sampler.pipeline.__call__).parameters:
            options["callback_on_step_end"] = self._keep
        made = sampler.generate("np" if getattr(sampler.pipeline, "vae", None) is not None else "latent", **options)
        self.decoded = torch.as_tensor(made).float() if not isinstance(made, list) else None
        if not self.latents and self.decoded is not None:
            self.latents = [self.decoded]

    def _keep(self, pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        self.latents.append(given["latents"].detach().float().cpu().clone())
        return {}

    @property
    def frames(self) -> Tensor | None:
        """Pictures ``(frames, height, width, 3)`` with values from 0 to 1."""
        if self.decoded is None or self.decoded.shape[-1] != 3:
            return None
        return self.decoded.reshape(-1, *self.decoded.shape[-3:])


def _recipe(request: EvalRequest, quantized: Path) -> Recipe:
    """What to generate: the given recipe, or the one that lies in the quantized folder; another prompt if asked."""
    if request.config_path is not None:
        path = request.config_path
    else:
        found = sorted([*quantized.glob("*_best_practice.yaml"), *quantized.glob("*/*_best_practice.yaml")])
        if not found:
            raise SchemaValidateError(
                "nothing says what to generate: the folder holds no *_best_practice.yaml",
                where=str(quantized),
                remedy="give a recipe with --config_path",
            )
        path = found[0]
    recipe = load_recipe(path)
    if request.prompt is None:
        return recipe
    config = dict(recipe.raw_spec.get("multimodal_sd_config") or {})
    name = "inference_config" if "inference_config" in config else "model_config"
    config[name] = {**(config.get(name) or {}), "prompt": request.prompt}
    spec = {**recipe.raw_spec, "multimodal_sd_config": config}
    return recipe_from_dict({"apiversion": recipe.apiversion, "spec": spec}, str(path))


def _folder_of(quantized: Path, component: str, count: int) -> QuantizedFolder:
    return open_quantized(quantized if count == 1 else quantized / expert_name(component))


@contextmanager
def _quantized(model: StreamedModel, folder: QuantizedFolder, device: torch.device) -> Iterator[int]:
    """Within this context a transformer computes what the files do; gives the number of its quantized linears."""
    linears = [info for unit in model.units for info in unit.linears]
    layers = {info.name: layer for info in linears if (layer := folder.layer(info.prefix)) is not None}
    known = {info.prefix for info in linears}
    if lost := sorted({prefix for prefix, _ in folder.layers()} - known):
        raise InvalidModelError(
            f"the files quantize {len(lost)} linears that the model does not have, among them {lost[0]}",
            where=str(folder.folder),
            remedy="give the folder that was written for this model",
        )
    infos = [info for unit in model.units for info in unit.attentions if not info.problem]
    attentions = {info.name: found for info in infos if (found := folder.attention(info)) is not None}
    if unknown := sorted(folder.attentions() - {info.prefix for info in infos}):
        raise UnsupportedError("the files quantize an attention whose states cannot be reached", where=unknown[0])
    if not layers and not attentions:
        raise InvalidModelError(
            "nothing in this folder is quantized", where=str(folder.folder), remedy="give a quantized folder"
        )
    with simulated(model.module, layers, device), model.tapped(simulating_taps(attentions, device)):
        yield len(layers)


def _step(original: Tensor, quantized: Tensor) -> StepScore:
    difference = (original - quantized).double()
    noise = float(difference.square().mean())
    span = float(original.max() - original.min())
    return StepScore(_ratio_db(float(original.double().square().mean()), noise), _ratio_db(span * span, noise))


def _picture_psnr(original: Tensor | None, quantized: Tensor | None) -> float | None:
    if original is None or quantized is None or original.shape[-1] != 3:
        return None
    return _ratio_db(1.0, float((original - quantized).double().square().mean()))


def _ratio_db(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f}"

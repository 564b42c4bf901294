"""Planning, running and scoring of ``modelslim_v1``: from a request to a finished folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from slim_core.checkpoint.staging import check_target
from slim_core.devices import Devices, resolve_devices
from slim_core.errors import InvalidDatasetError, InvalidModelError
from slim_core.evaluation.perplexity import EvalResult, evaluate
from slim_core.evaluation.report import write_report
from slim_core.fingerprint import fingerprint
from slim_core.model.units import StreamedModel
from slim_core.progress import Progress
from slim_core.recipe import Recipe, SpecV1, dump_recipe
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.run import RunResult, run_plan
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.side_files import write_text
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.calibration import find_dataset, read_samples, tokenize
from slim_llm.models.loading import open_model, open_skeleton, open_tokenizer, read_config

__all__ = ["plan", "quantize", "score"]


class _Job:
    """What planning and running share; each part is made when it is first needed."""

    def __init__(self, request: QuantRequest, recipe: Recipe) -> None:
        self.request = request
        self.recipe = recipe
        self.spec: SpecV1 = recipe.spec()

    @cached_property
    def devices(self) -> Devices:
        return resolve_devices(self.request.device, explicit="device" in self.request.model_fields_set)

    @cached_property
    def model(self) -> StreamedModel:
        return open_model(self.request.model_path, trust_remote_code=self.request.trust_remote_code)

    @cached_property
    def calibration(self) -> list[dict[str, Any]]:
        samples = read_samples(find_dataset(self.spec.dataset.path))
        tokenizer = open_tokenizer(self.request.model_path, trust_remote_code=self.request.trust_remote_code)
        inputs = tokenize(samples, tokenizer, self.spec.dataset, max_positions(self.model))
        check_token_ids(self.model, inputs)
        return inputs

    @cached_property
    def plan(self) -> Plan:
        plan = make_plan(self.model, self.spec, self.devices)
        if not plan.needs_data:
            return plan
        tokens = sum(inputs["input_ids"].numel() for inputs in self.calibration)
        return make_plan(self.model, self.spec, self.devices, activation_bytes=tokens * token_bytes(self.model))


def plan(request: QuantRequest, recipe: Recipe) -> Plan:
    """The plan of a run; reads the recipe, the model's headers and, if it is needed, the calibration set."""
    return _Job(request, recipe).plan


def quantize(
    request: QuantRequest, recipe: Recipe, progress: Progress, on_plan: Callable[[Plan], None] | None = None
) -> RunResult:
    """Carry out a recipe; ``on_plan`` is shown the plan before any weight is read.

    Raises:
        SlimError: whatever stands in the way; nothing at ``save_path`` has changed then.
    """
    check_target(request.save_path, request.model_path, request.overwrite)
    job = _Job(request, recipe)
    if on_plan is not None:
        on_plan(job.plan)
    effective = dump_recipe(recipe)

    def finish(folder: Path, result: RunResult) -> None:
        write_text(folder / f"{safe_name(request.model_type)}_best_practice.yaml", effective)
        write_report(folder, job.plan, result, title=request.model_type, debug=request.debug)

    tokens = [inputs["input_ids"].tolist() for inputs in job.calibration] if job.plan.needs_data else []
    return run_plan(
        job.model,
        job.plan,
        request.save_path,
        fingerprint=fingerprint(request.model_path, job.model.source, effective, [tokens, job.devices.kind]),
        progress=progress,
        calibration=lambda: job.calibration,
        propagate=job.spec.propagate,
        resume=request.resume,
        finish=finish,
    )


def score(request: EvalRequest, progress: Progress) -> EvalResult:
    """Perplexity of a model and, if ``request.quantized`` is given, of the files written for it."""
    devices = resolve_devices(request.device, explicit="device" in request.model_fields_set)
    trust = request.trust_remote_code
    model = open_model(request.model_path, trust_remote_code=trust)
    tokenizer = open_tokenizer(request.model_path, trust_remote_code=trust)
    inputs = windows(request, tokenizer, max_positions(model))
    check_token_ids(model, inputs)
    quantized = None
    if request.quantized is not None:
        folder = AscendV1Folder(request.quantized)
        quantized = (open_written(model, folder, trust), folder)
    return evaluate(model, inputs, devices.first, progress, quantized)


def open_written(original: StreamedModel, folder: AscendV1Folder, trust_remote_code: bool) -> StreamedModel:
    """The model over the files that were written for it."""
    config = read_config(folder.folder)
    module = open_skeleton(folder.folder, config, trust_remote_code=trust_remote_code)
    skip = frozenset(f"{prefix}.{part}" for prefix, _ in folder.layers() for part in ("weight", "bias"))
    return StreamedModel(module, folder.source, folder.folder, config, original.blocks_name, original.tensor_name, skip)


def max_positions(model: StreamedModel) -> int | None:
    """The longest sequence that the model's configuration allows."""
    text = model.config.get("text_config") or model.config
    value = text.get("max_position_embeddings") or text.get("n_positions")
    return value if isinstance(value, int) else None


def check_token_ids(model: StreamedModel, inputs: list[dict[str, Any]]) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        InvalidModelError: the tokenizer belongs to another model.
    """
    rows = model.module.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    largest = max(int(given["input_ids"].max()) for given in inputs)
    if largest >= rows:
        raise InvalidModelError(
            f"the tokenizer gives id {largest}, but the model has {rows} embeddings",
            where=str(model.folder),
            remedy="copy the tokenizer that belongs to the model",
        )


def token_bytes(model: StreamedModel) -> int:
    """Bytes of one token's hidden state between two blocks."""
    text = model.config.get("text_config") or model.config
    hidden = text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 0
    return int(hidden) * (model.dtype or torch.float32).itemsize


def safe_name(model_type: str) -> str:
    """A model type as part of a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model_type)


def windows(request: EvalRequest, tokenizer: Any, limit: int | None) -> list[dict[str, Any]]:
    """The text to score, cut into windows of equal length; what is left over at the end makes a shorter one."""
    if request.text is None:
        raise InvalidDatasetError("no text to score", where="--text", remedy="give a UTF-8 text file")
    try:
        text = request.text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDatasetError(f"cannot be read as UTF-8 text: {error}", where=str(request.text)) from error
    ids = tokenizer(text)["input_ids"]
    length = min(request.sequence_length, limit or request.sequence_length)
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    parts = [part for part in parts if len(part) > 1][: request.max_windows]
    if not parts:
        raise InvalidDatasetError("the text is empty", where=str(request.text))
    return [{"input_ids": torch.tensor([part]), "use_cache": False} for part in parts]

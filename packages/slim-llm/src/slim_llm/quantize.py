"""Planning, running and scoring of ``modelslim_v1``: from a request to a finished folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from slim_core.checkpoint.joined import JoinedSource
from slim_core.checkpoint.staging import check_target
from slim_core.devices import Devices, resolve_devices
from slim_core.errors import InvalidDatasetError, InvalidModelError, UnsupportedError
from slim_core.evaluation.perplexity import EvalResult, evaluate
from slim_core.evaluation.report import write_report
from slim_core.fingerprint import fingerprint
from slim_core.model.biases import take_stored_biases
from slim_core.model.units import StreamedModel
from slim_core.progress import Progress
from slim_core.recipe import Recipe, SpecV1, dump_recipe
from slim_core.recipe.schema import DatasetConfig
from slim_core.rotation.inputs import install, read_input_rotations
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.plan_experts import ExtraSamples
from slim_core.runners.run import RunResult, run_plan
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.side_files import write_text
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.calibration import find_dataset, read_samples, tokenize, tokenize_extra
from slim_llm.models.attention import Attentions
from slim_llm.models.loading import open_model, open_skeleton, open_tokenizer, read_config

__all__ = ["Remarks", "plan", "quantize", "score"]

_EXAMPLE_TOKENS = 24
Remarks = Callable[[Plan], list[str]]
"""Warnings about a plan that only the caller knows of."""


class _Job:
    """What planning and running share; each part is made when it is first needed."""

    def __init__(self, request: QuantRequest, recipe: Recipe, remarks: Remarks | None = None) -> None:
        self.request = request
        self.recipe = recipe
        self.remarks = remarks
        self.spec: SpecV1 = recipe.spec()
        self._calibrations: dict[DatasetConfig, list[dict[str, Any]]] = {}

    @cached_property
    def devices(self) -> Devices:
        return resolve_devices(self.request.device, explicit="device" in self.request.model_fields_set)

    @cached_property
    def model(self) -> StreamedModel:
        return open_model(self.request.model_path, trust_remote_code=self.request.trust_remote_code)

    def calibration(self, dataset: DatasetConfig) -> list[dict[str, Any]]:
        """The inputs that a calibration set makes; read once."""
        if dataset not in self._calibrations:
            samples = read_samples(find_dataset(dataset.path))
            inputs = tokenize(samples, self.tokenizer, dataset, max_positions(self.model))
            check_token_ids(self.model, inputs)
            self._calibrations[dataset] = inputs
        return self._calibrations[dataset]

    @cached_property
    def tokenizer(self) -> Any:
        return open_tokenizer(self.request.model_path, trust_remote_code=self.request.trust_remote_code)

    @cached_property
    def extra(self) -> list[dict[str, Any]]:
        """The inputs of the extra samples, for experts that too few tokens reach."""
        dataset = self.spec.dataset
        samples = read_samples(find_dataset(dataset.path))  # again: to keep them all would take more than to read them
        main = self.calibration(dataset)
        inputs = tokenize_extra(samples, self.tokenizer, dataset, max_positions(self.model), main)
        check_token_ids(self.model, inputs)
        return inputs

    def extra_samples(self) -> ExtraSamples:
        """How many they are."""
        tokens = sum(inputs["input_ids"].numel() for inputs in self.extra)
        return ExtraSamples(sum(len(inputs["input_ids"]) for inputs in self.extra), tokens * token_bytes(self.model))

    @cached_property
    def plan(self) -> Plan:
        plan = self._plan()
        if self.remarks is not None:
            plan.warnings[:0] = self.remarks(plan)
        return plan

    def _plan(self) -> Plan:
        return make_plan(
            self.model,
            self.spec,
            self.devices,
            activation_bytes=lambda: self._activation_bytes(self.spec.dataset),
            largest_forward=self._largest_forward,
            stage_bytes=self._activation_bytes,
            extra_samples=self.extra_samples,
            example=lambda: example_input(self.model),
            force=self.request.force,
            budget=self.request.memory_budget,
        )

    def _activation_bytes(self, dataset: DatasetConfig) -> int:
        tokens = sum(inputs["input_ids"].numel() for inputs in self.calibration(dataset))
        return tokens * token_bytes(self.model)

    def _largest_forward(self) -> int:
        return max(inputs["input_ids"].numel() for inputs in self.calibration(self.spec.dataset))

    def data(self) -> list[Any]:
        """The tokens of everything that is calibrated on."""
        datasets = [stage.dataset for stage in self.plan.stages] + [self.spec.dataset] * self.plan.needs_data
        quota = self.plan.experts.quota
        extra = [self.extra] if quota is not None and quota.extra.count else []
        sets = [*(self.calibration(dataset) for dataset in datasets), *extra]
        return [[inputs["input_ids"].tolist() for inputs in given] for given in sets]


def plan(request: QuantRequest, recipe: Recipe, *, remarks: Remarks | None = None) -> Plan:
    """The plan of a run.

    Reads the recipe, the model's headers and, if they are needed, the calibration set and one block of every kind.

    Args:
        remarks: gives warnings to put before those of the plan.
    """
    return _Job(request, recipe, remarks).plan


def quantize(
    request: QuantRequest,
    recipe: Recipe,
    progress: Progress,
    on_plan: Callable[[Plan], None] | None = None,
    *,
    remarks: Remarks | None = None,
) -> RunResult:
    """Carry out a recipe; ``on_plan`` is shown the plan before that begins.

    Args:
        remarks: gives warnings to put before those of the plan.

    Raises:
        SlimError: whatever stands in the way; nothing at ``save_path`` has changed then.
    """
    check_target(request.save_path, request.model_path, request.overwrite)
    job = _Job(request, recipe, remarks)
    if on_plan is not None:
        on_plan(job.plan)
    effective = dump_recipe(recipe)

    def finish(folder: Path, result: RunResult) -> None:
        write_text(folder / f"{safe_name(request.model_type)}_best_practice.yaml", effective)
        write_report(folder, job.plan, result, title=request.model_type, debug=request.debug)

    return run_plan(
        job.plan,
        request.save_path,
        fingerprint=fingerprint(request.model_path, job.model.source, effective, [job.data(), job.devices.kind]),
        progress=progress,
        calibration=lambda: job.calibration(job.spec.dataset),
        extra_calibration=lambda: job.extra,
        stage_calibration=job.calibration,
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
    source = JoinedSource(folder.source, original.joined) if original.joined else folder.source
    take_stored_biases(module, source, original.tensor_name, skip)
    model = StreamedModel(
        *(module, source, folder.folder, config, original.blocks_name, original.tensor_name, skip),
        attention=Attentions(module, original.tensor_name),
        joined=original.joined,
    )
    rotations = read_input_rotations(folder.source)
    names = {info.prefix: info.name for unit in original.units for info in unit.linears}
    if lost := sorted(rotations.keys() - names.keys()):
        raise UnsupportedError("the files rotate the input of a linear that this model does not have", where=lost[0])
    install(module, {names[prefix]: rotation for prefix, rotation in rotations.items()})
    return model


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
    largest = max((int(given["input_ids"].max()) for given in inputs), default=0)
    if largest >= rows:
        raise InvalidModelError(
            f"the tokenizer gives id {largest}, but the model has {rows} embeddings",
            where=str(model.folder),
            remedy="copy the tokenizer that belongs to the model",
        )


def example_input(model: StreamedModel) -> dict[str, Any]:
    """A short sample of ids from all over the vocabulary, always the same one."""
    rows = model.module.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    ids = torch.linspace(0, rows - 1, _EXAMPLE_TOKENS).round().long()
    return {"input_ids": ids.unsqueeze(0), "use_cache": False}


def token_bytes(model: StreamedModel) -> int:
    """Bytes that one token keeps while its sample waits between two blocks.

    Its hidden state, the embedding that the model's forward began with and still holds, and the rotary tables.
    """
    text = model.config.get("text_config") or model.config
    hidden = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 0)
    heads = int(text.get("num_attention_heads") or 0)
    rotated = int(text.get("qk_rope_head_dim") or text.get("head_dim") or (hidden // heads if heads else 0))
    return 2 * (hidden + rotated) * (model.dtype or torch.float32).itemsize


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

"""Planning and running of ``modelslim_v1``: from a request to a finished folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from slim_core.job import Job, Remarks, arguments_of, told
from slim_core.model.streamed import StreamedModel
from slim_core.progress import Progress
from slim_core.ranks.launch import Again
from slim_core.recipe import Recipe
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.plan import Plan
from slim_core.runners.prediction import TowerLoad
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_llm.activations import token_bytes
from slim_llm.calibration import find_dataset, read_samples, tokenize, tokenize_extra
from slim_llm.models.loading import open_model, open_tokenizer
from slim_llm.vocabulary import check_token_ids, example_input, max_positions

__all__ = ["job_of_rank", "plan", "quantize"]


class TextSamples:
    """The samples of text sets, tokenized once."""

    def __init__(self, request: QuantRequest, model: StreamedModel) -> None:
        self._request = request
        self._model = model
        self._made: dict[tuple[DatasetConfig, bool], list[dict[str, Any]]] = {}

    @property
    def token_bytes(self) -> int:
        return token_bytes(self._model)

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self._request.model_path, trust_remote_code=self._request.trust_remote_code)

    def inputs(self, dataset: DatasetConfig) -> list[dict[str, Any]]:
        return self._inputs(dataset, extra=False)

    def extra(self, dataset: DatasetConfig) -> list[dict[str, Any]]:
        return self._inputs(dataset, extra=True)

    def _inputs(self, dataset: DatasetConfig, *, extra: bool) -> list[dict[str, Any]]:
        made = self._made.get((dataset, extra))
        if made is None:
            samples = read_samples(find_dataset(dataset.path))  # again for extra ones: to keep them would take more
            limit = max_positions(self._model)
            if extra:
                made = tokenize_extra(samples, self._tokenizer, dataset, limit, self.inputs(dataset))
            else:
                made = tokenize(samples, self._tokenizer, dataset, limit)
            check_token_ids(self._model, made)
            self._made[dataset, extra] = made
        return made

    def tokens(self, dataset: DatasetConfig) -> list[int]:
        return [inputs["input_ids"].numel() for inputs in self.inputs(dataset)]

    def extra_tokens(self, dataset: DatasetConfig) -> list[tuple[int, int]]:
        return [(len(inputs["input_ids"]), inputs["input_ids"].numel()) for inputs in self.extra(dataset)]

    def tower_load(self, dataset: DatasetConfig) -> TowerLoad:
        return TowerLoad()

    def at_hand(self, dataset: DatasetConfig) -> bool:
        return True

    def identity(self, dataset: DatasetConfig, *, extra: bool = False) -> Any:
        return [inputs["input_ids"].tolist() for inputs in self._inputs(dataset, extra=extra)]

    def example(self) -> dict[str, Any]:
        return example_input(self._model)


def _job(request: QuantRequest, recipe: Recipe, remarks: Remarks | None) -> Job:
    def model() -> StreamedModel:
        return open_model(request.model_path, trust_remote_code=request.trust_remote_code)

    again = Again("slim_llm.quantize:job_of_rank", arguments_of(request, recipe))
    return Job(request, recipe, recipe.spec(), model, partial(TextSamples, request), remarks, again=again)


def job_of_rank(request: dict[str, Any], recipe: dict[str, Any]) -> Job:
    """The same job in the process of another rank."""
    return _job(*told(request, recipe), None)


def plan(request: QuantRequest, recipe: Recipe, *, remarks: Remarks | None = None) -> Plan:
    """The plan of a run.

    Args:
        remarks: gives warnings to put before those of the plan.
    """
    return _job(request, recipe, remarks).plan


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
    return _job(request, recipe, remarks).run(progress, on_plan)

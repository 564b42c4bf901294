"""The service behind ``modelslim_v1``. Light to import: torch and transformers are loaded when work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.practices.registry import pedigree_of
from slim_llm.resources import PRACTICE_FOLDER, REGISTRY

if TYPE_CHECKING:
    from slim_core.evaluation.perplexity import EvalResult
    from slim_core.progress import Progress
    from slim_core.recipe import Recipe, SpecV1
    from slim_core.runners.plan import Plan
    from slim_core.runners.run import RunResult
    from slim_core.service import EvalRequest, QuantRequest

__all__ = ["LlmService"]


class LlmService:
    """Serves ``modelslim_v1``: text models, quantized layer by layer."""

    apiversion = "modelslim_v1"

    def practice_folders(self) -> list[Path]:
        return [PRACTICE_FOLDER]

    def pedigree(self, model_type: str) -> str | None:
        return pedigree_of(model_type, REGISTRY)

    def spec_type(self) -> type[SpecV1]:
        from slim_core.recipe import SpecV1

        return SpecV1

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        from slim_llm.models.loading import CAUSAL_LM, read_config

        return not images and CAUSAL_LM.knows(read_config(model_path))

    def plan(self, request: QuantRequest, recipe: Recipe) -> Plan:
        from slim_llm.quantize import plan

        return plan(request, recipe)

    def quantize(
        self, request: QuantRequest, recipe: Recipe, progress: Progress, on_plan: Callable[[Plan], None] | None = None
    ) -> RunResult:
        from slim_llm.quantize import quantize

        return quantize(request, recipe, progress, on_plan)

    def evaluate(self, request: EvalRequest, progress: Progress) -> EvalResult:
        from slim_llm.score import score

        return score(request, progress)

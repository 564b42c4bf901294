"""The service behind ``multimodal_vlm_modelslim_v1``. Light to import: torch is loaded when work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.practices.registry import pedigree_of
from slim_vlm.resources import PRACTICE_FOLDER, REGISTRY

if TYPE_CHECKING:
    from slim_core.evaluation.perplexity import EvalResult
    from slim_core.progress import Progress
    from slim_core.recipe import Recipe
    from slim_core.runners.plan import Plan
    from slim_core.runners.run import RunResult
    from slim_core.service import EvalRequest, QuantRequest
    from slim_vlm.recipe import SpecVlm

__all__ = ["VlmService"]


class VlmService:
    """Serves ``multimodal_vlm_modelslim_v1``: the vision tower as a whole, the text decoder layer by layer."""

    apiversion = "multimodal_vlm_modelslim_v1"

    def practice_folders(self) -> list[Path]:
        return [PRACTICE_FOLDER]

    def pedigree(self, model_type: str) -> str | None:
        return pedigree_of(model_type, REGISTRY)

    def spec_type(self) -> type[SpecVlm]:
        from slim_vlm.recipe import SpecVlm

        return SpecVlm

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        from slim_llm.models.loading import read_config
        from slim_vlm.models import IMAGE_TEXT

        return IMAGE_TEXT.knows(read_config(model_path))

    def plan(self, request: QuantRequest, recipe: Recipe) -> Plan:
        from slim_vlm.quantize import job

        return job(request, recipe).plan

    def quantize(
        self, request: QuantRequest, recipe: Recipe, progress: Progress, on_plan: Callable[[Plan], None] | None = None
    ) -> RunResult:
        from slim_vlm.quantize import job

        return job(request, recipe).run(progress, on_plan)

    def evaluate(self, request: EvalRequest, progress: Progress) -> EvalResult:
        from slim_vlm.score import score

        return score(request, progress)

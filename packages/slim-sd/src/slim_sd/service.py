"""The service behind ``multimodal_sd_modelslim_v1``. Light to import: torch is loaded when work begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.practices.registry import pedigree_of
from slim_sd.resources import KEPT_FILES, PRACTICE_FOLDER, REGISTRY

if TYPE_CHECKING:
    from slim_core.progress import Progress
    from slim_core.recipe import Recipe
    from slim_core.runners.plan import Plan
    from slim_core.runners.run import RunResult
    from slim_core.service import EvalRequest, QuantRequest, Scores
    from slim_sd.recipe import SpecSd

__all__ = ["DiffusionService"]


class DiffusionService:
    """Serves ``multimodal_sd_modelslim_v1``: diffusion transformers, quantized block by block."""

    apiversion = "multimodal_sd_modelslim_v1"
    keeps = KEPT_FILES

    def practice_folders(self) -> list[Path]:
        return [PRACTICE_FOLDER]

    def pedigree(self, model_type: str) -> str | None:
        return pedigree_of(model_type, REGISTRY)

    def spec_type(self) -> type[SpecSd]:
        from slim_sd.recipe import SpecSd

        return SpecSd

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        from slim_sd.folders import is_diffusion_model

        return not images and is_diffusion_model(model_path)

    def plan(self, request: QuantRequest, recipe: Recipe) -> Plan:
        from slim_sd.quantize import DiffusionRun

        return DiffusionRun(request, recipe).plan()

    def quantize(
        self, request: QuantRequest, recipe: Recipe, progress: Progress, on_plan: Callable[[Plan], None] | None = None
    ) -> RunResult:
        from slim_sd.quantize import DiffusionRun

        return DiffusionRun(request, recipe).run(progress, on_plan)

    def evaluate(self, request: EvalRequest, progress: Progress) -> Scores:
        from slim_sd.score import score

        return score(request, progress)

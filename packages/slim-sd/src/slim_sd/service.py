"""The service behind ``multimodal_sd_modelslim_v1``. Light to import: torch is loaded when work begins."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.errors import InvalidModelError
from slim_core.practices.registry import pedigree_of
from slim_sd.resources import KEPT_FILES, PRACTICE_FOLDER, REGISTRY

if TYPE_CHECKING:
    from slim_core.checkpoint.source import TensorSource
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
        from slim_sd.pipeline.folders import is_diffusion_model

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

    def parts(self, folder: Path) -> list[str]:
        """The folders that a model with several transformers is quantized into; none for one transformer."""
        from slim_sd.calibration import expert_name
        from slim_sd.pipeline.folders import transformer_folders

        components = transformer_folders(folder)
        return [expert_name(name) for name in components] if len(components) > 1 else []

    def open_original(self, folder: Path, names: Collection[str], part: str) -> TensorSource:
        """The tensors of the transformer that a quantized folder was made from, under its names.

        Args:
            names: of the tensors that it holds.
            part: what it is called, which tells one of several transformers.

        Raises:
            InvalidModelError: it is called like none of them, or the model cannot be read.
        """
        from slim_sd.calibration import expert_name
        from slim_sd.loading import open_tensors
        from slim_sd.pipeline.folders import transformer_folders

        components = {expert_name(name): name for name in transformer_folders(folder)}
        if len(components) > 1 and part not in components:
            raise InvalidModelError(
                f"the model has several transformers, and {part!r} is the name of none of them",
                where=str(folder),
                remedy=f"call the quantized folder {' or '.join(components)}, as slim quant did",
            )
        component = components[part] if len(components) > 1 else next(iter(components.values()))
        return open_tensors(folder, component, names)

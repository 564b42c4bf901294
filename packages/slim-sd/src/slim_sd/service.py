"""The service behind ``multimodal_sd_modelslim_v1``. Diffusion transformers are not served yet; the service says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from slim_core.errors import UnsupportedError

if TYPE_CHECKING:
    from slim_core.progress import Progress
    from slim_core.service import EvalRequest, QuantRequest

__all__ = ["DiffusionService"]


class DiffusionService:
    """Answers every request with a plain refusal."""

    apiversion = "multimodal_sd_modelslim_v1"

    def practice_folders(self) -> list[Path]:
        return []

    def pedigree(self, model_type: str) -> str | None:
        return None

    def spec_type(self) -> NoReturn:
        self._refuse()

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        return False

    def plan(self, request: QuantRequest, recipe: object) -> NoReturn:
        self._refuse()

    def quantize(self, request: QuantRequest, recipe: object, progress: Progress, on_plan: object = None) -> NoReturn:
        self._refuse()

    def evaluate(self, request: EvalRequest, progress: Progress) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            "this version of slim-sd cannot quantize diffusion transformers yet",
            where="apiversion: multimodal_sd_modelslim_v1",
            remedy="upgrade slim-sd once a version that can is released",
        )

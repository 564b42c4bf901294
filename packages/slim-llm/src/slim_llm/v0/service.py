"""The service behind ``modelslim_v0``: translates the recipe and leaves the work to ``modelslim_v1``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.errors import InvalidDatasetError
from slim_core.logging import get_logger

if TYPE_CHECKING:
    from slim_core.evaluation.perplexity import EvalResult
    from slim_core.migration import Migration
    from slim_core.progress import Progress
    from slim_core.recipe import Recipe
    from slim_core.recipe.base import StrictModel
    from slim_core.runners.plan import Plan
    from slim_core.runners.run import RunResult
    from slim_core.service import EvalRequest, QuantRequest

__all__ = ["LegacyService"]

_logger = get_logger(__name__)


class LegacyService:
    """Serves ``modelslim_v0``. Models and practices are claimed by the service of ``modelslim_v1``."""

    apiversion = "modelslim_v0"

    def practice_folders(self) -> list[Path]:
        return []

    def pedigree(self, model_type: str) -> str | None:
        return None

    def spec_type(self) -> type[StrictModel]:
        from slim_llm.v0.schema import SpecV0

        return SpecV0

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        return False

    def migrate(self, recipe: Recipe) -> Migration:
        from slim_llm.v0.translate import migrate

        return migrate(recipe)

    def plan(self, request: QuantRequest, recipe: Recipe) -> Plan:
        from slim_llm.quantize import plan

        migration = self._announced(recipe)
        with _in_old_words(recipe):
            return plan(request, migration.recipe, remarks=_remarks(recipe, migration))

    def quantize(
        self, request: QuantRequest, recipe: Recipe, progress: Progress, on_plan: Callable[[Plan], None] | None = None
    ) -> RunResult:
        from slim_llm.quantize import quantize

        migration = self._announced(recipe)
        with _in_old_words(recipe):
            return quantize(request, migration.recipe, progress, on_plan, remarks=_remarks(recipe, migration))

    def evaluate(self, request: EvalRequest, progress: Progress) -> EvalResult:
        from slim_llm.score import score

        return score(request, progress)

    def _announced(self, recipe: Recipe) -> Migration:
        migration = self.migrate(recipe)
        _logger.warning("%s", migration.notice())
        return migration


def _remarks(recipe: Recipe, migration: Migration) -> Callable[[Plan], list[str]]:
    """The warnings of the translation, and one more where the recipe names linears that the model does not have.

    None is due for the pattern of experts, which the translation adds and most models have nothing for.
    """
    from slim_llm.v0.schema import SpecV0
    from slim_llm.v0.smoothing import EXPERTS

    spec = recipe.spec(SpecV0)
    lists = {"calib_cfg.disable_names": spec.calib_cfg.disable_names}
    if spec.anti_cfg is not None:
        lists["anti_cfg.disable_anti_names"] = spec.anti_cfg.disable_anti_names

    def remarks(plan: Plan) -> list[str]:
        present = {linear.name for unit in plan.units for linear in unit.linears}
        found = list(migration.approximations)
        plan.warnings[:] = [text for text in plan.warnings if f"pattern {EXPERTS!r} matches no" not in text]
        for path, names in lists.items():
            if missing := [name for name in names if name not in present]:
                found.append(
                    f"spec.{path}: {len(missing)} of {len(names)} names are no linears of this model, e.g. {missing[0]}"
                )
        return found

    return remarks


@contextmanager
def _in_old_words(recipe: Recipe) -> Iterator[None]:
    """Let an error about the calibration set name the field that the user wrote."""
    try:
        yield
    except InvalidDatasetError as error:
        if error.where != "spec.dataset":
            raise
        where = f"{recipe.document.where(('spec', 'calib_dataset'))}: spec.calib_dataset"
        raise InvalidDatasetError(error.what, where=where, remedy=error.remedy) from error

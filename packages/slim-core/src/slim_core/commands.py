"""The commands themselves, without their argument parser: ``slim`` and :mod:`slim_core.plain_command` end here."""

from __future__ import annotations

import json
import logging
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.checkpoint.staging import check_target, partial_folder
from slim_core.console import ask, say, show_table
from slim_core.dispatch import choose_recipe, match_practice, open_library, service_for
from slim_core.errors import EnvError, SchemaValidateError, SecurityError, SlimError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.progress import SilentProgress, show_progress
from slim_core.ranks.world import world_of_environment
from slim_core.recipe import dump_recipe, load_recipe
from slim_core.service import EvalRequest, Migrator, QuantRequest, Service, find_service
from slim_core.sizes import human_size

if TYPE_CHECKING:
    from slim_core.runners.plan import Plan
    from slim_core.runners.run import RunResult

__all__ = [
    "effective_recipe",
    "evaluate",
    "list_practices",
    "match_practices",
    "migrate_recipe",
    "quantize",
    "show_practice",
    "write_file",
]

_logger = get_logger(__name__)


def quantize(request: QuantRequest) -> None:
    """``quant``: choose a recipe, show the plan and, unless it is a dry run, carry it out.

    Of several processes that ``torchrun`` started only the first one talks to the user.
    """
    if world_of_environment().rank:
        logging.getLogger("slim").setLevel(logging.ERROR)
        recipe, service = choose_recipe(request, ask)
        if not request.dry_run:
            service.quantize(request, recipe, SilentProgress())
        return
    recipe, service = choose_recipe(request, ask)
    problem: SlimError | None = _target_problem(request, service)
    if problem and not request.dry_run:
        raise problem
    if not request.dry_run:
        say(_outcome(service.quantize(request, recipe, show_progress(), on_plan=_show_summary)))
        return
    from slim_core.runners.plan_text import render_plan

    plans = _with_others(service.plan(request, recipe))
    say("\n\n".join(map(render_plan, plans)))
    problem = problem or next(filter(None, (plan.refusal for plan in plans)), None)
    if not (problem or request.force):
        from slim_core.runners.disk import disk_need, disk_problem

        need = reduce(add, map(disk_need, plans))
        problem = disk_problem(need, request.save_path, partial_folder(request.save_path))
    if problem:
        say(f"\nThe run itself would be refused: {problem}")


def _show_summary(plan: Plan) -> None:
    from slim_core.runners.plan_text import render_summary

    say("\n\n".join(map(render_summary, _with_others(plan))))


def _with_others(plan: Plan) -> list[Plan]:
    return [plan, *plan.others]


def _target_problem(request: QuantRequest, service: Service) -> SlimError | None:
    try:
        check_target(request.save_path, request.model_path, request.overwrite, getattr(service, "keeps", ()))
    except SecurityError as error:
        return error
    return None


def _outcome(result: RunResult) -> str:
    share = f" ({result.bytes_out / result.bytes_in:.0%})" if result.bytes_in else ""
    resumed = f", {result.resumed_units} units taken over from the interrupted run" if result.resumed_units else ""
    lines = {
        "written to": str(result.save_path),
        "weights": f"{human_size(result.bytes_in)} -> {human_size(result.bytes_out)}{share}",
        "time": f"{result.seconds:.1f} s{resumed}",
        "peak memory": f"{human_size(result.peak_bytes)}, of which {human_size(result.base_bytes)} before the run",
    }
    if reports := sorted([*result.save_path.glob("report.html"), *result.save_path.glob("*/report.html")]):
        lines["report"] = ", ".join(map(str, reports))
    return "Done\n" + "\n".join(f"  {key:<12} {value}" for key, value in lines.items())


def evaluate(request: EvalRequest, json_path: Path | None = None) -> None:
    """``eval``: score a model and, if asked, its quantized files; as a table and optionally as a JSON file."""
    if request.dataset is not None and request.text is not None:
        raise SchemaValidateError("--text and --dataset exclude each other", remedy="score one of them at a time")
    service = service_for(request.model_path, images=request.dataset is not None)
    result = service.evaluate(request, show_progress())
    show_table(*result.table())
    if json_path is not None:
        asked = {
            "model_path": str(request.model_path),
            "quantized": None if request.quantized is None else str(request.quantized),
            "text": None if request.text is None else str(request.text),
            "dataset": request.dataset,
            "prompt": request.prompt,
            "sequence_length": request.sequence_length,
            "max_windows": request.max_windows,
        }
        write_file(json_path, json.dumps({**asked, **result.as_json()}, indent=2) + "\n")


def list_practices() -> None:
    """``practices list``: one row for each practice, as they are tried."""
    library = open_library()
    rows: list[list[str]] = []
    for practice in library.list():
        models = [*practice.metadata.verified_model_types, *practice.metadata.verified_tags]
        shown = ", ".join(dict.fromkeys(models)) or "any"
        score = f"{practice.metadata.score:g}"
        rows.append([practice.pedigree, practice.config_id, practice.quant_type or "-", score, shown])
    show_table(["pedigree", "id", "quant type", "score", "models"], rows)


def show_practice(config_id: str) -> None:
    """``practices show``: the recipe as it stands in the library."""
    say(open_library().show(config_id).path.read_text("utf-8").rstrip())


def match_practices(model_type: str, quant_type: str | None, tags: list[str]) -> None:
    """``practices match``: what ``quant`` would choose, and what it would ask first."""
    selection = match_practice(model_type, quant_type, tags)
    practice = selection.practice
    known = f"pedigree {practice.pedigree}, {practice.quant_type}, score {practice.metadata.score:g}"
    say(f"practice  {practice.config_id} ({known})")
    say(f"file      {practice.path}")
    say(f"question  {selection.question or 'none'}")


def effective_recipe(path: Path) -> str:
    """``recipe check``: a recipe with every default filled in; one of an outdated protocol, as what it is run as.

    Raises:
        SlimError: it is invalid, or its package is not installed.
    """
    recipe = load_recipe(path)
    service = find_service(recipe.apiversion, where=f"{path}: apiversion")
    if isinstance(service, Migrator):
        migration = service.migrate(recipe)
        for warning in (migration.notice(), *migration.approximations):
            _logger.warning("%s", warning)
        return dump_recipe(migration.recipe)
    spec = recipe.spec(service.spec_type())
    for warning in recipe.placed(spec.warnings()):
        _logger.warning("%s", warning)
    return dump_recipe(recipe, spec)


def migrate_recipe(path: Path, output: Path | None = None) -> None:
    """``recipe migrate``: print a recipe of an outdated protocol in the newer one, or write it to a new file.

    Raises:
        UnsupportedError: the recipe's protocol is not outdated.
        SecurityError: ``output`` exists.
        SlimError: the recipe is invalid, or cannot be told in the newer protocol.
    """
    recipe = load_recipe(path)
    service = find_service(recipe.apiversion, where=f"{path}: apiversion")
    if not isinstance(service, Migrator):
        raise UnsupportedError(
            f"the recipe is already {recipe.apiversion}, which no newer protocol replaces",
            where=f"{path}: apiversion",
            remedy="use it as it is",
        )
    migration = service.migrate(recipe)
    if output is None:
        say(migration.text().rstrip())
    else:
        write_file(output, migration.text(), new=True)
        say(f"written to {output}; its first lines tell what is not the same")
    try:
        migration.recipe.spec()
    except SlimError as error:
        _logger.warning("this recipe cannot be run here yet: %s", error)


def write_file(path: Path, text: str, *, new: bool = False) -> None:
    """Write a text file that the user asked for.

    Raises:
        SecurityError: it exists, though it should be new.
        EnvError: it cannot be written.
    """
    try:
        with path.open("x" if new else "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise SecurityError(
            "exists and is not overwritten", where=str(path), remedy="remove it, or give another path"
        ) from error
    except OSError as error:
        raise EnvError(f"cannot be written: {error.strerror}", where=str(path)) from error

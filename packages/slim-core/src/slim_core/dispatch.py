"""From what a user asks for to the recipe and the service that will carry it out. Imports no torch."""

from __future__ import annotations

from slim_core.errors import SchemaValidateError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.practices import PracticeLibrary, practice_folders
from slim_core.recipe import Recipe, load_recipe
from slim_core.service import AskUser, QuantRequest, Service, find_service, installed_services

__all__ = ["choose_recipe", "open_library"]

_logger = get_logger(__name__)


def open_library() -> PracticeLibrary:
    """The practices of all installed services."""
    folders = [folder for service in _services() for folder in service.practice_folders()]
    return PracticeLibrary(practice_folders(dict.fromkeys(folder.resolve() for folder in folders)))


def _services() -> list[Service]:
    return [point.load()() for _, point in sorted(installed_services().items())]


def choose_recipe(request: QuantRequest, ask: AskUser) -> tuple[Recipe, Service]:
    """The recipe of a request, from its file or from the practice library, and the service for it.

    Args:
        ask: puts a yes/no question to the user; not called when ``request.yes`` is set.

    Raises:
        SchemaValidateError: both a recipe and a quantization type are given, or the recipe is invalid.
        UnsupportedError: nothing fits, the user declined, or the recipe's package is not installed.
    """
    if request.config_path is not None:
        if request.quant_type is not None:
            raise SchemaValidateError(
                "--config_path and --quant_type exclude each other", remedy="give the recipe or the type, not both"
            )
        recipe = load_recipe(request.config_path)
        return recipe, find_service(recipe.apiversion, where=f"{request.config_path}: apiversion")
    pedigree = next(filter(None, (service.pedigree(request.model_type) for service in _services())), "default")
    selection = open_library().select(pedigree, request.model_type, request.quant_type, request.tag)
    if selection.question and not request.yes and not ask(selection.question):
        raise UnsupportedError(
            "no practice was chosen", remedy="give a recipe with --config_path, or another --quant_type"
        )
    recipe = selection.practice.recipe
    _logger.info("practice: %s", selection.practice.config_id)
    return recipe, find_service(recipe.apiversion, where=f"practice {selection.practice.config_id}")

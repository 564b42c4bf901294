"""From what a user asks for to the recipe and the service that will carry it out. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from slim_core.errors import EnvError, SchemaValidateError, SlimError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.practices import PracticeLibrary, Selection, practice_folders
from slim_core.practices.library import DEFAULT_PEDIGREE
from slim_core.recipe import Recipe, load_recipe
from slim_core.service import AskUser, QuantRequest, Service, find_service, installed_services, load_service

if TYPE_CHECKING:
    from slim_core.evaluation.verify import Opener, Parts

__all__ = ["choose_recipe", "match_practice", "open_library", "original_opener", "original_parts"]
__all__ += ["service_for"]

_logger = get_logger(__name__)


def open_library() -> PracticeLibrary:
    """The practices of all installed services."""
    folders = [folder for service in _services() for folder in service.practice_folders()]
    return PracticeLibrary(practice_folders(dict.fromkeys(folder.resolve() for folder in folders)))


def _services() -> list[Service]:
    """All services that can be loaded. One broken package does not take the others down."""
    services: list[Service] = []
    for _, point in sorted(installed_services().items()):
        try:
            services.append(load_service(point))
        except EnvError as error:
            _logger.warning("%s", error)
    return services


def match_practice(
    model_type: str, quant_type: str | None, tags: Sequence[str] = (), model_path: Path | None = None
) -> Selection:
    """The practice that the library has for a model type, by the rules of :meth:`PracticeLibrary.select`.

    Args:
        model_path: the folder of the model. Of several fall-backs, one is chosen whose service takes it; without a
            folder, the score decides.

    Raises:
        SchemaValidateError, UnsupportedError: as there.
    """
    if not installed_services():
        raise UnsupportedError(
            "no installed package can quantize anything", remedy="pip install slim-llm (or slim-vlm, slim-sd)"
        )
    pedigree = next(filter(None, (service.pedigree(model_type) for service in _services())), DEFAULT_PEDIGREE)
    library = open_library()
    takes = _takes(model_path) if model_path is not None else None
    selection = library.select(pedigree, model_type, quant_type, tags, takes)
    for warning in library.warnings:
        _logger.warning("%s", warning)
    return selection


def _takes(model_path: Path) -> Callable[[str], bool]:
    """Tells whether the service of an ``apiversion`` takes the model in a folder."""
    services = {service.apiversion: service for service in _services()}

    @cache
    def takes(apiversion: str) -> bool:
        try:
            return apiversion in services and services[apiversion].handles(model_path)
        except SlimError as error:  # a folder that cannot be read is for the run to complain of
            _logger.debug("%s", error)
            return False

    return takes


def service_for(model_path: Path, *, images: bool = False) -> Service:
    """The installed service that scores the model in a folder.

    Args:
        images: whether on images, not on text.

    Raises:
        SlimError: none claims it; if one could not read the folder, what it said.
    """
    refusal: SlimError | None = None
    for service in _services():
        try:
            if service.handles(model_path, images=images):
                return service
        except SlimError as error:
            refusal = refusal or error
    remedy = f"pip install {'slim-vlm' if images else 'slim-llm, slim-vlm or slim-sd'}, or upgrade what is installed"
    raise refusal or UnsupportedError(
        f"no installed package can score this kind of model{' on images' if images else ''}",
        where=str(model_path),
        remedy=f"{'score language models with --text; else ' if images else ''}{remedy}",
    )


def original_opener(quantized: Path) -> Opener:
    """What opens the original of a quantized folder, to compare with.

    That is up to the service of the recipe that the run left in the folder, if it has an ``open_original`` because its
    models have a layout of their own.
    """
    from slim_core.evaluation.verify import open_original

    return getattr(_service_of_run(quantized), "open_original", open_original)


def original_parts(quantized: Path) -> Parts:
    """What tells the names of the folders that the original of a quantized folder is quantized into; it is the method
    ``parts`` of the same service."""
    return getattr(_service_of_run(quantized), "parts", lambda _folder: ())


def _service_of_run(quantized: Path) -> Service | None:
    """The service of the recipe that a run left in its folder, or in those of several transformers; None if there is no
    such recipe or service."""
    from slim_core.evaluation.verify import recipe_of_run
    from slim_core.savers.mindie_folder import quantized_parts

    recipes = (recipe_of_run(folder) for folder in (quantized, *quantized_parts(quantized)))
    apiversion = next((recipe.get("apiversion") for recipe in recipes if recipe), None)
    points = installed_services()
    return load_service(points[apiversion]) if apiversion in points else None


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
    selection = match_practice(request.model_type, request.quant_type, request.tag, request.model_path)
    if selection.question and not request.yes and not ask(selection.question):
        raise UnsupportedError(
            "no practice was chosen", remedy="give a recipe with --config_path, or another --quant_type"
        )
    recipe = selection.practice.recipe
    _logger.info("practice: %s", selection.practice.config_id)
    return recipe, find_service(recipe.apiversion, where=f"practice {selection.practice.config_id}")

"""What a folder of a diffusion model is, and which of its parts are transformers that Slim quantizes.

Only small files are read here, and no class of diffusers or transformers is looked up.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from slim_core.checkpoint.header import parse_object
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_sd.wan import files as wan_files

__all__ = ["Layout", "is_diffusion_model", "layout_of", "pipeline_index", "transformer_folders"]

Layout = Literal["original", "diffusers"]

_INDEX = "model_index.json"
_TRANSFORMER = re.compile(r"transformer(_\d+)?")
_AGAIN = "download the folder again"


def layout_of(folder: Path) -> Layout:
    """``diffusers`` for a folder with ``model_index.json``, ``original`` for one of the original Wan project.

    Raises:
        InvalidModelError: it is neither, or no folder.
        UnsupportedError: it holds a quantized transformer.
    """
    if not folder.is_dir():
        raise InvalidModelError(
            "the model folder does not exist or is not a folder",
            where=str(folder),
            remedy="point --model_path to the model folder",
        )
    if (folder / _INDEX).is_file():
        return "diffusers"
    if wan_files.is_original(folder):
        return "original"
    if found := sorted(folder.glob("quant_model_description*.json")):
        raise UnsupportedError(
            "this folder holds a quantized checkpoint", where=str(found[0]), remedy="start from the original"
        )
    inner = " and it is one component of a pipeline" if _is_component(folder) else ""
    raise InvalidModelError(
        f"no diffusion model: neither {_INDEX} (Diffusers layout) nor the config.json of a WanModel, here or in "
        f"{' and '.join(wan_files.EXPERTS.values())} (original Wan layout){inner}",
        where=str(folder),
        remedy="point --model_path to the folder that holds all components" if inner else "check --model_path",
    )


def is_diffusion_model(folder: Path) -> bool:
    """Whether a folder holds a diffusion model in either layout; never raises."""
    return (folder / _INDEX).is_file() or wan_files.is_original(folder)


def pipeline_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a Diffusers folder, every entry checked.

    Returns:
        The class of the pipeline under ``_class_name``, for each component that is there a pair of library
        (``diffusers`` or ``transformers``) and class, and the other settings of the pipeline.

    Raises:
        InvalidModelError: the file is missing or broken, or the folder of a component is missing.
        UnsupportedError: the pipeline or a component is code that comes with the model.
    """
    path = folder / _INDEX
    where = str(path)
    try:
        index = parse_object(path.read_bytes())
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=where, remedy=_AGAIN) from error
    except ValueError as error:
        raise InvalidModelError(f"not a JSON object: {error}", where=where, remedy=_AGAIN) from error
    name = index.get("_class_name")
    if isinstance(name, list):
        raise UnsupportedError(f"the pipeline {name[-1:]} is code that comes with the model", where=where)
    if not isinstance(name, str):
        raise InvalidModelError("_class_name, the class of the pipeline, is missing", where=where, remedy=_AGAIN)
    found: dict[str, Any] = {}
    for component, entry in index.items():
        if not isinstance(entry, list) or component.startswith("_"):
            found[component] = entry  # a setting of the pipeline
        elif entry != [None, None]:
            found[component] = _component(folder, component, entry, where)
    return found


def transformer_folders(folder: Path) -> dict[str, Path]:
    """The transformers that Slim quantizes: their folders by component (``transformer``, ``transformer_2``).

    Raises:
        InvalidModelError: as :func:`layout_of` and :func:`pipeline_index`.
        UnsupportedError: the pipeline has none, such as one with a UNet.
    """
    if layout_of(folder) == "original":
        return wan_files.transformer_folders(folder)
    index = pipeline_index(folder)
    components = {name: entry for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    found = {
        name: folder / name
        for name, (library, _) in components.items()
        if _TRANSFORMER.fullmatch(name) and library == "diffusers"
    }
    if not found:
        raise UnsupportedError(
            f"{index['_class_name']} has no transformer; its components are {', '.join(sorted(components)) or 'none'}",
            where=str(folder / _INDEX),
            remedy="only pipelines whose denoiser is a transformer can be quantized",
        )
    return found


def _component(folder: Path, name: str, entry: list[Any], where: str) -> list[str]:
    if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise InvalidModelError(
            f"component {name!r} must be a library and a class, not {entry!r}", where=where, remedy=_AGAIN
        )
    if entry[0] not in ("diffusers", "transformers"):
        raise UnsupportedError(
            f"component {name!r} is a {entry[1]} of {entry[0]!r}; only those of diffusers and transformers are loaded",
            where=where,
            remedy="use a folder without it",
        )
    if not (folder / name).is_dir():
        raise InvalidModelError(
            f"the folder of component {name!r} ({entry[1]}) is missing", where=str(folder / name), remedy=_AGAIN
        )
    return entry


def _is_component(folder: Path) -> bool:
    try:
        return "_class_name" in parse_object((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False

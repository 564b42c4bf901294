"""Reading a folder in the MindIE-SD format back, and telling quantized folders apart."""

from __future__ import annotations

from pathlib import Path

from slim_core.errors import InvalidModelError
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.loaders import MINDIE
from slim_core.savers.mindie_layout import DESCRIPTION_STEM, INDEX_FILE, WEIGHT_STEM, description_file
from slim_core.savers.quantized_folder import QuantizedFolder

__all__ = ["MindieFolder", "descriptions", "is_mindie", "is_quantized", "open_quantized", "quantized_parts"]


class MindieFolder(QuantizedFolder):
    """A folder with one ``quant_model_description_<type>.json``.

    Raises:
        InvalidModelError: there is not exactly one; or as the base class.
    """

    format = MINDIE
    global_keys = frozenset({"model_quant_type", "fa_quant_type"})

    def __init__(self, folder: Path) -> None:
        found = descriptions(folder)
        if len(found) > 1:
            raise InvalidModelError(
                f"holds several descriptions: {', '.join(path.name for path in found)}",
                where=str(folder),
                remedy="keep the one that belongs to the weights",
            )
        path = found[0] if found else folder / description_file(None)
        super().__init__(folder, path, INDEX_FILE if (folder / INDEX_FILE).exists() else None)


def descriptions(folder: Path) -> list[Path]:
    """All descriptions in a folder."""
    return sorted(folder.glob(f"{DESCRIPTION_STEM}*.json"))


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds a description of quantized weights, in any format."""
    return bool(descriptions(folder))


def quantized_parts(folder: Path) -> list[Path]:
    """The quantized folders in one that is none itself: one for each transformer of a model that has several."""
    if not folder.is_dir() or is_quantized(folder):
        return []
    return sorted(
        part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".") and is_quantized(part)
    )


def is_mindie(folder: Path) -> bool:
    """Whether a quantized folder is one for MindIE-SD: by the names of its files."""
    if any(folder.glob(f"{WEIGHT_STEM}s*.safetensors")):
        return False
    typed = any(path.name != description_file(None) for path in descriptions(folder))
    return typed or any(folder.glob(f"{WEIGHT_STEM}[._-]*safetensors"))


def open_quantized(folder: Path) -> QuantizedFolder:
    """A quantized folder, in whatever format it is.

    Raises:
        InvalidModelError: it has no description, or as :class:`QuantizedFolder`.
    """
    return MindieFolder(folder) if is_mindie(folder) else AscendV1Folder(folder)

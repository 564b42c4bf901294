"""Reading an ascendv1 folder back."""

from __future__ import annotations

from pathlib import Path

from slim_core.savers.ascendv1 import DESCRIPTION_FILE, INDEX_FILE
from slim_core.savers.loaders import ASCENDV1
from slim_core.savers.quantized_folder import QuantizedFolder

__all__ = ["AscendV1Folder"]


class AscendV1Folder(QuantizedFolder):
    """A folder with ``quant_model_description.json``."""

    format = ASCENDV1
    global_keys = frozenset(
        {"version", "model_quant_type", "metadata", "group_size", "optional", "kv_cache_type", "kv_quant_type"}
        | {"fa_quant_type", "indexer_quant_type", "is_rot_used", "reduce_quant_type"}
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / DESCRIPTION_FILE, INDEX_FILE if (folder / INDEX_FILE).exists() else None)

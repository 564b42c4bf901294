"""What identifies a run, so that only the same run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slim_core.checkpoint.source import TensorSource

__all__ = ["fingerprint"]


def fingerprint(folder: Path, source: TensorSource, recipe: str, extra: Iterable[Any] = ()) -> str:
    """Hash of the model's tensors and files, the effective recipe, Slim's version and whatever else decides the output.

    Weights are not read: size and time of their files stand for them.
    """
    tensors: list[Any] = []
    for name in source:
        meta = source.meta(name)
        tensors.append((name, str(meta.dtype), meta.shape))
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_file()
    ]
    content = json.dumps([version("slim-core"), recipe, tensors, files, list(extra)], default=str)
    return hashlib.sha256(content.encode()).hexdigest()

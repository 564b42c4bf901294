"""What identifies a run, so that only the same run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

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
        (path.name, status.st_size, status.st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.is_file() and (status := path.stat())
    ]
    content = json.dumps([version("slim-core"), recipe, tensors, files, list(extra)], default=_plain)
    return hashlib.sha256(content.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no form for. The order of a set differs between processes, so it must not count."""
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in cast("set[Any]", value))
    return str(value)

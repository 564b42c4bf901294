"""The files around the weights: configuration, tokenizer and code of the source model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

__all__ = ["copy_side_files", "write_json", "write_text"]

FILE_MODE = 0o600
_COPIED = (".json", ".py", ".txt", ".jinja", ".model", ".tiktoken")
_OURS = ("report.json", "report.html")


def write_text(path: Path, text: str) -> None:
    """Write a text file that only its owner can read."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, content: Any, indent: int) -> None:
    """Write a JSON file, non-ASCII characters escaped, without a final newline."""
    write_text(path, json.dumps(content, indent=indent))


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what an engine needs beside the weights.

    Index files, descriptions and reports of an earlier quantization stay behind. ``config.json`` loses
    ``quantization_config`` (also inside ``text_config``): it described the source's format, not this one.
    """
    for file in sorted(source.iterdir()):
        skipped = (
            not file.is_file()
            or not file.name.endswith(_COPIED)
            or file.name.endswith("index.json")
            or file.name.startswith("quant_model_description")
            or file.name in _OURS
        )
        if skipped:
            continue
        copy = target / file.name
        if file.name == "config.json" and (config := _without_quantization(file)) is not None:
            write_json(copy, config, indent=2)
            continue
        shutil.copyfile(file, copy)
        copy.chmod(FILE_MODE)


def _without_quantization(path: Path) -> dict[str, Any] | None:
    """The configuration without ``quantization_config``, or None if it has none and can be copied as it is."""
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    parts = [config, cast("dict[str, Any]", config.get("text_config") or {})]
    found = [part.pop("quantization_config", None) for part in parts]
    return config if any(part is not None for part in found) else None

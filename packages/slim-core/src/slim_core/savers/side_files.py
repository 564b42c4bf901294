"""The files around the weights: configuration, tokenizer and code of the source model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import Tensor

__all__ = ["FOLDER_MODE", "copy_side_files", "merge_keys", "write_json", "write_tensors", "write_text"]

FILE_MODE = 0o600
FOLDER_MODE = 0o750
_COPIED = (".json", ".py", ".txt", ".jinja", ".model", ".tiktoken")
_OURS = ("report.json", "report.html")


def write_text(path: Path, text: str) -> None:
    """Write a text file that only its owner can read."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, content: Any, indent: int) -> None:
    """Write a JSON file, non-ASCII characters escaped, without a final newline."""
    write_text(path, _indented(content, indent, "\n"))


def _indented(content: Any, indent: int, newline: str) -> str:
    """What ``json.dumps`` makes with this ``indent``, but innermost objects and arrays by its encoder in C, which knows
    no indentation and is many times faster."""
    inside = newline + " " * indent
    if not isinstance(content, (dict, list, tuple)) or not content:
        return json.dumps(content)
    items = cast("dict[str, Any] | list[Any]", content)
    values = list(items.values()) if isinstance(items, dict) else items
    if not any(isinstance(value, (dict, list, tuple)) for value in values):
        flat = json.dumps(items, separators=(f",{inside}", ": "))
        return f"{flat[0]}{inside}{flat[1:-1]}{newline}{flat[-1]}"
    parts = [_indented(value, indent, inside) for value in values]
    if isinstance(items, dict):
        parts = [f"{json.dumps(key)}: {part}" for key, part in zip(items, parts, strict=True)]
    first, last = "{}" if isinstance(items, dict) else "[]"
    return f"{first}{inside}{f',{inside}'.join(parts)}{newline}{last}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, and the folder that it lies in."""
    path.parent.mkdir(mode=FOLDER_MODE, exist_ok=True)
    library: Any = safetensors.torch
    library.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(FILE_MODE)


def merge_keys(target: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add keys to an object; objects that both have are merged themselves."""
    for key, value in more.items():
        held = target.get(key)
        if isinstance(held, dict) and isinstance(value, Mapping):
            merge_keys(cast("dict[str, Any]", held), cast("Mapping[str, Any]", value))
        else:
            target[key] = value


def copy_side_files(
    source: Path, target: Path, config: Mapping[str, Any] | None = None, endings: tuple[str, ...] = _COPIED
) -> None:
    """Copy what an engine needs beside the weights.

    Index files, descriptions and reports of an earlier quantization stay behind. ``config.json`` loses
    ``quantization_config`` (also inside ``text_config``): it described the source's format, not this one.

    Args:
        config: what ``config.json`` should say, where that is not what it says in the source.
        endings: how the names of the files end that are copied.
    """
    for file in sorted(source.iterdir()):
        skipped = (
            not file.is_file()
            or not file.name.endswith(endings)
            or file.name.endswith("index.json")
            or file.name.startswith("quant_model_description")
            or file.name in _OURS
        )
        if skipped:
            continue
        copy = target / file.name
        if file.name == "config.json" and (changed := _changed_config(file, config)) is not None:
            write_json(copy, changed, indent=2)
            continue
        shutil.copyfile(file, copy)
        copy.chmod(FILE_MODE)


def _changed_config(path: Path, wanted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The configuration as it should be, without ``quantization_config``; None if it can be copied as it is."""
    stored: dict[str, Any] = json.loads(path.read_text("utf-8"))
    config = deepcopy(dict(wanted)) if wanted else stored
    changed = bool(wanted) and config != stored
    for part in (config, cast("dict[str, Any]", config.get("text_config") or {})):
        changed = part.pop("quantization_config", None) is not None or changed
    return config if changed else None

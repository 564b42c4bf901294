"""Whether the files of a folder for MindIE-SD are there, well-formed, agree with each other, and are what its reader
accepts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slim_core.evaluation.verify.files import (
    check_agreement,
    check_index,
    check_layers_complete,
    check_modes,
    check_numbering,
    read_config,
    read_headers,
    read_object,
    split_description,
)
from slim_core.evaluation.verify.findings import CACHE, FLOAT, Contents, Findings

__all__ = ["read_mindie"]

INDEX = "quant_model_weight.safetensors.index.json"
_SHARD = re.compile(r"quant_model_weight-(\d{5,})-of-(\d{5,})\.safetensors")
_REQUIRED: dict[str, type] = {"model_quant_type": str}
_OPTIONAL: dict[str, type] = {"fa_quant_type": str}
_LARGEST = 100 << 30
# What the type of a model may be for the reader, which compares the names as they are.
_MODEL_TYPES = (
    *("W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A8_MXFP8", "W8A16", "W4A16", "W4A4_DYNAMIC", "W4A4_MXFP4"),
    *("W4A4_MXFP4_DUALSCALE", "W4A4_MXFP4_SVD", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ"),
    *("W8A8_PER_CHANNEL", "W8A8_PER_TENSOR", "W8A8_PER_CHANNEL_PER_TOKEN", "W8A8_PER_CHANNEL_PER_TENSOR"),
    *("W8A8_PER_TENSOR_PER_TOKEN", "INT8", "FP8_DYNAMIC", "MIXED_PERCISION", "NO_QUANT"),
)


def read_mindie(folder: Path, findings: Findings) -> Contents:
    """Read description, headers, index and configuration, and hold them against each other."""
    contents = Contents(folder, format="mindie", index=INDEX)
    found = sorted(path.name for path in folder.glob("quant_model_description*.json"))
    for name in found[1:]:
        findings.problem(name, f"a second description beside {found[0]}")
    contents.description = found[0] if found else "quant_model_description.json"
    description = read_object(folder / contents.description, findings)
    if (folder / "config.json").exists():
        contents.config = read_config(folder, findings)
    kind = None
    if description is not None:
        split_description(description, contents, _REQUIRED, _OPTIONAL, findings)
        kind = _model_type(contents, findings)
    weights = _weight_files(contents, kind, findings)
    if description is not None:
        check_agreement(contents, None, findings)
        check_layers_complete(contents, findings)
        for name, type_ in contents.types.items():
            if type_ == CACHE:
                findings.problem(name, f"has the type {CACHE}, for which the format has no place")
    for name in (contents.description, *weights):
        if (folder / name).is_symlink():
            findings.problem(name, "is a symbolic link, which MindIE-SD refuses")
    check_modes(folder, findings)
    return contents


def _model_type(contents: Contents, findings: Findings) -> str | None:
    """The type of the model, by which the weight file is found; None if nothing is quantized or it is not a type."""
    stated: Any = contents.globals.get("model_quant_type")
    present = {kind for kind in contents.types.values() if kind != FLOAT}
    if not isinstance(stated, str):
        return None
    if not present and stated == FLOAT:
        contents.refusals.append((contents.description, "finds no weights of a model in which nothing is quantized"))
        return None
    if stated not in _MODEL_TYPES:
        findings.problem(contents.description, f"model_quant_type is {stated!r}, which MindIE-SD does not know")
    elif stated not in present:
        findings.problem(contents.description, f"model_quant_type is {stated!r}, but no tensor has this type")
    expected = f"quant_model_description_{stated.lower()}.json"
    if contents.description != expected:
        findings.problem(contents.description, f"expected the name {expected}, because model_quant_type is {stated!r}")
    return stated


def _weight_files(contents: Contents, kind: str | None, findings: Findings) -> list[str]:
    """Read the headers of all weight files; their names."""
    names = sorted(path.name for path in contents.folder.glob("*.safetensors"))
    shards = [name for name in names if _SHARD.fullmatch(name)]
    expected = f"quant_model_weight_{kind.lower()}.safetensors" if kind else "quant_model_weight.safetensors"
    weights = [name for name in names if name == expected or name in shards]
    if expected in names and shards:
        findings.problem(expected, "lies beside numbered shards; expected one or the other")
    if not weights:
        because = f", because model_quant_type is {kind!r}" if kind else ""
        findings.problem(expected, f"the file is missing{because}")
        # Under another name it can be checked all the same.
        weights = [name for name in names if name.startswith("quant_model_weight")][:1]
    check_numbering(shards, _SHARD, findings)
    read_headers(contents, weights, findings)
    check_index(contents, findings, sharded=bool(shards))
    if shards:
        contents.refusals.append((shards[0], "does not load weights in parts; write one file (part_file_size: 0)"))
    for name in weights:
        size = (contents.folder / name).stat().st_size
        if size > _LARGEST:
            contents.refusals.append((name, f"refuses files above {_LARGEST >> 30} GiB; this one has {size} bytes"))
    return weights

"""Whether the files of an ascendv1 folder are there, well-formed and agree with each other."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from slim_core.checkpoint.header import read_header
from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify.findings import FLOAT, Contents, Findings, as_object

__all__ = ["read_contents"]

DESCRIPTION = "quant_model_description.json"
INDEX = "quant_model_weights.safetensors.index.json"
SINGLE = "quant_model_weights.safetensors"
_SHARD = re.compile(r"quant_model_weights-(\d{5,})-of-(\d{5,})\.safetensors")
_ROTATION = "rot.safetensors"
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.")
_WIDEST_MODE = 0o640
_REQUIRED: dict[str, type] = {
    "version": str,
    "model_quant_type": str,
    "metadata": dict,
    "group_size": int,
    "optional": dict,
}
_OPTIONAL: dict[str, type] = {
    "kv_cache_type": str,
    "kv_quant_type": str,
    "fa_quant_type": str,
    "indexer_quant_type": str,
    "is_rot_used": bool,
    "reduce_quant_type": str,
    "max_supported_tp": int,
}
# Tensors that the format leaves out of the description.
_UNDESCRIBED = (".heads_rotation", ".kronecker_rotation_m", ".kronecker_rotation_n")
# From the lowest type to the highest; the highest that occurs names the model. Types that are not listed never do.
_RANKING = (
    *(FLOAT, "W16A16S", "W4A16", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8", "W8A8S", "WFP8AFP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A4_DYNAMIC", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE", "W4A4_MXFP4_SVD"),
)


def read_contents(folder: Path, findings: Findings) -> Contents:
    """Read description, headers, index and configuration, and hold them against each other."""
    contents = Contents(folder)
    description = _read_object(folder / DESCRIPTION, findings)
    contents.config = _config(folder, findings)
    _headers(contents, findings)
    _index(contents, findings)
    if description is not None:
        _split_description(description, contents, findings)
        _agreement(contents, findings)
        _model_type(contents, findings)
        _layers_complete(contents, findings)
        _rotation(contents, findings)
    _modes(folder, findings)
    return contents


def _read_object(path: Path, findings: Findings) -> dict[str, Any] | None:
    """A JSON object, or None after noting why there is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                findings.problem(path.name, f"the key {key!r} occurs twice")
            seen[key] = value
        return seen

    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        findings.problem(path.name, "the file is missing")
    except (OSError, ValueError) as error:
        findings.problem(path.name, f"cannot be read as JSON: {error}")
    else:
        if (found := as_object(content)) is not None:
            return found
        findings.problem(path.name, f"holds a JSON {type(content).__name__}, expected an object")
    return None


def _split_description(description: dict[str, Any], contents: Contents, findings: Findings) -> None:
    for key, wanted in _REQUIRED.items():
        if key not in description:
            findings.problem(DESCRIPTION, f"the key {key!r} is missing, expected a {wanted.__name__}")
    for key, value in description.items():
        wanted = _REQUIRED.get(key) or _OPTIONAL.get(key)
        if wanted is not None or key.endswith(".quant_type"):
            wanted = wanted or str
            contents.globals[key] = value
            if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                findings.problem(DESCRIPTION, f"{key!r} is {value!r:.80}, expected a {wanted.__name__}")
        elif isinstance(value, str):
            contents.types[key] = value
        else:
            findings.problem(key, f"its type in the description is {value!r:.80}, expected a string")
    if contents.globals.get("version") not in (None, "1.0.0"):
        findings.warn(DESCRIPTION, f"version is {contents.globals['version']!r}, known is '1.0.0'")


def _headers(contents: Contents, findings: Findings) -> None:
    """Read the header of every weight file, and look for files that an engine would take for weights."""
    names = sorted(path.name for path in contents.folder.glob("*.safetensors"))
    shards = [name for name in names if _SHARD.fullmatch(name)]
    for name in names:
        if name not in shards and name not in (SINGLE, _ROTATION):
            findings.problem(name, "a foreign weight file; engines read every .safetensors file of the folder")
    if SINGLE in names and shards:
        findings.problem(SINGLE, "lies beside numbered shards; expected one or the other")
    if SINGLE not in names and not shards:
        findings.problem(str(contents.folder), "there are no quant_model_weights*.safetensors files")
    _numbering(shards, findings)
    for name in names:
        if name not in shards and name not in (SINGLE, _ROTATION):
            continue
        try:
            tensors = read_header(contents.folder / name)
        except InvalidModelError as error:
            findings.problem(name, error.what)
            continue
        for tensor in tensors:
            if (other := contents.placed.get(tensor.name)) is not None:
                findings.problem(tensor.name, f"is stored twice, in {other.file.name} and in {name}")
            contents.placed.setdefault(tensor.name, tensor)


def _numbering(shards: list[str], findings: Findings) -> None:
    matches = [match for name in shards if (match := _SHARD.fullmatch(name))]
    totals = {int(match[2]) for match in matches}
    numbers = sorted(int(match[1]) for match in matches)
    if len(totals) > 1:
        findings.problem(shards[0], f"shards name different totals: {', '.join(map(str, sorted(totals)))}")
    elif totals and numbers != list(range(1, max(totals) + 1)):
        missing = sorted(set(range(1, max(totals) + 1)) - set(numbers))
        text = f"number {missing[0]} is missing" if missing else f"number {numbers[-1]} is above the total"
        findings.problem(f"shards 1..{max(totals)}", f"{text}; there are {', '.join(shards)}")


def _index(contents: Contents, findings: Findings) -> None:
    sharded = any(_SHARD.fullmatch(path.name) for path in contents.folder.glob("*.safetensors"))
    for path in sorted(contents.folder.glob("*.safetensors.index.json")):
        if path.name != INDEX:
            findings.problem(path.name, "must not be here; engines would read only the files it lists")
    if not (contents.folder / INDEX).exists():
        if sharded:
            findings.problem(INDEX, "the file is missing, expected beside numbered shards")
        return
    content = _read_object(contents.folder / INDEX, findings)
    if content is None:
        return
    if set(content) != {"metadata", "weight_map"}:
        findings.problem(INDEX, f"has the keys {sorted(content)}, expected ['metadata', 'weight_map']")
    total = sum(tensor.nbytes for tensor in contents.placed.values())
    have = (as_object(content.get("metadata")) or {}).get("total_size")
    if have != total:
        findings.problem(INDEX, f"total_size is {have!r}, expected {total}, the bytes of all tensors")
    listed = as_object(content.get("weight_map"))
    if listed is None:
        findings.problem(INDEX, "weight_map is not an object")
    else:
        _placement(listed, contents, findings)


def _placement(listed: dict[str, Any], contents: Contents, findings: Findings) -> None:
    for name, file in listed.items():
        if name not in contents.placed:
            findings.problem(name, f"is listed in {INDEX} (for {file}) but is in no weight file")
        elif contents.placed[name].file.name != file:
            findings.problem(name, f"{INDEX} places it in {file}, expected {contents.placed[name].file.name}")
    for name, tensor in contents.placed.items():
        if name not in listed:
            findings.problem(name, f"is in {tensor.file.name} but not listed in {INDEX}")


def _agreement(contents: Contents, findings: Findings) -> None:
    """One tensor for every key and one key for every tensor."""
    for name, kind in contents.types.items():
        if name not in contents.placed:
            findings.problem(name, f"is described as {kind} but is in no weight file")
    for name, tensor in contents.placed.items():
        if name not in contents.types and not name.endswith(_UNDESCRIBED) and name != "rot.weight":
            findings.problem(name, f"is in {tensor.file.name} but has no entry in {DESCRIPTION}")


def _model_type(contents: Contents, findings: Findings) -> None:
    present = set(contents.types.values())
    ranked = [kind for kind in _RANKING if kind in present]
    expected = ranked[-1] if ranked else "Unknown"
    stated = contents.globals.get("model_quant_type")
    # A model whose only quantized type never wins may name that type instead of its float head.
    excused = expected == FLOAT and stated in present
    if stated is not None and stated != expected and not excused:
        findings.problem(
            DESCRIPTION, f"model_quant_type is {stated!r}, expected {expected!r}, the highest type present"
        )
    for key in ("kv_cache_type", "kv_quant_type"):
        have, want = contents.globals.get(key), "C8" if "C8" in present else None
        if have != want:
            findings.problem(
                DESCRIPTION, f"{key} is {have!r}, expected {want!r} {'with' if want else 'without'} C8 tensors"
            )


def _layers_complete(contents: Contents, findings: Findings) -> None:
    """Every decoder layer that ``config.json`` announces has tensors."""
    count = contents.setting("num_hidden_layers")
    groups: dict[str, list[int]] = {}
    for name in contents.types:
        if match := _LAYER.match(name):
            groups.setdefault(match[1], []).append(int(match[2]))
    if not groups or not isinstance(count, int):
        return
    prefix, numbers = max(groups.items(), key=lambda item: len(item[1]))
    if missing := sorted(set(range(count)) - set(numbers)):
        findings.problem(f"{prefix}.{missing[0]}", f"has no tensor; config.json announces {count} layers")


def _config(folder: Path, findings: Findings) -> dict[str, Any]:
    config = _read_object(folder / "config.json", findings) or {}
    for place, part in (("", config), ("text_config.", config.get("text_config"))):
        if "quantization_config" in (as_object(part) or {}):
            findings.problem(
                "config.json", f"has {place}quantization_config; engines must find the description instead"
            )
    return config


def _rotation(contents: Contents, findings: Findings) -> None:
    """The rotation that the description points to lies in the folder and is orthogonal."""
    quarot = (as_object(contents.globals.get("optional")) or {}).get("quarot")
    if quarot is None:
        return
    relative = (as_object((as_object(quarot) or {}).get("rotation_map")) or {}).get("global_rotation")
    if not isinstance(relative, str):
        findings.problem(DESCRIPTION, "optional.quarot has no rotation_map.global_rotation")
        return
    path = (contents.folder / relative).resolve()
    if contents.folder.resolve() not in path.parents or not path.is_file():
        findings.problem(DESCRIPTION, f"optional.quarot points to {relative!r}, which is no file of the folder")
        return
    try:
        rotation = load_file(path)["global_rotation"].float()
    except (SafetensorError, KeyError) as error:
        findings.problem(relative, f"holds no tensor 'global_rotation': {error}")
        return
    probe = torch.randn(rotation.shape[-1], 4, generator=torch.Generator().manual_seed(0))
    if rotation.dim() != 2 or rotation.shape[0] != rotation.shape[1]:
        findings.problem(relative, f"global_rotation has shape {list(rotation.shape)}, expected a square matrix")
    elif not torch.allclose(rotation.T @ (rotation @ probe), probe, atol=2e-2):
        findings.problem(relative, "global_rotation is not orthogonal")


def _modes(folder: Path, findings: Findings) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    wide = [path for path in files if stat.S_IMODE(path.stat().st_mode) & ~_WIDEST_MODE]
    if wide:
        mode = stat.S_IMODE(wide[0].stat().st_mode)
        more = f" (and {len(wide) - 1} more files)" if len(wide) > 1 else ""
        findings.problem(str(wide[0].relative_to(folder)), f"has mode {mode:04o}{more}, expected at most 0640")

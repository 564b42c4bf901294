"""Whether the files of a quantized folder are there, well-formed and agree with each other: here those of ascendv1."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

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
from slim_core.evaluation.verify.findings import FLOAT, Contents, Findings, as_object
from slim_core.evaluation.verify.mindie import read_mindie
from slim_core.savers.mindie_folder import is_mindie

__all__ = ["read_contents"]

DESCRIPTION = "quant_model_description.json"
INDEX = "quant_model_weights.safetensors.index.json"
SINGLE = "quant_model_weights.safetensors"
_SHARD = re.compile(r"quant_model_weights-(\d{5,})-of-(\d{5,})\.safetensors")
_ROTATION = "rot.safetensors"
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
_UNDESCRIBED = re.compile(r".*\.(heads_rotation|kronecker_rotation_[mn])|rot\.weight")
# From the lowest type to the highest; the highest that occurs names the model. Types that are not listed never do.
_RANKING = (
    *(FLOAT, "W16A16S", "W4A16", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8", "W8A8S", "WFP8AFP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A4_DYNAMIC", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE", "W4A4_MXFP4_SVD"),
)


def read_contents(folder: Path, findings: Findings) -> Contents:
    """Read description, headers, index and configuration, and hold them against each other."""
    if is_mindie(folder):
        return read_mindie(folder, findings)
    contents = Contents(folder, description=DESCRIPTION, index=INDEX)
    description = read_object(folder / DESCRIPTION, findings)
    contents.config = read_config(folder, findings)
    shards = _weight_files(contents, findings)
    check_index(contents, findings, sharded=bool(shards))
    if description is not None:
        split_description(description, contents, _REQUIRED, _OPTIONAL, findings)
        if contents.globals.get("version") not in (None, "1.0.0"):
            findings.warn(DESCRIPTION, f"version is {contents.globals['version']!r}, known is '1.0.0'")
        check_agreement(contents, _UNDESCRIBED, findings)
        _model_type(contents, findings)
        check_layers_complete(contents, findings)
        _rotation(contents, findings)
    check_modes(folder, findings)
    return contents


def _weight_files(contents: Contents, findings: Findings) -> list[str]:
    """Read the headers of all weight files; the names of the numbered ones."""
    names = sorted(path.name for path in contents.folder.glob("*.safetensors"))
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if SINGLE in names and shards:
        findings.problem(SINGLE, "lies beside numbered shards; expected one or the other")
    if SINGLE not in names and not shards:
        findings.problem(str(contents.folder), "there are no quant_model_weights*.safetensors files")
    check_numbering(shards, _SHARD, findings)
    read_headers(contents, [name for name in names if name in (SINGLE, _ROTATION, *shards)], findings)
    return shards


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

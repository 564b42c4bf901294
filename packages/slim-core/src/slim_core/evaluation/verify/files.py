"""What the files of every format must be: readable, whole, in agreement with each other, and not open to all."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from slim_core.checkpoint.header import read_header
from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify.findings import Contents, Findings, as_object

__all__ = ["check_agreement", "check_index", "check_layers_complete", "check_modes", "check_numbering", "read_config"]
__all__ += ["read_headers", "read_object", "split_description"]

_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.")
_WIDEST_MODE = 0o640


def read_object(path: Path, findings: Findings) -> dict[str, Any] | None:
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


def split_description(
    description: dict[str, Any],
    contents: Contents,
    required: dict[str, type],
    optional: dict[str, type],
    findings: Findings,
) -> None:
    """Tell the types of tensors from the keys that name none, and check the types of both.

    Args:
        required, optional: the latter keys, and what each holds.
    """
    name = contents.description
    for key, wanted in required.items():
        if key not in description:
            findings.problem(name, f"the key {key!r} is missing, expected a {wanted.__name__}")
    for key, value in description.items():
        wanted = required.get(key) or optional.get(key)
        if wanted is not None or key.endswith(".quant_type"):
            wanted = wanted or str
            contents.globals[key] = value
            if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                findings.problem(name, f"{key!r} is {value!r:.80}, expected a {wanted.__name__}")
        elif isinstance(value, str):
            contents.types[key] = value
        else:
            findings.problem(key, f"its type in the description is {value!r:.80}, expected a string")


def read_headers(contents: Contents, names: Collection[str], findings: Findings) -> None:
    """Read the headers of these weight files, and look for others that an engine would take for weights."""
    present = sorted(path.name for path in contents.folder.glob("*.safetensors"))
    for name in present:
        if name not in names:
            findings.problem(name, "a foreign weight file; engines read every .safetensors file of the folder")
    for name in sorted(names):
        try:
            tensors = read_header(contents.folder / name)
        except InvalidModelError as error:
            findings.problem(name, error.what)
            continue
        for tensor in tensors:
            if (other := contents.placed.get(tensor.name)) is not None:
                findings.problem(tensor.name, f"is stored twice, in {other.file.name} and in {name}")
            contents.placed.setdefault(tensor.name, tensor)


def check_numbering(shards: list[str], pattern: re.Pattern[str], findings: Findings) -> None:
    """Numbered shards are 1..N of N; ``pattern`` has the number and the total as groups."""
    matches = [match for name in shards if (match := pattern.fullmatch(name))]
    totals = {int(match[2]) for match in matches}
    numbers = sorted(int(match[1]) for match in matches)
    if len(totals) > 1:
        findings.problem(shards[0], f"shards name different totals: {', '.join(map(str, sorted(totals)))}")
    elif totals and numbers != list(range(1, max(totals) + 1)):
        missing = sorted(set(range(1, max(totals) + 1)) - set(numbers))
        text = f"number {missing[0]} is missing" if missing else f"number {numbers[-1]} is above the total"
        findings.problem(f"shards 1..{max(totals)}", f"{text}; there are {', '.join(shards)}")


def check_index(contents: Contents, findings: Findings, *, sharded: bool) -> None:
    """The index is there exactly if there are numbered shards, and says what the headers say."""
    name = contents.index
    for path in sorted(contents.folder.glob("*.safetensors.index.json")):
        if path.name != name:
            findings.problem(path.name, "must not be here; engines would read only the files it lists")
    if not (contents.folder / name).exists():
        if sharded:
            findings.problem(name, "the file is missing, expected beside numbered shards")
        return
    content = read_object(contents.folder / name, findings)
    if content is None:
        return
    if set(content) != {"metadata", "weight_map"}:
        findings.problem(name, f"has the keys {sorted(content)}, expected ['metadata', 'weight_map']")
    total = sum(tensor.nbytes for tensor in contents.placed.values())
    have = (as_object(content.get("metadata")) or {}).get("total_size")
    if have != total:
        findings.problem(name, f"total_size is {have!r}, expected {total}, the bytes of all tensors")
    listed = as_object(content.get("weight_map"))
    if listed is None:
        findings.problem(name, "weight_map is not an object")
    else:
        _placement(listed, contents, findings)


def _placement(listed: dict[str, Any], contents: Contents, findings: Findings) -> None:
    index = contents.index
    for name, file in listed.items():
        if name not in contents.placed:
            findings.problem(name, f"is listed in {index} (for {file}) but is in no weight file")
        elif contents.placed[name].file.name != file:
            findings.problem(name, f"{index} places it in {file}, expected {contents.placed[name].file.name}")
    for name, tensor in contents.placed.items():
        if name not in listed:
            findings.problem(name, f"is in {tensor.file.name} but not listed in {index}")


def check_agreement(contents: Contents, undescribed: re.Pattern[str] | None, findings: Findings) -> None:
    """One tensor for every key and one key for every tensor, but for names that ``undescribed`` matches."""
    for name, kind in contents.types.items():
        if name not in contents.placed:
            findings.problem(name, f"is described as {kind} but is in no weight file")
    for name, tensor in contents.placed.items():
        if name not in contents.types and not (undescribed and undescribed.fullmatch(name)):
            findings.problem(name, f"is in {tensor.file.name} but has no entry in {contents.description}")


def check_layers_complete(contents: Contents, findings: Findings) -> None:
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


def read_config(folder: Path, findings: Findings) -> dict[str, Any]:
    """``config.json``, which must say nothing of a quantization; empty if there is none that can be read."""
    config = read_object(folder / "config.json", findings) or {}
    for place, part in (("", config), ("text_config.", config.get("text_config"))):
        if "quantization_config" in (as_object(part) or {}):
            findings.problem(
                "config.json", f"has {place}quantization_config; engines must find the description instead"
            )
    return config


def check_modes(folder: Path, findings: Findings, *, inside: bool = True) -> None:
    """Nobody but the owner may write to a file, and others not read it; also of files in folders ``inside``."""
    files = [path for path in sorted(folder.rglob("*") if inside else folder.iterdir()) if path.is_file()]
    wide = [path for path in files if stat.S_IMODE(path.stat().st_mode) & ~_WIDEST_MODE]
    if wide:
        mode = stat.S_IMODE(wide[0].stat().st_mode)
        more = f" (and {len(wide) - 1} more files)" if len(wide) > 1 else ""
        findings.problem(str(wide[0].relative_to(folder)), f"has mode {mode:04o}{more}, expected at most 0640")

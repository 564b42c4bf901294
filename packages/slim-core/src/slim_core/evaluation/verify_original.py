"""Holding a quantized folder against the model it was made from: what must be there, and what may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slim_core.checkpoint.fp8_blocks import Fp8BlockSource, fp8_block_shape
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify_findings import FLOAT, Contents, Findings, as_object
from slim_core.evaluation.verify_values import Bounds

__all__ = ["check_coverage", "compare_with", "open_original"]

# Processors that leave every weight as it was before it is quantized.
_PLAIN_PROCESSORS = frozenset({"group", "linear_quant"})
_TOKENIZERS = frozenset(
    {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tiktoken.model", "vocab.json", "merges.txt"}
)


def open_original(folder: Path) -> TensorSource:
    """The tensors of a float model folder, FP8 blocks decoded.

    Raises:
        InvalidModelError: the folder holds no readable model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModelError(f"cannot be read as JSON: {error}", where=str(path)) from error
    source = Checkpoint(folder)
    block = fp8_block_shape(config)
    return source if block is None else Fp8BlockSource(source, block)


def compare_with(original: TensorSource, contents: Contents, findings: Findings) -> Bounds | None:
    """What the values may be held against; None (with a warning) if the recipe changed the float weights first.

    The recipe is the one that the run left in the folder. Without it the weights are compared, but an element that is
    off by more than rounding is only worth a warning: the weight method may have meant it.
    """
    spec = _spec(contents.folder)
    if spec is None:
        return Bounds(original, rows=False)
    processors = list(_processors(spec))
    changing = sorted({str(p.get("type")) for p in processors} - _PLAIN_PROCESSORS)
    if changing:
        findings.warn(
            "original", f"values were not compared: the recipe changes float weights first ({', '.join(changing)})"
        )
        return None
    methods = {_method(p) for p in processors if p.get("type") == "linear_quant"}
    return Bounds(original, rows=methods <= {"minmax"})


def _spec(folder: Path) -> dict[str, Any] | None:
    """``spec`` of the recipe as it was run, None if the folder holds none."""
    for path in sorted(folder.glob("*_best_practice.yaml")):
        try:
            recipe = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if spec := as_object((as_object(recipe) or {}).get("spec")):
            return spec
    return None


def _processors(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    waiting: list[Any] = list(spec.get("process") or ())
    while waiting:
        if processor := as_object(waiting.pop()):
            yield processor
            waiting += processor.get("configs") or ()


def _method(processor: dict[str, Any]) -> str:
    try:
        return str(processor["qconfig"]["weight"]["method"])
    except (KeyError, TypeError):
        return "unknown"


def check_coverage(contents: Contents, original: TensorSource, folder: Path, findings: Findings) -> None:
    """Check that nothing of the original is missing and nothing came from nowhere."""
    quantized = {module.prefix for module in contents.modules() if module.kind != FLOAT}
    for name in original:
        if name not in contents.placed:
            findings.problem(name, "is in the original but missing here")
    for name in contents.placed:
        prefix, _, suffix = name.rpartition(".")
        part = prefix in quantized and (suffix != "bias" or name in original)
        if part and f"{prefix}.weight" not in original and suffix == "weight":
            findings.problem(name, "is quantized, but the original has no such weight")
        elif not part and name not in original and not _is_tied_head(name, contents):
            findings.warn(name, "is not in the original")
    for file in sorted(_TOKENIZERS):
        if (folder / file).exists() and not (contents.folder / file).exists():
            findings.problem(file, "the original has this tokenizer file, it is missing here")


def _is_tied_head(name: str, contents: Contents) -> bool:
    tied = bool(contents.setting("tie_word_embeddings"))
    return tied and name.endswith(("lm_head.weight", "embed_tokens.weight", "embed_out.weight"))

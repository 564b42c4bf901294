"""Holding a quantized folder against the model it was made from: what must be there, and what may be compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from slim_core.checkpoint.fp8_blocks import Fp8BlockSource, fp8_block_shape
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorSource
from slim_core.checkpoint.stacked import with_experts_apart
from slim_core.errors import InvalidModelError, SlimError
from slim_core.evaluation.verify.comparison import Bounds
from slim_core.evaluation.verify.findings import CACHE, FLOAT, Contents, Findings, as_object
from slim_core.evaluation.verify.scaled import scaled_linears
from slim_core.model.inputs import mul_scale_of
from slim_core.recipe import NameFilter
from slim_core.savers.base import INNER
from slim_core.savers.loaders import MINDIE, lost_biases, reads_floats

__all__ = ["check_added_biases", "check_coverage", "compare_with", "open_original", "recipe_of_run"]
__all__ += ["spec_of_run"]

# Processors that leave every weight as it was before it is quantized.
_PLAIN_PROCESSORS = frozenset(
    {"group", "linear_quant", "autoround_quant", "float_sparse", "dynamic_cache", "fa3_quant"}
)
# Processors that reshape decoder layers and nothing else; of those that can shift, the ones that leave biases behind.
_SMOOTHERS = frozenset({"smooth_quant", "iter_smooth", "flex_smooth_quant", "flex_awq_ssz", "awq", "kv_smooth"})
_SHIFTING = frozenset({"smooth_quant", "iter_smooth"})
# Processors that rotate the model, and tensors that an engine needs to rotate the input of a linear.
_ROTATING = frozenset({"quarot", "adapt_rotation"})
_ONLINE = frozenset({"heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n"})
_UNKNOWN = "unknown"
_TOKENIZERS = frozenset(
    {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tiktoken.model", "vocab.json", "merges.txt"}
)


def open_original(folder: Path, names: Collection[str] = (), part: str = "") -> TensorSource:
    """The tensors of a float model folder, FP8 blocks decoded, stacked experts apart.

    Args:
        names: tensors of the quantized folder, which tell what the linears of an expert are called.
        part: what the quantized folder is called, which does not matter to a model in one folder.

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
    return with_experts_apart(source if block is None else Fp8BlockSource(source, block), names, config)


def compare_with(
    original: TensorSource, spec: dict[str, Any] | None, contents: Contents, findings: Findings
) -> Bounds | None:
    """What the values may be held against; None (with a warning) if the recipe changed the float weights first. If it
    changed those of decoder layers only, the others still are. Where engines take float tensors from the original, no
    recipe may change one.

    The recipe tells which method each weight went through. Without it the weights are compared, but an element that is
    off by more than rounding is only worth a warning: the method may have meant it.

    Args:
        spec: see :func:`spec_of_run`.
    """
    if spec is None:
        return Bounds(original, lambda _: _UNKNOWN)
    processors = list(_processors(spec))
    changing = sorted({str(p.get("type")) for p in processors} - _PLAIN_PROCESSORS)
    rules = [rule for processor in processors for rule in _rules(processor)]
    if not reads_floats(contents.main_engine) and _SMOOTHERS.issuperset(changing):
        # Nothing was folded into a norm. Where inputs are scaled, the weights of the original are divided here.
        return Bounds(
            original,
            lambda prefix: _method_of(prefix.removesuffix(INNER), rules),
            same_floats=True,
            smoothed=", ".join(changing),
        )
    if changing and not reads_floats(contents.main_engine):
        findings.warn(
            "original", f"quantized weights were not compared: the recipe changes them first ({', '.join(changing)})"
        )
        return Bounds(original, lambda _: _UNKNOWN, within_layers=False, same_floats=True)
    if changing and _SMOOTHERS.issuperset(changing):
        findings.warn(
            "original",
            f"values within decoder layers were not compared: the recipe changes them first ({', '.join(changing)})",
        )
        return Bounds(original, lambda _: _UNKNOWN, within_layers=False)
    if changing:
        findings.warn(
            "original", f"values were not compared: the recipe changes float weights first ({', '.join(changing)})"
        )
        return None
    return Bounds(original, lambda prefix: _method_of(prefix, rules))


def spec_of_run(folder: Path) -> dict[str, Any] | None:
    """``spec`` of the recipe that the run left; None if there is none."""
    return as_object((recipe_of_run(folder) or {}).get("spec"))


def recipe_of_run(folder: Path) -> dict[str, Any] | None:
    """The recipe that the run left in its folder, or in the one above it, if this is that of one of several
    transformers; None if there is none.
    """
    recipes = [sorted(place.glob("*_best_practice.yaml")) for place in (folder, folder.resolve().parent)]
    for path in recipes[0] or recipes[1]:
        try:
            recipe = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if (found := as_object(recipe)) is not None and as_object(found.get("spec")):
            return found
    return None


def _processors(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All processors, those of groups too, in their order."""
    waiting: list[Any] = list(spec.get("process") or ())
    while waiting:
        if processor := as_object(waiting.pop(0)):
            yield processor
            waiting = [*(processor.get("configs") or ()), *waiting]


def _rules(processor: dict[str, Any]) -> Iterator[tuple[NameFilter, str]]:
    """Which linears a processor takes, and by what method."""
    kind = processor.get("type")
    if kind == "linear_quant":
        yield _filter(processor), _method(processor)
    elif kind == "float_sparse":
        yield _filter(processor), "float_sparse"
    elif kind == "autoround_quant":
        for strategy in processor.get("strategies") or ():
            yield _filter(as_object(strategy) or {}), "autoround"


def _filter(processor: dict[str, Any]) -> NameFilter:
    """Its patterns; all linears if they cannot be read."""
    try:
        return NameFilter(tuple(processor.get("include", ("*",))), tuple(processor.get("exclude", ())))
    except (SlimError, TypeError):
        return NameFilter()


def _method(processor: dict[str, Any]) -> str:
    try:
        return str(processor["qconfig"]["weight"]["method"])
    except (KeyError, TypeError):
        return _UNKNOWN


def _method_of(prefix: str, rules: Sequence[tuple[NameFilter, str]]) -> str:
    """The method of the first rule that takes a linear.

    A checkpoint may call its tensors otherwise than the recipe calls the modules; then what all rules share counts.
    """
    for names, method in rules:
        if names.matches(prefix):
            return method
    shared = {method for _, method in rules}
    return shared.pop() if len(shared) == 1 else _UNKNOWN


def check_coverage(
    contents: Contents, original: TensorSource, folder: Path, spec: dict[str, Any] | None, findings: Findings
) -> None:
    """Check that nothing of the original is missing and nothing came from nowhere.

    Biases that a shift leaves behind come from somewhere: they belong to a module whose weight is in the original.

    Args:
        folder: of the original.
        spec: see :func:`spec_of_run`.
    """
    given = added_biases(contents, original)
    if spec is None and given:
        first = f"{next(iter(given))}.bias"
        findings.warn(first, f"is not in the original, like {len(given)} biases; an asymmetric smoothing leaves such")
    shifted = spec is None or any(
        processor.get("type") in _SHIFTING and processor.get("symmetric") is False for processor in _processors(spec)
    )
    explained = {f"{prefix}.bias" for prefix in given} if shifted else set[str]()
    explained |= {name for name in contents.placed if _is_of_rotation(name, original, spec)}
    explained |= {mul_scale_of(linear) for linear in scaled_linears(contents)}
    quantized = {module.prefix for module in contents.modules() if module.kind != FLOAT}
    for name in original:
        if name not in contents.placed:
            findings.problem(name, "is in the original but missing here")
    for name in contents.placed:
        prefix, _, suffix = name.rpartition(".")
        part = prefix in quantized and (suffix != "bias" or name in original)
        if part and f"{prefix}.weight" not in original and suffix == "weight":
            findings.problem(name, "is quantized, but the original has no such weight")
        elif part or name in original or name in explained:
            continue
        elif not _is_tied_head(name, contents) and not _is_cache(name, contents):
            findings.warn(name, "is not in the original")
    for file in sorted(_TOKENIZERS) if contents.format != MINDIE else ():  # a transformer of a diffusion model has none
        if (folder / file).exists() and not (contents.folder / file).exists():
            findings.problem(file, "the original has this tokenizer file, it is missing here")


def added_biases(contents: Contents, original: TensorSource) -> dict[str, str]:
    """The modules of the original that have a bias only here, with their types."""
    return {
        module.prefix: module.kind
        for module in contents.modules()
        if "bias" in module.parts and f"{module.prefix}.bias" not in original and f"{module.prefix}.weight" in original
    }


def check_added_biases(contents: Contents, stored: TensorSource, original: TensorSource, findings: Findings) -> None:
    """Warn of biases that the main engine drops, because the model class has none and the layer no ``quant_bias``."""
    linears = {
        prefix: kind
        for prefix, kind in added_biases(contents, original).items()
        if len(original.meta(f"{prefix}.weight").shape) > 1 and bool(stored.load(f"{prefix}.bias").any())
    }
    for kind, names in lost_biases(linears).items():
        findings.warn(
            f"{names[0]}.bias",
            f"{contents.main_engine} drops it, because the model's class has no bias and a {kind} layer no quant_bias "
            f"to hold it ({len(names)} such); only what is static W8A8 should follow a shifted norm",
        )


def _is_of_rotation(name: str, original: TensorSource, spec: dict[str, Any] | None) -> bool:
    """Whether a rotation leaves such a tensor: a matrix for the engine, or a head that is no longer the embedding."""
    rotated = spec is None or any(processor.get("type") in _ROTATING for processor in _processors(spec))
    prefix, _, suffix = name.rpartition(".")
    untied = name.endswith("lm_head.weight") and name not in original
    return rotated and (untied or (suffix in _ONLINE and f"{prefix}.weight" in original))


def _is_cache(name: str, contents: Contents) -> bool:
    return contents.types.get(name) == CACHE


def _is_tied_head(name: str, contents: Contents) -> bool:
    tied = bool(contents.setting("tie_word_embeddings"))
    return tied and name.endswith(("lm_head.weight", "embed_tokens.weight", "embed_out.weight"))

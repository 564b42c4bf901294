"""``slim verify``: an independent check of a quantized folder.

The rules are those of its format (``docs/verify.md``), applied to the files alone: nothing that wrote them is asked.
The one thing shared with the saver is the table of parameters per type, which *is* the format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError, SchemaValidateError, SlimError
from slim_core.evaluation.verify.attention import check_attention_values, check_attentions, loadable_attentions
from slim_core.evaluation.verify.comparison import Bounds, WeightPass
from slim_core.evaluation.verify.files import check_modes
from slim_core.evaluation.verify.findings import FLOAT, Contents, Findings, Layer
from slim_core.evaluation.verify.layers import (
    check_fusions,
    check_group_size,
    check_modules,
    loadable_layers,
)
from slim_core.evaluation.verify.original import (
    check_added_biases,
    check_coverage,
    compare_with,
    open_original,
    spec_of_run,
)
from slim_core.evaluation.verify.result import Verification, together
from slim_core.evaluation.verify.rows import row_blocks
from slim_core.evaluation.verify.scaled import behind_scales, check_input_scales
from slim_core.evaluation.verify.structure import read_contents
from slim_core.evaluation.verify.values import check_fused_inputs, check_quantized, check_untouched, is_shifted
from slim_core.quantization.kinds import LayerKind
from slim_core.savers.base import INNER
from slim_core.savers.loaders import engine_format, engines, refused_together
from slim_core.savers.mindie_folder import quantized_parts

__all__ = ["Opener", "Parts", "verify_folder"]

Opener = Callable[[Path, Collection[str], str], TensorSource]
"""From the folder of a model, the names of the tensors of the quantized one, and what that folder is called, to its
tensors under such names; the last tells one of several transformers."""

Parts = Callable[[Path], Collection[str]]
"""From the folder of a model to the names of the folders that it is quantized into; empty if that is just one."""


def _in_one(_folder: Path) -> Collection[str]:
    return ()


def verify_folder(
    path: Path,
    original: Path | None = None,
    engine: str | None = None,
    opener: Opener = open_original,
    parts: Parts = _in_one,
) -> Verification:
    """Check a folder that ``slim quant`` or the reference tool wrote; of one that holds a folder for each of several
    transformers, all of these.

    Args:
        path: the quantized checkpoint.
        original: the float model it was made from; its tensors are then compared one by one.
        engine: what this engine cannot load is a problem; without it, a warning for the main engine of the format.
        opener: opens the original, where that has a layout of its own.
        parts: tells what folders the original is quantized into.

    Raises:
        InvalidModelError: ``path`` is no folder, or the original cannot be read.
        SchemaValidateError: there is no table for ``engine``.
    """
    if not path.is_dir():
        raise InvalidModelError("is not a folder", where=str(path), remedy="point to a folder that slim quant wrote")
    if engine is not None and engine not in engines():
        raise SchemaValidateError(
            f"unknown engine {engine!r}", where="--engine", remedy=f"use one of {', '.join(engines())}"
        )
    found = quantized_parts(path)
    if not found:
        return _verify(path, original, engine, opener)
    wanted = () if original is None else parts(original)
    if original is not None and not wanted:
        raise InvalidModelError(
            f"this is one model, but {path} holds {', '.join(part.name for part in found)}",
            where=str(original),
            remedy="give the model that these were made from, or verify one of the folders",
        )
    findings = Findings()
    check_modes(path, findings, inside=False)
    for name in sorted(set(wanted) - {part.name for part in found}):
        findings.problem(name, "the folder is missing, though the original has this transformer")
    verified: dict[str, Verification] = {}
    for part in found:
        if original is not None and part.name not in wanted:
            findings.problem(part.name, "the original has no such transformer")
        else:
            verified[part.name] = _verify(part, original, engine, opener)
    return together(path, findings, verified)


def _verify(path: Path, original: Path | None, engine: str | None, opener: Opener) -> Verification:
    findings = Findings()
    contents = read_contents(path, findings)
    source = None
    if original is not None:
        source = behind_scales(opener(original, contents.placed, path.resolve().name), contents)
    layers = check_modules(contents, findings)
    check_input_scales(contents, layers, findings)
    if not findings.problems:
        check_group_size(contents, layers, findings)
    check_attentions(contents, findings)
    fused = list(check_fusions(contents, layers, findings))
    bounds = None
    if source is not None and original is not None:
        spec = spec_of_run(path)
        check_coverage(contents, source, original, spec, findings)
        bounds = compare_with(source, spec, contents, findings)
    stored = _open(contents, findings)
    if stored is not None:
        layers = [replace(x, form=replace(x.form, symmetric=not is_shifted(x, stored))) for x in layers]
    result = Verification(path, findings.problems, findings.warnings, findings.notes)
    result.loadable = [*loadable_layers(contents, layers, engine), *loadable_attentions(contents, engine)]
    _check_engines(result, contents, layers, engine, findings)
    if stored is not None:
        for parent, leaves in fused:
            check_fused_inputs(parent, leaves, stored, findings)
        if source is not None:
            check_added_biases(contents, stored, source, findings)
        result.checked = _check_values(contents, stored, layers, bounds, findings)
        result.checked += check_attention_values(contents, stored, findings)
        result.compared = bounds is not None and bounds.within_layers
        _check_tied(contents, stored, source, findings)
    return result


def _check_engines(
    result: Verification, contents: Contents, layers: Sequence[Layer], engine: str | None, findings: Findings
) -> None:
    """What the engine that was asked for cannot load is a problem; for the main engine it is a warning."""
    name, tell = engine or contents.main_engine, findings.problem if engine else findings.warn
    for entry in result.loadable:
        if not entry.loadable and entry.engine == name:
            why = entry.why or f"has no class for {entry.kind} {entry.place} layers"
            tell(entry.example, f"{name} {why} ({entry.count} of them)")
    if why := refused_together(name, {layer.prefix: layer.form for layer in layers}):
        tell(str(result.path), f"{name} {why}")
    if engine_format(name) != contents.format:
        tell(str(result.path), f"{name} wants other files around its layers than those of {contents.format}")
        return
    for where, why in contents.refusals:
        tell(where, f"{name} {why}")


def _open(contents: Contents, findings: Findings) -> TensorSource | None:
    path, index = contents.folder, contents.index
    try:
        return Checkpoint(path, index if (path / index).exists() else None)
    except SlimError as error:
        if not findings.problems:
            findings.problem(error.where or str(path), error.what)
        findings.warn(str(path), "values were not checked, because the weight files cannot be read together")
        return None


def _check_values(
    contents: Contents, stored: TensorSource, layers: Sequence[Layer], bounds: Bounds | None, findings: Findings
) -> int:
    """Read every tensor that can be judged, in the order in which the files hold them."""
    quantized = {f"{layer.prefix}.weight": layer for layer in layers}
    of_layers = bounds if bounds is not None and bounds.within_layers else None
    parts = {f"{layer.prefix}.{suffix}" for layer in layers for suffix in layer.module.parts}
    seen: list[tuple[Layer, WeightPass]] = []
    moved: list[str] = []
    checked = untouched = different = 0
    for name in stored:
        if (layer := quantized.get(name)) is not None:
            apart = of_layers is not None and of_layers.smoothed and not layer.prefix.endswith(INNER)
            mine = Findings() if apart else findings
            found = check_quantized(layer, stored, contents, mine, of_layers)
            if apart and mine.problems:
                moved.append(layer.prefix)
                found = check_quantized(layer, stored, contents, findings, None)
            elif apart:
                findings.add(mine)
            if found is not None:
                seen.append((layer, found))
            checked += len(layer.module.parts)
        elif name not in parts and contents.types.get(name) == FLOAT:
            known = bounds.source if bounds is not None and bounds.holds(name) else None
            different += not check_untouched(name, stored, findings, known)
            untouched += 1
            checked += 1
    if different > 1 and 2 * different > untouched:
        findings.warn(
            "original", f"{different} of {untouched} float tensors differ; is it the model this was made from?"
        )
    if moved and bounds is not None:
        findings.warn(
            moved[0],
            f"is not that of the original, like {len(moved)} linears whose input is not scaled: right if "
            f"{bounds.smoothed} moved scales from one linear into the next",
        )
    _note_sparsity(seen, findings)
    return checked


def _note_sparsity(seen: Sequence[tuple[Layer, WeightPass]], findings: Findings) -> None:
    """How sparse sparse layers are; no rule says how sparse they should be."""
    pruned = [found.zeros / (layer.out * layer.width) for layer, found in seen if layer.kind is LayerKind.W16A16S]
    narrow = [1 - found.wide / (layer.out * layer.width) for layer, found in seen if layer.kind is LayerKind.W8A8S]
    for kind, shares, what in (
        (LayerKind.W16A16S, pruned, "of the weights are zero"),
        (LayerKind.W8A8S, narrow, "of the codes fit four bits"),
    ):
        if shares:
            findings.note(kind, f"{min(shares):.1%} to {max(shares):.1%} {what} ({len(shares)} layers)")


def _check_tied(contents: Contents, stored: TensorSource, original: TensorSource | None, findings: Findings) -> None:
    """A model whose configuration ties head and embedding stores them equal.

    Some classes have a head of their own whatever the configuration says; then the original stores both, different.
    """
    if not contents.setting("tie_word_embeddings"):
        return
    heads = [name for name in stored if name.endswith("lm_head.weight")]
    embeddings = [name for name in stored if name.endswith("embed_tokens.weight")]
    if len(heads) != 1 or len(embeddings) != 1 or _equal(stored, heads[0], embeddings[0]):
        return
    (head,), (embedding,) = heads, embeddings
    text = f"differs from {embedding}, but config.json has tie_word_embeddings: true"
    if original is not None and head in original and embedding in original and not _equal(original, head, embedding):
        findings.warn(head, f"{text}; so they do in the original")
    else:
        findings.problem(head, text)


def _equal(source: TensorSource, one: str, other: str) -> bool:
    shape = source.meta(one).shape
    return shape == source.meta(other).shape and all(
        torch.equal(source.rows(one, start, stop), source.rows(other, start, stop))
        for start, stop in row_blocks(shape, [(source, one), (source, other)])
    )

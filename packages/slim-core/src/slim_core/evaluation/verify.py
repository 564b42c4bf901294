"""``slim verify``: an independent check of an ascendv1 folder.

The rules are those of the format (``docs/verify.md``), applied to the files alone: nothing that wrote them is asked.
The one thing shared with the saver is the table of parameters per type, which *is* the format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError, SchemaValidateError, SlimError
from slim_core.evaluation.verify_findings import FLOAT, Contents, Findings, Module
from slim_core.evaluation.verify_layers import Loadable, check_fusions, check_modules, loadable_layers
from slim_core.evaluation.verify_original import check_coverage, compare_with, open_original
from slim_core.evaluation.verify_structure import INDEX, read_contents
from slim_core.evaluation.verify_values import Bounds, check_fused_inputs, check_quantized, check_untouched, row_blocks
from slim_core.savers.loaders import MAIN_ENGINE, engines

__all__ = ["Verification", "verify_folder"]

_SHOWN = 50


@dataclass
class Verification:
    """What was found.

    Args:
        problems: what is wrong, each with the tensor or file and what was expected.
        warnings: what is worth knowing.
        checked: tensors whose values were read and checked.
        compared: whether values were held against the original.
        loadable: what each engine has a class for.
    """

    path: Path
    problems: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    checked: int = 0
    compared: bool = False
    loadable: list[Loadable] = field(default_factory=list[Loadable])

    @property
    def ok(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """A report to print."""
        lines: list[str] = []
        for title, found in (("Problems", self.problems), ("Warnings", self.warnings)):
            if found:
                lines += [f"{title} ({len(found)})", *(f"  {text}" for text in found[:_SHOWN])]
                lines += [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
                lines.append("")
        if self.loadable:
            lines.append("What the engines load")
            width = max(len(entry.engine) for entry in self.loadable)
            kinds = max(len(entry.kind) for entry in self.loadable)
            for entry in self.loadable:
                verdict = "yes" if entry.loadable else f"NO CLASS, e.g. {entry.example}"
                place = f"{entry.count} {entry.place}"
                lines.append(f"  {entry.engine:{width}}  {entry.kind:{kinds}}  {place:>14}  {verdict}")
            lines.append("")
        verdict = "ok" if self.ok else f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        compared = ", compared with the original" if self.compared else ""
        lines.append(f"{self.path}: {verdict} ({self.checked} tensors read{compared})")
        return "\n".join(lines)


def verify_folder(path: Path, original: Path | None = None, engine: str | None = None) -> Verification:
    """Check a folder that ``slim quant`` or the reference tool wrote.

    Args:
        path: the quantized checkpoint.
        original: the float model it was made from; its tensors are then compared one by one.
        engine: a type that this engine has no class for is a problem; without it, a warning for the main engine.

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
    source = None if original is None else open_original(original)
    findings = Findings()
    contents = read_contents(path, findings)
    quantized = check_modules(contents, findings)
    fused = list(check_fusions(contents, findings))
    bounds = None
    if source is not None and original is not None:
        check_coverage(contents, source, original, findings)
        bounds = compare_with(source, contents, findings)
    result = Verification(path, findings.problems, findings.warnings, loadable=loadable_layers(contents, engine))
    _check_engines(result, engine, findings)
    stored = _open(path, findings)
    if stored is not None:
        for parent, leaves in fused:
            check_fused_inputs(parent, leaves, stored, findings)
        result.checked = _check_values(contents, stored, quantized, bounds, findings)
        result.compared = bounds is not None
        _check_tied(contents, stored, findings)
        _check_asymmetric(stored, quantized, findings)
    return result


def _check_engines(result: Verification, engine: str | None, findings: Findings) -> None:
    for entry in result.loadable:
        if not entry.loadable and entry.engine == (engine or MAIN_ENGINE):
            text = f"{entry.engine} has no class for {entry.kind} {entry.place} layers ({entry.count} of them)"
            (findings.problem if engine else findings.warn)(entry.example, text)


def _open(path: Path, findings: Findings) -> TensorSource | None:
    try:
        return Checkpoint(path, INDEX if (path / INDEX).exists() else None)
    except SlimError as error:
        if not findings.problems:
            findings.problem(error.where or str(path), error.what)
        findings.warn(str(path), "values were not checked, because the weight files cannot be read together")
        return None


def _check_values(
    contents: Contents, stored: TensorSource, quantized: list[Module], bounds: Bounds | None, findings: Findings
) -> int:
    """Read every tensor that can be judged, in the order in which the files hold them."""
    layers = {f"{module.prefix}.weight": module for module in quantized}
    parts = {f"{module.prefix}.{suffix}" for module in quantized for suffix in module.parts}
    checked = untouched = different = 0
    for name in stored:
        if (module := layers.get(name)) is not None and module.kind in ("W8A8", "W8A8_DYNAMIC", "W8A16"):
            check_quantized(module, stored, contents, findings, bounds)
            checked += len(module.parts)
        elif name not in parts and contents.types.get(name) == FLOAT:
            known = bounds is not None and name in bounds.source
            different += not check_untouched(name, stored, findings, bounds.source if bounds and known else None)
            untouched += 1
            checked += 1
    if different > 1 and 2 * different > untouched:
        findings.warn(
            "original", f"{different} of {untouched} float tensors differ; is it the model this was made from?"
        )
    return checked


def _check_tied(contents: Contents, stored: TensorSource, findings: Findings) -> None:
    """A model whose configuration ties head and embedding stores them equal."""
    if not contents.setting("tie_word_embeddings"):
        return
    heads = [name for name in stored if name.endswith("lm_head.weight")]
    embeddings = [name for name in stored if name.endswith("embed_tokens.weight")]
    if len(heads) != 1 or len(embeddings) != 1:
        return
    (head,), (embedding,) = heads, embeddings
    shape = stored.meta(head).shape
    same = shape == stored.meta(embedding).shape
    for start, stop in row_blocks(shape, [(stored, head), (stored, embedding)]) if same else ():
        same = same and torch.equal(stored.rows(head, start, stop), stored.rows(embedding, start, stop))
    if not same:
        findings.problem(head, f"differs from {embedding}, but config.json has tie_word_embeddings: true")


def _check_asymmetric(stored: TensorSource, quantized: list[Module], findings: Findings) -> None:
    """The main engine adds the weight offset where the format subtracts it, so only zero is safe."""
    names = [f"{module.prefix}.weight_offset" for module in quantized if module.kind == "W8A16"]
    shifted = [name for name in names if bool((stored.load(name) != 0).any())]
    if shifted:
        text = f"is not zero ({len(shifted)} such layers): {MAIN_ENGINE} adds what the format subtracts"
        findings.warn(shifted[0], f"{text}; quantize symmetrically")

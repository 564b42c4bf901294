"""Perplexity of a model and of its quantized files, streamed block by block.

Original and quantized model advance together, so the weights of one block of each are in memory at a time, and their
logits can be compared token by token. Quantized linears compute what the target's integer arithmetic computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.evaluation.report.data import finite
from slim_core.model.skeleton import named_modules
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit
from slim_core.progress import Progress
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.layers import QuantizedLinear
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.simulated import simulated, simulating_taps
from slim_core.savers.quantized_folder import QuantizedFolder

__all__ = ["EvalResult", "evaluate"]

_CHUNK = 256


@dataclass
class EvalResult:
    """Scores over all predicted tokens.

    Args:
        perplexity: of the original model.
        quantized_perplexity: of the written files; None if only the original was scored.
        kl_divergence: mean over tokens of KL(original || quantized), in nats.
        top1_agreement: share of tokens for which both put the same token first.
        logits_sqnr_db: signal to noise of the quantized model's logits, in decibels, means over the vocabulary aside.
    """

    tokens: int
    perplexity: float
    quantized_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    logits_sqnr_db: float | None = None

    @property
    def ratio(self) -> float | None:
        """Quantized over original perplexity."""
        return None if self.quantized_perplexity is None else self.quantized_perplexity / self.perplexity

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of a table for people."""
        if self.quantized_perplexity is None:
            return ["", "original"], [["perplexity", f"{self.perplexity:.4f}"], ["tokens", str(self.tokens)]]
        rows = [
            ["perplexity", f"{self.perplexity:.4f}", f"{self.quantized_perplexity:.4f}"],
            ["ratio", "", f"{self.ratio:.4f}"],
            ["KL divergence (nats)", "", f"{self.kl_divergence:.5f}"],
            ["top-1 agreement", "", f"{self.top1_agreement:.2%}"],
            ["logits SQNR (dB)", "", f"{self.logits_sqnr_db:.1f}"],
            ["tokens", str(self.tokens), str(self.tokens)],
        ]
        return ["", "original", "quantized"], rows

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {key: finite(value) for key, value in {**asdict(self), "ratio": self.ratio}.items()}


@dataclass
class _Sums:
    tokens: int = 0
    loss: float = 0.0
    quantized_loss: float = 0.0
    divergence: float = 0.0
    agreement: int = 0
    signal: float = 0.0
    noise: float = 0.0


def evaluate(
    model: StreamedModel,
    inputs: Sequence[Mapping[str, Any]],
    device: torch.device,
    progress: Progress,
    quantized: tuple[StreamedModel, QuantizedFolder] | None = None,
    targets: Callable[[int], Tensor] | None = None,
) -> EvalResult:
    """Score what a model predicts.

    Args:
        inputs: keyword arguments of the model; ``input_ids`` ``(1, tokens)``.
        targets: gives, for an input that has been used, the tokens at its end that are to be predicted ``(count,)``;
            by default these are all but its first. The model may return the logits of the last positions only.
        quantized: the same model over the written files, and the folder that says which layers are quantized.

    Raises:
        InvalidModelError: the model returns no logits, or the files were written for another one.
        UnsupportedError: the written files quantize something that cannot be reached in this model.
    """
    if quantized is not None:
        _check_structure(model, *quantized)
        _check_attentions(*quantized)
    sums = _Sums()
    names = {unit.name: 1 for unit in model.running}
    progress.start("Evaluating", names | {"head": 1})
    try:
        with torch.no_grad(), ExitStack() as stack:
            runs = [stack.enter_context(BlockForwards(model, inputs, device))]
            if quantized is not None:
                runs.append(stack.enter_context(BlockForwards(quantized[0], inputs, device)))
            blocks = model.running
            written = {} if quantized is None else {unit.name: unit for unit in quantized[0].units}
            for unit in blocks:
                progress.begin(unit.name)
                last = unit is blocks[-1]
                _run_block(model, unit, runs[0], device, {}, {}, last)
                if quantized is not None:
                    layers, attentions = _layers_of(unit, quantized[1]), _attentions_of(unit, quantized[1])
                    _run_block(quantized[0], written[unit.name], runs[1], device, layers, attentions, last)
                progress.done(unit.name)
            progress.begin("head")
            for sample in range(len(inputs)):
                logits = [_logits(run.finish(sample)) for run in runs]
                wanted = inputs[sample]["input_ids"][0, 1:] if targets is None else targets(sample)
                _score(wanted, [part[0, -1 - len(wanted) : -1] for part in logits], sums)
            progress.done("head")
    finally:
        progress.stop()
    if not sums.tokens:
        raise InvalidModelError("there is nothing to score", remedy="give a longer text or a smaller --sequence_length")
    result = EvalResult(sums.tokens, math.exp(sums.loss / sums.tokens))
    if quantized is not None:
        result.quantized_perplexity = math.exp(sums.quantized_loss / sums.tokens)
        result.kl_divergence = sums.divergence / sums.tokens
        result.top1_agreement = sums.agreement / sums.tokens
        result.logits_sqnr_db = 10 * math.log10(sums.signal / sums.noise) if sums.noise else math.inf
    return result


def _layers_of(unit: Unit, folder: QuantizedFolder) -> dict[str, QuantizedLinear]:
    found = {info.name: folder.layer(info.prefix) for info in unit.linears}
    return {name: layer for name, layer in found.items() if layer is not None}


def _attentions_of(unit: Unit, folder: QuantizedFolder) -> dict[str, QuantizedAttention]:
    found = {info.name: folder.attention(info) for info in unit.attentions}
    return {name: attention for name, attention in found.items() if attention is not None}


def _check_structure(original: StreamedModel, model: StreamedModel, folder: QuantizedFolder) -> None:
    """Refuse files of a model whose configuration makes other linears."""
    first, second = (
        {
            name: (part.out_features, part.in_features)
            for name, part in named_modules(one.module)
            if isinstance(part, nn.Linear)
        }
        for one in (original, model)
    )
    if other := next((name for name in first | second if first.get(name) != second.get(name)), None):
        shapes = [" x ".join(map(str, one[other])) if other in one else "not there" for one in (first, second)]
        raise InvalidModelError(
            f"the files were written for another model: {other} is {shapes[1]}, in the original {shapes[0]}",
            where=str(folder.folder),
            remedy="give the folder that was written for this model",
        )


def _check_attentions(model: StreamedModel, folder: QuantizedFolder) -> None:
    """Refuse to leave a quantized attention in floating point."""
    known = {info.prefix for unit in model.units for info in unit.attentions if not info.problem}
    if lost := sorted(folder.attentions() - known):
        raise UnsupportedError(
            f"the files quantize {len(lost)} attentions whose states cannot be reached in this model",
            where=lost[0],
        )


def _run_block(
    model: StreamedModel,
    unit: Unit,
    run: BlockForwards,
    device: torch.device,
    layers: Mapping[str, QuantizedLinear],
    attentions: Mapping[str, QuantizedAttention],
    last: bool,
) -> None:
    run.reach(unit)
    replaced = tuple(f"{name}." for name in layers)
    names = [name for name in unit.parameters if not name.startswith(replaced)]
    model.load(names, device)
    with simulated(model.module, layers, device), model.tapped(simulating_taps(attentions, device)):
        if last:
            run.run_to_end()
        else:
            run.run(hand_on=True)
    model.unload(names)
    model.source.release(unit.tensors.values())


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise InvalidModelError(f"the model returned {type(output).__name__}, which has no logits")
    return logits


def _score(targets: Tensor, logits: list[Tensor], sums: _Sums) -> None:
    """Add one window; float32 over runs of tokens, so that a large vocabulary needs little memory.

    Args:
        targets: ``(tokens,)``.
        logits: of each model ``(tokens, vocabulary)``.
    """
    for start in range(0, len(targets), _CHUNK):
        target = targets[start : start + _CHUNK]
        first, *others = (functional.log_softmax(part[start : start + len(target)].float(), -1) for part in logits)
        sums.tokens += len(target)
        sums.loss += float(functional.nll_loss(first, target, reduction="sum"))
        for other in others:
            sums.quantized_loss += float(functional.nll_loss(other, target, reduction="sum"))
            sums.divergence += float((first.exp() * (first - other)).sum())
            sums.agreement += int((first.argmax(-1) == other.argmax(-1)).sum())
            difference = other - first
            sums.signal += float((first - first.mean(-1, keepdim=True)).square().sum())
            sums.noise += float((difference - difference.mean(-1, keepdim=True)).square().sum())

"""Going through a quantized weight once: whether its codes make sense, and how far it is from the original."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slim_core.checkpoint.source import TensorSource
from slim_core.evaluation.verify.decoding import NO_CODE, Decoder
from slim_core.evaluation.verify.findings import Findings, Layer
from slim_core.evaluation.verify.rows import all_finite, row_blocks
from slim_core.quantization.kinds import LayerKind

__all__ = ["Bounds", "WeightPass", "go_through"]

# A row of zero weights has the smallest scale there is, float32 epsilon or less.
_SMALLEST_SCALE = 1e-6

# Relative error of a weight beyond which rounding alone is no explanation, unless rows have outliers. Gaussian rows
# lose 0.5-1 % with eight bits, 2.5-3 % with E4M3 and 10-15 % with four bits.
_EXPECTED = {"integer": 0.02, "e4m3": 0.05, "four": 0.25}
# Methods that take every weight to the nearest code and cut nothing off (beyond what the format itself does).
_ROUNDING = frozenset({"minmax", "sparse", "mse_round", "dualscale"})
# Methods that move weights further on purpose: they cut off, or make up for each other's errors.
_MOVING = frozenset({"ssz", "gptq", "autoround", "ceil_x", "fouroversix"})
_COMPENSATING = frozenset({"gptq", "autoround"})
# Errors this many times those of rounding, in energy, are more than any method means.
_FAR_TOO_MUCH = 16.0
# A pruned weight, where it is not zero, points the same way as the original; an unrelated one is near 0.
_LEAST_LIKENESS = 0.5


# Only what there are several of, like decoder layers, has a number in its name.
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class Bounds:
    """The original, and what may be held against it.

    Args:
        source: the float tensors, FP8 blocks decoded.
        method: the weight method that the recipe names for a linear; ``unknown`` without a recipe.
        within_layers: whether that goes for decoder layers too; not if the recipe reshapes them first.
        same_floats: whether float tensors must be those of the original wherever they are.
        smoothed: what smoothing the recipe asks for: it may have moved scales from a linear into the next one, and
            biases with them, where no input is scaled; empty if there is none.
    """

    source: TensorSource
    method: Callable[[str], str]
    within_layers: bool = True
    same_floats: bool = False
    smoothed: str = ""

    def holds(self, name: str) -> bool:
        """Whether a float tensor must be as it is in the original."""
        everywhere = self.within_layers or self.same_floats
        return name in self.source and (everywhere or not _IN_A_LAYER.search(name))


@dataclass
class WeightPass:
    """What was found on the way through a weight.

    Args:
        row_sums: int64 sums of the codes of every row.
        part_sums, part_energy: float64 ``(out, parts)`` sums of the weights and of their squares, in equal runs of
            columns.
        zeros, wide: how many weights are zero, and how many codes do not fit -7..7.
    """

    row_sums: Tensor
    part_sums: Tensor
    part_energy: Tensor
    zeros: int = 0
    wide: int = 0


@dataclass
class _Errors:
    """Energies of a comparison with the original, and the first row that is further off than rounding explains."""

    signal: float = 0.0
    noise: float = 0.0
    rounding: float = 0.0
    product: float = 0.0
    kept: float = 0.0
    found: float = 0.0
    outside: tuple[int, float] | None = None


@dataclass
class _Faults:
    """The first fault of every sort."""

    texts: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, sort: str, text: str | None) -> None:
        if text:
            self.texts.setdefault(sort, text)


def go_through(
    layer: Layer,
    source: TensorSource,
    decoder: Decoder,
    findings: Findings,
    bounds: Bounds | None,
    parts: int = 1,
) -> WeightPass:
    """Read a weight once, in blocks of rows.

    Args:
        bounds: what to compare with; None if there is nothing, or if the scales are not sound.
        parts: into how many runs of columns sums are taken.
    """
    name = f"{layer.prefix}.weight"
    original = bounds.source if bounds is not None and _comparable(name, layer, bounds.source, findings) else None
    shape = (layer.out, parts)
    seen = WeightPass(
        torch.zeros(layer.out, dtype=torch.int64), torch.zeros(shape).double(), torch.zeros(shape).double()
    )
    errors, faults = _Errors(), _Faults()
    held = [(source, name)] if original is None else [(source, name), (original, name)]
    for first, last in row_blocks(source.meta(name).shape, held):
        rows = slice(first * decoder.rows_per_byte, last * decoder.rows_per_byte)
        codes = decoder.codes(source.rows(name, first, last))
        _look_at(layer, decoder, codes, rows, seen, faults)
        if original is None and layer.kind is not LayerKind.W4A8_DYNAMIC:
            continue
        values = decoder.values(codes, rows)
        if layer.kind is LayerKind.W4A8_DYNAMIC:
            runs = values.double().reshape(len(values), parts, -1)
            seen.part_sums[rows] = runs.sum(2)
            seen.part_energy[rows] = runs.square().sum(2)
        if original is not None:
            _compare(decoder, original.rows(name, rows.start, rows.stop).float(), values, rows, errors)
    for text in faults.texts.values():
        findings.problem(name, text)
    if original is not None and bounds is not None and not faults.texts:
        _judge(layer, errors, bounds.method(layer.prefix), findings)
    return seen


def _look_at(layer: Layer, decoder: Decoder, codes: Tensor, rows: slice, seen: WeightPass, faults: _Faults) -> None:
    """What can be said of the codes alone."""
    if decoder.element == "integer":
        sums = codes.sum(1)
        seen.row_sums[rows] = sums
        if layer.kind is LayerKind.W4A4_DYNAMIC and bool(((codes < -8) | (codes > 7)).any()):
            row = int(((codes < -8) | (codes > 7)).any(1).nonzero()[0])
            faults.add("range", f"row {rows.start + row} holds codes outside -8..7")
        if layer.kind is LayerKind.W8A8S:
            seen.wide += int(torch.count_nonzero((codes > 7) | (codes < -7)))
        blank = sums == 0
    elif decoder.element == "float":
        if not all_finite(codes):
            row = int((~torch.isfinite(codes.float())).any(1).nonzero()[0])
            faults.add("finite", f"holds NaN or infinity in row {rows.start + row}")
        seen.zeros += codes.numel() - int(torch.count_nonzero(codes))
        return
    else:
        if decoder.element == "e4m3" and bool((nan := codes.float().isnan()).any()):
            faults.add("finite", f"holds NaN in row {rows.start + int(nan.any(1).nonzero()[0])}")
        if decoder.packing == "values" and bool((other := codes == NO_CODE).any()):
            row = rows.start + int(other.any(1).nonzero()[0])
            faults.add("element", f"holds values in row {row} that are no numbers of four bits (E2M1)")
        blank = (codes.view(torch.uint8) == 0).all(1)
    faults.add("blank", _unwritten(layer, decoder, codes, blank, rows))


def _unwritten(layer: Layer, decoder: Decoder, codes: Tensor, blank: Tensor, rows: slice) -> str | None:
    """What is wrong if a row has a scale but no codes, as a hole in the file leaves it."""
    scale, offset = decoder.scale[rows], decoder.offset[rows]
    suspect = blank & (scale > _SMALLEST_SCALE).any(1) & (offset == 0).all(1)
    if layer.kind is LayerKind.W8A8S:  # here rows of zeros have the scale 1
        suspect &= ((scale - 1).abs() > 1e-5).any(1)
    for row in suspect.nonzero().flatten():
        if not bool(codes[row].view(torch.uint8).any()):
            return f"row {rows.start + int(row)} has only zeros, though its scale is {float(scale[row].max()):.3g}"
    return None


def _comparable(name: str, layer: Layer, original: TensorSource, findings: Findings) -> bool:
    if name not in original:
        return False
    shape, want = (layer.out, layer.width), original.meta(name).shape
    if want != shape:
        findings.problem(name, f"has shape {list(shape)}, the original {list(want)}")
        return False
    return True


def _compare(decoder: Decoder, exact: Tensor, values: Tensor, rows: slice, errors: _Errors) -> None:
    """Add the errors of a block of rows; ``values`` are overwritten."""
    errors.signal += float(exact.square().sum(dtype=torch.float64))
    if decoder.element == "float":
        errors.product += float((exact * values).sum(dtype=torch.float64))
        errors.kept += float((exact * (values != 0)).square().sum(dtype=torch.float64))
        errors.found += float(values.square().sum(dtype=torch.float64))
        errors.noise += float(values.sub_(exact).square().sum(dtype=torch.float64))
        return
    room = decoder.room(exact, rows)
    columns = exact.shape[1] // room.shape[1]
    errors.rounding += columns * float(room.square().sum(dtype=torch.float64)) / 3
    error = values.sub_(exact)
    errors.noise += float(error.square().sum(dtype=torch.float64))
    if errors.outside is None:
        error.abs_()
        # With one bound for a row, its largest error is enough. Where there is no error, no room is needed.
        largest = error.amax(1, keepdim=True) if room.shape[1] == 1 else error
        excess = (largest / room).masked_fill_(largest == 0, 0).amax(1)
        worst = int(excess.argmax())
        if not float(excess[worst]) <= 1:
            errors.outside = (rows.start + worst, float(excess[worst]))


def _judge(layer: Layer, errors: _Errors, method: str, findings: Findings) -> None:
    """An error within half a step everywhere is what rounding costs, however large; beyond that it is a defect, unless
    the method means it."""
    name = f"{layer.prefix}.weight"
    if layer.kind is LayerKind.W16A16S:
        _judge_pruned(name, errors, findings)
        return
    relative = _root(errors.noise, errors.signal)
    expected = _expected(layer) * (2 if method in _COMPENSATING else 1)
    outside = errors.outside
    far = f"row {outside[0]} is off by {outside[1]:.3g} times what rounding to its scale allows" if outside else ""
    if relative < expected:
        if far and method not in _MOVING:
            (findings.problem if method in _ROUNDING else findings.warn)(name, far)
        return
    large = f"its relative error against the original is {relative:.2%}, expected below {expected:.0%}"
    if far and (method not in _MOVING or errors.noise > _FAR_TOO_MUCH * errors.rounding):
        findings.problem(name, f"{large}; {far}")
    elif far:
        findings.warn(name, f"{large}; it is what {method} does to rows with outliers")
    else:
        findings.warn(name, f"{large}; every element is within half a step, so its rows have outliers")


def _judge_pruned(name: str, errors: _Errors, findings: Findings) -> None:
    """No rounding bounds what pruning does, but what it keeps must resemble the original."""
    likeness = errors.product / (errors.kept * errors.found) ** 0.5 if errors.kept * errors.found > 0 else 1.0
    if likeness < _LEAST_LIKENESS:
        findings.problem(
            name,
            f"the weights that are not zero do not resemble the original: their correlation is {likeness:.2f}, "
            f"expected at least {_LEAST_LIKENESS}",
        )


def _expected(layer: Layer) -> float:
    if layer.kind is LayerKind.W8A8S or layer.kind.weight_bits == 4:
        return _EXPECTED["four"]
    return _EXPECTED["e4m3" if "FP8" in layer.kind else "integer"]


def _root(noise: float, signal: float) -> float:
    return (noise / signal) ** 0.5 if signal else (float("inf") if noise else 0.0)

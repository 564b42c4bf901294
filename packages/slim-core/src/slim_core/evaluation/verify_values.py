"""Whether the numbers of a folder make sense, by themselves and against the model they come from.

Every tensor is read once, in blocks of rows that stay in the cache; its pages are given back before the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.checkpoint.source import TensorSource
from slim_core.evaluation.verify_findings import Contents, Findings, Module, form
from slim_core.quantization.kinds import LayerKind

__all__ = ["Bounds", "check_fused_inputs", "check_quantized", "check_untouched", "row_blocks"]

_BLOCK_ELEMENTS = 1 << 18
_HELD_ELEMENTS = 1 << 24
# A row of zero weights has the smallest scale there is, float32 epsilon.
_SMALLEST_SCALE = 1e-6
_INT32 = torch.iinfo(torch.int32)
_INT8_ERROR = 0.02


@dataclass(frozen=True)
class Bounds:
    """The original, and what may be held against it.

    Args:
        source: the float tensors, FP8 blocks decoded.
        rows: whether the weight method is known to round to the nearest code of a scale that clips nothing, so that an
            element further off than half a step is wrong and not just unusual.
    """

    source: TensorSource
    rows: bool


def row_blocks(shape: tuple[int, ...], held: Sequence[tuple[TensorSource, str]]) -> Iterator[tuple[int, int]]:
    """Blocks of rows that fit the cache; memory behind the tensors ``held`` is given back on the way and at the end."""
    width = 1
    for n in shape[1:]:
        width *= n
    step = max(1, _BLOCK_ELEMENTS // max(width, 1))
    touched = 0
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
        touched += step * width
        if touched >= _HELD_ELEMENTS:
            touched = 0
            _release(held)
    _release(held)


def _release(held: Sequence[tuple[TensorSource, str]]) -> None:
    for source, name in held:
        source.release([name])


def _all_finite(rows: Tensor) -> bool:
    """NaN and infinity survive a sum; a sum that overflows by itself is looked at closely."""
    return bool(torch.isfinite(rows.sum(dtype=torch.float32))) or bool(torch.isfinite(rows.float()).all())


def check_untouched(name: str, source: TensorSource, findings: Findings, original: TensorSource | None) -> bool:
    """Check a tensor that is passed on as it is: finite, and bit by bit that of the original (if given).

    Returns:
        Whether it is that of the original.
    """
    meta = source.meta(name)
    if original is not None and (original.meta(name).dtype, original.meta(name).shape) != (meta.dtype, meta.shape):
        want = original.meta(name)
        findings.problem(name, f"is {form(meta.dtype, meta.shape)}, the original {form(want.dtype, want.shape)}")
        original = None
    finite = equal = True
    held = [(source, name)] if original is None else [(source, name), (original, name)]
    for start, stop in row_blocks(meta.shape, held) if meta.shape else [(0, 0)]:
        rows = source.rows(name, start, stop) if meta.shape else source.load(name)
        if meta.dtype.is_floating_point and finite:
            finite = _all_finite(rows.float() if meta.dtype.itemsize == 1 else rows)
        if original is not None and equal:
            other = original.rows(name, start, stop) if meta.shape else original.load(name)
            equal = torch.equal(_bits(rows), _bits(other))
    if not finite:
        findings.problem(name, "holds NaN or infinity")
    if not equal:
        findings.problem(name, "differs from the original, expected the same bits")
    return equal


def _bits(rows: Tensor) -> Tensor:
    flat = rows.contiguous().reshape(-1).view(torch.uint8)
    return flat.view(torch.int64) if flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0 else flat


def check_quantized(
    module: Module, source: TensorSource, contents: Contents, findings: Findings, bounds: Bounds | None
) -> None:
    """Check the values of a quantized linear whose tensors are all there in the right shapes."""
    prefix = module.prefix
    names = [f"{prefix}.{suffix}" for suffix in module.parts]
    before = len(findings.problems)
    part = {suffix: source.load(f"{prefix}.{suffix}") for suffix in module.parts if suffix != "weight"}
    static = module.kind == LayerKind.W8A8
    if static:
        _check_input(prefix, part, contents, findings)
        scale = _decoded(f"{prefix}.deq_scale", part["deq_scale"], findings)
        part["deq_scale"] = scale
        _positive(f"{prefix}.deq_scale", scale, findings)
        scale = (scale.double() / part["input_scale"].double()).unsqueeze(1)
        offset = torch.zeros_like(scale)
    else:
        scale, offset = part["weight_scale"].double(), part["weight_offset"].double()
        _positive(f"{prefix}.weight_scale", scale, findings)
        _check_offset(prefix, module.kind, offset, findings)
    if "bias" in part and not _all_finite(part["bias"]):
        findings.problem(f"{prefix}.bias", "holds NaN or infinity")
    sound = len(findings.problems) == before
    row_sums = _pass(f"{prefix}.weight", source, scale, offset, findings, bounds if sound else None)
    if static and sound:
        _check_quant_bias(prefix, part, row_sums, findings)
    if bounds is not None and "bias" in part:
        _check_bias(prefix, part["bias"], bounds.source, findings)
    source.release(names)


def _decoded(name: str, stored: Tensor, findings: Findings) -> Tensor:
    """``deq_scale`` as float32; stored as such or as its bits in the low half of int64."""
    if stored.dtype == torch.float32:
        return stored
    if bool(((stored < 0) | (stored > _INT32.max)).any()):
        findings.problem(name, "holds values that are no bits of a positive float32 in the low half of int64")
        return torch.ones(stored.shape)
    return stored.to(torch.int32).view(torch.float32)


def _positive(name: str, scale: Tensor, findings: Findings) -> None:
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        value = float(scale.flatten()[row])
        findings.problem(name, f"is {value} in row {row} ({int(bad.sum())} such rows), expected finite and above 0")


def _check_input(prefix: str, part: dict[str, Tensor], contents: Contents, findings: Findings) -> None:
    scale, offset = part["input_scale"], float(part["input_offset"])
    _positive(f"{prefix}.input_scale", scale, findings)
    if not (offset == round(offset) if offset == offset and abs(offset) < 1e9 else False) or not -128 <= offset <= 127:
        findings.problem(f"{prefix}.input_offset", f"is {offset}, expected an integer in -128..127")
    dtype = contents.dtype
    if dtype is not None and float(scale) != float(scale.to(dtype)):
        findings.problem(
            f"{prefix}.input_scale",
            f"is {float(scale)!r}, expected a value that {form(dtype)} can hold, as engines store it",
        )


def _check_offset(prefix: str, kind: str, offset: Tensor, findings: Findings) -> None:
    name = f"{prefix}.weight_offset"
    if kind == LayerKind.W8A8_DYNAMIC and bool((offset != 0).any()):
        findings.problem(name, f"is not zero everywhere, as a {kind} layer needs it")
    elif bool((offset != offset.round()).any()) or bool((offset.abs() > 128).any()) or not _all_finite(offset):
        findings.problem(name, "holds values that are not integers in -128..127")


def _check_quant_bias(prefix: str, part: dict[str, Tensor], row_sums: Tensor, findings: Findings) -> None:
    exact = -part["input_offset"].double() * row_sums.double()
    if "bias" in part:
        exact = exact + part["bias"].double() / part["deq_scale"].double()
    exact = exact.clamp(_INT32.min, _INT32.max)
    off = (part["quant_bias"].double() - exact).abs()
    if float(off.max()) > 1:
        row = int(off.argmax())
        findings.problem(
            f"{prefix}.quant_bias",
            f"is {int(part['quant_bias'][row])} in row {row}, expected {float(exact[row]):.1f} "
            "(bias / deq_scale - input_offset * sum of the row's codes)",
        )


def _check_bias(prefix: str, bias: Tensor, original: TensorSource, findings: Findings) -> None:
    name = f"{prefix}.bias"
    if name not in original:
        findings.problem(name, "the original linear has no bias")
    elif not torch.equal(original.load(name).float(), bias):
        findings.problem(name, "differs from the bias of the original")


def _pass(
    name: str, source: TensorSource, scale: Tensor, offset: Tensor, findings: Findings, bounds: Bounds | None
) -> Tensor:
    """Go through a weight once: the sum of each row's codes, and with an original the error of what they stand for.

    ``scale`` and ``offset`` are float64 ``(out, 1)``.
    """
    meta = source.meta(name)
    sums = torch.empty(meta.shape[0], dtype=torch.int64)
    original = bounds.source if bounds is not None and _comparable(name, meta.shape, bounds.source, findings) else None
    noise = signal = 0.0
    outside: tuple[int, float] | None = None
    empty: str | None = None
    scale32, offset32 = scale.float(), offset.float()
    held = [(source, name)] if original is None else [(source, name), (original, name)]
    for start, stop in row_blocks(meta.shape, held):
        codes = source.rows(name, start, stop)
        sums[start:stop] = codes.sum(1)
        empty = empty or _unwritten(codes, sums[start:stop], scale32[start:stop], offset32[start:stop], start)
        if original is None:
            continue
        exact = original.rows(name, start, stop).float()
        step = scale32[start:stop]
        # Half a step, a whole one where an offset was rounded too, and room for float32 arithmetic.
        room = step * (0.5 + 0.5 * (offset32[start:stop] != 0)) + exact.abs().amax(1, keepdim=True) * 1e-5
        signal += float(exact.square().sum(dtype=torch.float64))
        error = codes.float().sub_(offset32[start:stop]).mul_(step).sub_(exact)
        noise += float(error.square().sum(dtype=torch.float64))
        excess = (error.abs_().amax(1, keepdim=True) / room).flatten()
        worst = int(excess.argmax())
        if outside is None and not float(excess[worst]) <= 1:
            outside = (start + worst, float(excess[worst]))
    if original is not None:
        _judge(name, signal, noise, outside, findings, rows=bool(bounds and bounds.rows))
    if empty:
        findings.problem(name, empty)
    return sums


def _unwritten(codes: Tensor, sums: Tensor, scale: Tensor, offset: Tensor, first: int) -> str | None:
    """What is wrong if a row has a scale but no codes, as a hole in the file leaves it."""
    for row in ((sums == 0) & (scale > _SMALLEST_SCALE).flatten() & (offset == 0).flatten()).nonzero().flatten():
        if not bool(codes[row].any()):
            return f"row {first + int(row)} has only zeros, though its scale is {float(scale[row]):.3g}"
    return None


def _comparable(name: str, shape: tuple[int, ...], original: TensorSource, findings: Findings) -> bool:
    if name not in original:
        return False
    if original.meta(name).shape != shape:
        findings.problem(name, f"has shape {list(shape)}, the original {list(original.meta(name).shape)}")
        return False
    return True


def _judge(
    name: str, signal: float, noise: float, outside: tuple[int, float] | None, findings: Findings, *, rows: bool
) -> None:
    """An error within half a step everywhere is what int8 rounding costs, however large; beyond that it is a defect."""
    relative = (noise / signal) ** 0.5 if signal else (float("inf") if noise else 0.0)
    large = f"its relative error against the original is {relative:.2%}, expected below {_INT8_ERROR:.0%}"
    far = f"row {outside[0]} is off by {outside[1]:.3g} times what rounding to its scale allows" if outside else ""
    if relative < _INT8_ERROR:
        if far:
            (findings.problem if rows else findings.warn)(name, far)
    elif far:
        findings.problem(name, f"{large}; {far}")
    else:
        findings.warn(name, f"{large}; every element is within half a step, so its rows have outliers")


def check_fused_inputs(parent: str, leaves: list[str], source: TensorSource, findings: Findings) -> None:
    """Check that static linears which engines fuse see their common input through one scale and one offset."""
    for suffix in ("input_scale", "input_offset"):
        names = [f"{parent}.{leaf}.{suffix}" for leaf in leaves]
        if any(name not in source for name in names):
            continue
        first = source.load(names[0])
        for name in names[1:]:
            value = source.load(name)
            if not torch.equal(first, value):
                findings.problem(
                    name, f"is {float(value)}, expected {float(first)} as in {names[0]}, because engines fuse them"
                )

"""Whether the numbers of a folder make sense, by themselves and against the model they come from.

Every tensor is read once, in blocks of rows that stay in the cache; its pages are given back before the next one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slim_core.checkpoint.source import TensorSource
from slim_core.evaluation.verify.comparison import Bounds, WeightPass, go_through
from slim_core.evaluation.verify.decoding import Decoder
from slim_core.evaluation.verify.findings import Contents, Findings, Layer, form
from slim_core.evaluation.verify.rows import all_finite, row_blocks
from slim_core.quantization.kinds import LayerKind
from slim_core.savers.loaders import MINDIE

__all__ = ["check_fused_inputs", "check_quantized", "check_untouched", "is_shifted"]

_INT32 = torch.iinfo(torch.int32)
_NO_EXPONENT = 255
# Kinds that may have a weight offset; for all others it is zero.
_SHIFTED = (LayerKind.W8A16, LayerKind.W4A16, LayerKind.W4A4_DYNAMIC)
_FLOAT_SCALES = ("weight_scale", "weight_scale_second", "weight_dual_scale")
# The reference tool rounds products of scales and weights to bf16, which keeps eight bits.
_BF16 = 2.0**-8


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
            finite = all_finite(rows.float() if meta.dtype.itemsize == 1 else rows)
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
    layer: Layer, source: TensorSource, contents: Contents, findings: Findings, bounds: Bounds | None
) -> WeightPass | None:
    """Check the values of a quantized linear; gives what was found in its weight, None if that could not be read."""
    prefix = layer.prefix
    names = [f"{prefix}.{suffix}" for suffix in layer.module.parts]
    before = len(findings.problems)
    part = {suffix: source.load(f"{prefix}.{suffix}") for suffix in layer.module.parts if suffix != "weight"}
    if layer.kind.has_static_input:
        _check_input(prefix, part, contents, findings)
        part["deq_scale"] = _decoded(f"{prefix}.deq_scale", part["deq_scale"], findings)
        _positive(f"{prefix}.deq_scale", part["deq_scale"], findings)
    _check_scales(prefix, part, findings)
    for suffix in ("weight_offset", "weight_offset_second"):
        if suffix in part:
            _check_offset(f"{prefix}.{suffix}", layer.kind, part[suffix], findings)
    if "bias" in part and not all_finite(part["bias"]):
        findings.problem(f"{prefix}.bias", "holds NaN or infinity")
    parts = part["scale_bias"].shape[1] if "scale_bias" in part else 1
    if layer.width % parts:
        findings.problem(
            f"{prefix}.scale_bias", f"has {parts} columns, which do not divide {layer.width} input features"
        )
    sound = len(findings.problems) == before
    seen = None
    if sound or not layer.width % parts:
        seen = go_through(layer, source, Decoder.of(layer, part), findings, bounds if sound else None, parts)
    if sound and seen is not None:
        _check_derived(layer, part, seen, findings)
    if bounds is not None and "bias" in part:
        _check_bias(prefix, part["bias"], bounds.source, findings)
    source.release(names)
    return seen


def is_shifted(layer: Layer, source: TensorSource) -> bool:
    """Whether a weight has an offset that is not zero."""
    name = f"{layer.prefix}.weight_offset"
    return layer.kind in _SHIFTED and name in source and bool((source.load(name) != 0).any())


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
        row = int(bad.nonzero()[0, 0])
        value = float(scale[bad][0])
        count = int(bad.reshape(len(bad), -1).any(1).sum())
        findings.problem(name, f"is {value} in row {row} ({count} such rows), expected finite and above 0")


def _check_scales(prefix: str, part: Mapping[str, Tensor], findings: Findings) -> None:
    for suffix in _FLOAT_SCALES:
        scale = part.get(suffix)
        if scale is None:
            continue
        name = f"{prefix}.{suffix}"
        if scale.dtype != torch.uint8:
            _positive(name, scale, findings)
        elif bool((bad := scale == _NO_EXPONENT).any()):
            row = int(bad.any(1).nonzero()[0])
            findings.problem(name, f"is 255 in row {row}, which stands for NaN; expected exponents 0..254")


def _check_input(prefix: str, part: Mapping[str, Tensor], contents: Contents, findings: Findings) -> None:
    scale, offset = part["input_scale"], float(part["input_offset"])
    _positive(f"{prefix}.input_scale", scale, findings)
    if not (offset == round(offset) if offset == offset and abs(offset) < 1e9 else False) or not -128 <= offset <= 127:
        findings.problem(f"{prefix}.input_offset", f"is {offset}, expected an integer in -128..127")
    # MindIE-SD computes in bfloat16, if it is not told otherwise.
    mindie = contents.format == MINDIE
    dtype = torch.bfloat16 if mindie else contents.dtype
    if dtype is not None and float(scale) != float(scale.to(dtype)):
        (findings.warn if mindie else findings.problem)(
            f"{prefix}.input_scale",
            f"is {float(scale)!r}, expected a value that {form(dtype)} can hold, as engines store it",
        )


def _check_offset(name: str, kind: LayerKind, offset: Tensor, findings: Findings) -> None:
    low = -(2 ** (kind.weight_bits - 1))
    if kind not in _SHIFTED:
        if bool((offset != 0).any()):
            findings.problem(name, f"is not zero everywhere, as a {kind} layer needs it")
    elif not bool(((offset == offset.round()) & (offset >= low) & (offset < -low)).all()):
        findings.problem(name, f"holds values that are not integers in {low}..{-low - 1}")


def _check_derived(layer: Layer, part: Mapping[str, Tensor], seen: WeightPass, findings: Findings) -> None:
    """Check the parameters that follow from others."""
    if layer.kind.has_static_input:
        _check_quant_bias(layer.prefix, part, seen.row_sums, findings)
    if layer.kind is LayerKind.W8A8_MIX:
        _check_deq_scale(layer.prefix, part, findings)
    if layer.kind is LayerKind.W4A8_DYNAMIC:
        _check_scale_bias(layer.prefix, part["scale_bias"], seen, findings)


def _check_quant_bias(prefix: str, part: Mapping[str, Tensor], row_sums: Tensor, findings: Findings) -> None:
    exact = -part["input_offset"].double() * row_sums.double()
    if "bias" in part:
        exact = exact + part["bias"].double() / part["deq_scale"].double()
    exact = exact.clamp(_INT32.min, _INT32.max)
    off = (part["quant_bias"].double() - exact).abs()
    if off.numel() and float(off.max()) > 1:
        row = int(off.argmax())
        findings.problem(
            f"{prefix}.quant_bias",
            f"is {int(part['quant_bias'][row])} in row {row}, expected {float(exact[row]):.1f} "
            "(bias / deq_scale - input_offset * sum of the row's codes)",
        )


def _check_deq_scale(prefix: str, part: Mapping[str, Tensor], findings: Findings) -> None:
    """Where the weight's scale is stored too, the two must say the same."""
    want = part["input_scale"].double() * part["weight_scale"].double().flatten()
    off = (part["deq_scale"].double() / want - 1).abs()
    if off.numel() and float(off.max()) > 2 * _BF16:
        row = int(off.argmax())
        findings.problem(
            f"{prefix}.deq_scale",
            f"is {float(part['deq_scale'][row]):.6g} in row {row}, expected input_scale * weight_scale = "
            f"{float(want[row]):.6g}",
        )


def _check_scale_bias(prefix: str, stored: Tensor, seen: WeightPass, findings: Findings) -> None:
    """``8 * sum(codes * scale)``, of the whole row or of each of its parts.

    A wrong order of the halves of a byte, or a wrong axis, is off by about the root of the energy of a part.
    """
    if not bool(torch.isfinite(stored).all()):
        findings.problem(f"{prefix}.scale_bias", "holds NaN or infinity")
        return
    want = 8 * seen.part_sums
    room = _BF16 * (want.abs() + 8 * seen.part_energy.sqrt()) + torch.finfo(torch.float32).tiny
    excess = (stored.double() - want).abs() / room
    if excess.numel() and float(excess.max()) > 1:
        row, column = divmod(int(excess.argmax()), stored.shape[1])
        findings.problem(
            f"{prefix}.scale_bias",
            f"is {float(stored[row, column]):.6g} in row {row}, column {column}, expected "
            f"{float(want[row, column]):.6g} (8 * sum of the codes times their scale)",
        )


def _check_bias(prefix: str, bias: Tensor, original: TensorSource, findings: Findings) -> None:
    name = f"{prefix}.bias"
    if name not in original:
        findings.problem(name, "the original linear has no bias")
    elif not torch.equal(original.load(name).float(), bias.float()):
        findings.problem(name, "differs from the bias of the original")


def check_fused_inputs(parent: str, leaves: list[str], source: TensorSource, findings: Findings) -> None:
    """Check that static linears which engines fuse see their common input through one scale and one offset.

    The queries of a cross-attention read other states than its keys and values, and are not fused with them. A name
    does not tell such an attention, so where keys and values agree, queries that do not are only warned of.
    """
    for suffix in ("input_scale", "input_offset"):
        names = [f"{parent}.{leaf}.{suffix}" for leaf in leaves]
        if any(name not in source for name in names):
            continue
        first, *others = (source.load(name) for name in names)
        if len(others) > 1 and all(torch.equal(others[0], other) for other in others):
            if not torch.equal(first, others[0]):
                findings.warn(
                    names[0],
                    f"is {float(first)}, and {float(others[0])} in {' and '.join(leaves[1:])}: right for a "
                    "cross-attention alone; engines fuse them in any other",
                )
            continue
        for name, value in zip(names[1:], others, strict=True):
            if not torch.equal(first, value):
                findings.problem(
                    name, f"is {float(value)}, expected {float(first)} as in {names[0]}, because engines fuse them"
                )

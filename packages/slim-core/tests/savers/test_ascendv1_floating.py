"""FP8 and microscaling layers in the ascendv1 format: packed, described, and read back bit by bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.errors import UnsupportedError, VerificationError
from slim_core.model.units import LinearInfo
from slim_core.quantization.floating import e2m1_codes
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import Fp8Dynamic, MxDynamic, QuantizedLinear
from slim_core.savers.ascendv1 import FP8_ENGINE_LABEL, AscendV1Saver, AscendV1SaverConfig
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.ascendv1_layout import check_layout, layout

OUT = 3
KINDS = [
    LayerKind.WFP8AFP8_DYNAMIC,
    LayerKind.W8A8_MXFP8,
    LayerKind.W4A8_MXFP,
    LayerKind.W4A4_MXFP4,
    LayerKind.W4A4_MXFP4_DUALSCALE,
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def layer_of(kind: LayerKind, width: int = 64) -> QuantizedLinear:
    """A layer whose tensors hold every code there is."""
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(OUT, generator=generator).bfloat16()
    numbers = torch.randint(0, 127, (OUT, width), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    codes = (torch.arange(OUT * width) % 16).to(torch.uint8).reshape(OUT, width)
    if kind is LayerKind.WFP8AFP8_DYNAMIC:
        return Fp8Dynamic(numbers, torch.rand(OUT, 1, generator=generator), bias)
    exponents = torch.randint(0, 255, (OUT, -(-width // 32)), dtype=torch.uint8, generator=generator)
    outer = torch.rand(OUT, 2, 1, generator=generator) if kind is LayerKind.W4A4_MXFP4_DUALSCALE else None
    return MxDynamic(kind, numbers if kind is LayerKind.W8A8_MXFP8 else codes, exponents, bias, outer)


def written(folder: Path, layer: QuantizedLinear, label: str | None = None) -> dict[str, Tensor]:
    width = layer.weight.shape[1]
    saver = AscendV1Saver(AscendV1SaverConfig())
    parts = saver.parameters(LinearInfo("m.a", "m.a", width, OUT, has_bias=True, in_block=True), layer)
    save_file(dict(parts), folder / "quant_model_weights.safetensors")
    types = {name: "FLOAT" if name.endswith(".bias") else label or str(layer.kind) for name in parts}
    (folder / "quant_model_description.json").write_text(json.dumps(types | {"version": "1.0.0"}))
    return dict(parts)


@every_kind
@pytest.mark.parametrize("width", [64, 40])
def test_read_back_bit_by_bit(kind: LayerKind, width: int, tmp_path: Path) -> None:
    layer = layer_of(kind, width)
    parts = written(tmp_path, layer)
    planned = layout(LayerForm(kind, outer_block=width // 2), "m.a", OUT, width)
    stored = {name.removeprefix("m.a."): (t.dtype, tuple(t.shape)) for name, t in parts.items()}
    assert stored.pop("bias") == (torch.float32, (OUT,))
    assert stored == {suffix: (part.dtype, part.shape) for suffix, part in planned.items()}
    back = AscendV1Folder(tmp_path).layer("m.a")
    assert back is not None
    assert type(back) is type(layer)
    assert back.kind is layer.kind
    for field in ("weight", "weight_scale", "exponents", "outer"):
        one, other = getattr(layer, field, None), getattr(back, field, None)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(bits(one), bits(other))
    x = torch.randn(4, width)
    assert torch.equal(back.simulate(x), layer.simulate(x))


def test_worked_bytes(tmp_path: Path) -> None:
    """[0.5, -1.5, 6, -0.0, 3, -4] has the codes 1, 11, 7, 8, 5, 14, and the bytes B1 87 E5."""
    codes = e2m1_codes(torch.tensor([[0.5, -1.5, 6, -0.0, 3, -4]] * OUT))
    layer = MxDynamic(LayerKind.W4A4_MXFP4, codes, torch.full((OUT, 1), 127, dtype=torch.uint8))
    parts = written(tmp_path, layer)
    assert parts["m.a.weight"].tolist() == [[0xB1, 0x87, 0xE5]] * OUT
    assert parts["m.a.weight"].dtype == torch.uint8


def test_fp8_has_offsets_of_zero(tmp_path: Path) -> None:
    parts = written(tmp_path, layer_of(LayerKind.WFP8AFP8_DYNAMIC))
    assert torch.equal(parts["m.a.weight_offset"], torch.zeros(OUT, 1))


def test_the_label_of_the_engine_is_read_too(tmp_path: Path) -> None:
    layer = layer_of(LayerKind.WFP8AFP8_DYNAMIC)
    written(tmp_path, layer, label=FP8_ENGINE_LABEL)
    back = AscendV1Folder(tmp_path).layer("m.a")
    assert isinstance(back, Fp8Dynamic)
    assert torch.equal(bits(back.weight), bits(layer.weight))


@every_kind
def test_a_missing_scale_is_named(kind: LayerKind, tmp_path: Path) -> None:
    parts = written(tmp_path, layer_of(kind))
    missing = "weight_dual_scale" if kind is LayerKind.W4A4_MXFP4_DUALSCALE else "weight_scale"
    del parts[f"m.a.{missing}"]
    save_file(parts, tmp_path / "quant_model_weights.safetensors")
    with pytest.raises(VerificationError, match=rf"^m\.a\.{missing}: the tensor is missing"):
        AscendV1Folder(tmp_path).layer("m.a")


def test_outer_scales_that_do_not_divide_the_columns(tmp_path: Path) -> None:
    layer = layer_of(LayerKind.W4A4_MXFP4_DUALSCALE)
    written(tmp_path, replace(layer, outer=torch.ones(OUT, 3, 1)))  # pyright: ignore
    with pytest.raises(VerificationError, match=r"^m\.a\.weight_dual_scale: holds 3 outer scales for 64 columns"):
        AscendV1Folder(tmp_path).layer("m.a")


@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 80))
def test_the_layout_fits_what_is_saved(kind: LayerKind, out: int, width: int) -> None:
    width += width % 2
    outer = width if kind is LayerKind.W4A4_MXFP4_DUALSCALE else 0
    planned = layout(LayerForm(kind, outer_block=outer), "m.a", out, width)
    exponents = torch.zeros(out, -(-width // 32), dtype=torch.uint8)
    if kind is LayerKind.WFP8AFP8_DYNAMIC:
        layer: QuantizedLinear = Fp8Dynamic(torch.zeros(out, width).to(torch.float8_e4m3fn), torch.ones(out, 1))
    elif kind is LayerKind.W8A8_MXFP8:
        layer = MxDynamic(kind, torch.zeros(out, width).to(torch.float8_e4m3fn), exponents)
    else:
        scales = torch.ones(out, 1, 1) if outer else None
        layer = MxDynamic(kind, torch.zeros(out, width, dtype=torch.uint8), exponents, None, scales)
    info = LinearInfo("m.a", "m.a", width, out, has_bias=False, in_block=True)
    saved = AscendV1Saver(AscendV1SaverConfig()).parameters(info, layer)
    assert {name.removeprefix("m.a."): (t.dtype, tuple(t.shape)) for name, t in saved.items()} == {
        suffix: (part.dtype, part.shape) for suffix, part in planned.items()
    }


@every_kind
def test_odd_widths_cannot_be_packed_in_pairs(kind: LayerKind) -> None:
    info = LinearInfo("l", "l", 33, 4, has_bias=False, in_block=True)
    if kind.weight_bits == 8:
        check_layout(LayerForm(kind), info)
        return
    with pytest.raises(UnsupportedError, match=r"^l: .*columns are packed in pairs, but it has 33 input features"):
        check_layout(LayerForm(kind), info)

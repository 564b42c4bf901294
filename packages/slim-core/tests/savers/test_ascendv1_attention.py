"""Quantized attentions in the format: names, shapes, keys, and the way back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from slim_core.errors import InvalidModelError, UnsupportedError, VerificationError
from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionForm, AttentionKind, QuantizedAttention, QuantizedState, StateForm
from slim_core.savers.ascendv1_attention import (
    attention_keys,
    attention_layout,
    attention_parts,
    engine_class,
    parse_quant_type,
    quant_type,
)
from slim_core.savers.ascendv1_folder import AscendV1Folder

INFO = AttentionInfo("blocks.0.attn", "layers.0.self_attn", 4, 2, 3, 5)
LATENT = AttentionInfo("blocks.1.attn", "layers.1.self_attn", 4, 1, 8, 8, latent=True)
CHANNEL, SHIFTED = StateForm("int8", "per_channel"), StateForm("int8", "per_channel", symmetric=False)
INT8, FP8 = StateForm("int8", "per_head"), StateForm("fp8_e4m3", "per_head")
INT8_TOKEN, FP8_TOKEN = StateForm("int8", "per_token"), StateForm("fp8_e4m3", "per_token")
MXFP4, MXFP8 = StateForm("mxfp4", "per_block"), StateForm("mxfp8", "per_block")
STATES = (None, INT8, FP8, INT8_TOKEN, FP8_TOKEN, MXFP4)
CACHE = AttentionForm(AttentionKind.C8, None, CHANNEL, SHIFTED)


def fa(query: StateForm | None, key: StateForm | None, value: StateForm | None) -> AttentionForm:
    return AttentionForm(AttentionKind.FAQUANT, query, key, value)


def made(form: AttentionForm, info: AttentionInfo = INFO) -> QuantizedAttention:
    """An attention of this form with numbered scales."""
    shapes = {"query": (info.heads, info.key_dim), "key": (info.kv_heads, info.key_dim)}
    shapes["value"] = (info.kv_heads, info.value_dim)
    states: dict[str, QuantizedState | None] = {"query": None, "key": None, "value": None}
    for name, state in form.states():
        if not state.is_static:
            states[name] = QuantizedState(state)
            continue
        scale = 1.0 + torch.arange(state.rows(*shapes[name]), dtype=torch.float32)
        offset = torch.zeros_like(scale) if state.symmetric else scale - 3
        states[name] = QuantizedState(state, scale, offset)
    return QuantizedAttention(form.kind, **states)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (fa(INT8, INT8, INT8), "INT8"),
        (fa(FP8_TOKEN, FP8_TOKEN, FP8_TOKEN), "FP8_DYNAMIC"),
        (fa(INT8, INT8, FP8_TOKEN), "QK_INT8_V_FP8_DYNAMIC"),
        (fa(FP8_TOKEN, FP8, FP8), "Q_FP8_DYNAMIC_KV_FP8"),
        (fa(INT8, FP8, INT8), "QV_INT8_K_FP8"),
        (fa(MXFP4, MXFP4, MXFP4), "MXFP4_DYNAMIC"),
        (fa(MXFP8, MXFP8, MXFP4), "QK_MXFP8_DYNAMIC_V_MXFP4_DYNAMIC"),
        (fa(None, INT8, None), "K_INT8"),
    ],
)
def test_quant_type(form: AttentionForm, text: str) -> None:
    assert quant_type(form) == text
    assert parse_quant_type(text) == form


@given(st.sampled_from([form for form in product(STATES, repeat=3) if any(form)]))
def test_every_quant_type_is_read_back(states: tuple[StateForm | None, ...]) -> None:
    form = fa(*states)
    assert parse_quant_type(quant_type(form)) == form


@pytest.mark.parametrize(
    "text",
    [
        *("", "FLOAT", "INT4", "Q_INT8_Q_FP8", "INT8_V_FP8", "QQ_INT8", "P_INT8", "MXFP4", "MXFP8", "QK_INT8_"),
        *("int8", "INT8X"),
    ],
)
def test_what_is_no_quant_type(text: str) -> None:
    assert parse_quant_type(text) is None


def test_what_engines_look_for() -> None:
    assert engine_class(CACHE) == "C8"
    assert engine_class(fa(INT8, INT8, INT8)) == "FAKQuant"
    assert engine_class(fa(INT8, None, None)) == "Q_INT8"


def shapes(form: AttentionForm, info: AttentionInfo) -> dict[str, tuple[str, list[int]]]:
    return {
        name: (str(part.dtype).removeprefix("torch."), list(part.shape))
        for name, part in attention_layout(info, form).items()
    }


def test_tensors_of_a_cache() -> None:
    assert shapes(CACHE, INFO) == {
        "layers.0.self_attn.k_proj.kv_cache_scale": ("float32", [6]),
        "layers.0.self_attn.k_proj.kv_cache_offset": ("float32", [6]),
        "layers.0.self_attn.v_proj.kv_cache_scale": ("float32", [10]),
        "layers.0.self_attn.v_proj.kv_cache_offset": ("float32", [10]),
    }


def test_tensors_of_the_kernel() -> None:
    assert shapes(fa(INT8, FP8, INT8_TOKEN), INFO) == {
        "layers.0.self_attn.fa_q.scale": ("float32", [4, 1]),
        "layers.0.self_attn.fa_q.offset": ("int8", [4, 1]),
        "layers.0.self_attn.fa_k.scale": ("float32", [2, 1]),
        "layers.0.self_attn.fa_k.offset": ("float32", [2, 1]),
    }
    latent = shapes(fa(INT8, INT8, INT8), LATENT)
    assert [latent[f"layers.1.self_attn.fa_{state}.scale"][1] for state in "qkv"] == [[4, 1], [1, 1], [1, 1]]
    assert shapes(fa(MXFP4, FP8_TOKEN, INT8_TOKEN), INFO) == {}


@pytest.mark.parametrize("form", [CACHE, fa(INT8, FP8, INT8_TOKEN), fa(MXFP4, None, INT8)])
def test_the_tensors_are_those_that_were_declared(form: AttentionForm) -> None:
    parts = attention_parts(INFO, made(form))
    found = {name: (str(part.dtype).removeprefix("torch."), list(part.shape)) for name, part in parts.items()}
    assert found == shapes(form, INFO)


def test_keys_beside_the_tensors() -> None:
    assert attention_keys({}) == {}
    assert attention_keys({INFO: CACHE}) == {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    assert attention_keys({INFO: fa(INT8, None, MXFP4), LATENT: CACHE}) == {
        "layers.0.self_attn.quant_type": "Q_INT8_V_MXFP4_DYNAMIC",
        "kv_cache_type": "C8",
        "kv_quant_type": "C8",
        "fa_quant_type": "FAKQuant",
    }
    assert attention_keys({INFO: fa(MXFP4, None, None)}) == {"layers.0.self_attn.quant_type": "Q_MXFP4_DYNAMIC"}


def folder(path: Path, form: AttentionForm, info: AttentionInfo = INFO, **changes: object) -> AscendV1Folder:
    parts = {name: part.contiguous() for name, part in attention_parts(info, made(form, info)).items()}
    description: dict[str, object] = {name: str(form.kind) for name in parts} | dict(attention_keys({info: form}))
    for name, value in changes.items():
        key = f"{info.prefix}.{name.replace('__', '.')}"
        if isinstance(value, torch.Tensor):
            parts[key] = value
        elif value is None:
            parts.pop(key)
        else:
            description[key] = value
    save_file(parts | {"other": torch.zeros(1)}, path / "quant_model_weights.safetensors")
    (path / "quant_model_description.json").write_text(json.dumps(description | {"other": "FLOAT"}))
    return AscendV1Folder(path)


def tensors(attention: QuantizedAttention) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    for name, state in attention.states():
        yield name, state.scale, state.offset


@pytest.mark.parametrize("form", [CACHE, fa(INT8, INT8, INT8), fa(INT8, FP8, INT8_TOKEN), fa(MXFP4, None, FP8)])
def test_reading_back(tmp_path: Path, form: AttentionForm) -> None:
    stored = folder(tmp_path, form)
    assert stored.attentions() == {"layers.0.self_attn"}
    found, expected = stored.attention(INFO), made(form)
    assert found is not None
    assert found.kind == expected.kind
    for mine, others in zip(tensors(found), tensors(expected), strict=True):
        assert mine[0] == others[0]
        for one, other in zip(mine[1:], others[1:], strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 6, 3), (1, 2, 6, 3), (1, 2, 6, 5))
    states = [torch.randn(size, generator=generator) * 100 for size in sizes]
    for one, other in zip(found.simulate(*states), expected.simulate(*states), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert stored.attention(LATENT) is None


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    def check(
        error: type[Exception], message: str, form: AttentionForm, info: AttentionInfo = INFO, **changes: object
    ) -> None:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        with pytest.raises(error, match=message):
            folder(path, form, info, **changes).attention(info)

    check(
        InvalidModelError,
        r"self_attn\.quant_type: cannot be understood: 'INT9'",
        fa(INT8, INT8, INT8),
        quant_type="INT9",
    )
    check(VerificationError, r"k_proj\.kv_cache_offset: the tensor is missing", CACHE, k_proj__kv_cache_offset=None)
    check(
        VerificationError,
        r"v_proj\.kv_cache_scale: the tensor has 4 values, the attention asks for 10",
        CACHE,
        v_proj__kv_cache_scale=torch.ones(4),
    )
    check(UnsupportedError, "both a quantized cache and FAQuant", CACHE, quant_type="INT8")
    check(UnsupportedError, "cannot become C8", CACHE, LATENT)

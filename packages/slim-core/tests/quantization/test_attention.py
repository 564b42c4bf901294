"""Quantized states against naive arithmetic, and the invariants of the formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.quantization.affine import EPSILON
from slim_core.quantization.attention import (
    AttentionForm,
    AttentionKind,
    QuantizedAttention,
    QuantizedState,
    StateForm,
    check_attention,
    state_parameters,
)

CHANNEL, HEAD = StateForm("int8", "per_channel"), StateForm("int8", "per_head")
SHIFTED = StateForm("int8", "per_channel", symmetric=False)
FP8_HEAD = StateForm("fp8_e4m3", "per_head")
DYNAMIC = [
    *(StateForm("int8", "per_token"), StateForm("fp8_e4m3", "per_token")),
    *(StateForm("mxfp8", "per_block"), StateForm("mxfp4", "per_block")),
]
E4M3 = np.unique(
    np.array(
        [(8 + m) / 8 * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
        + [m / 8 * 2.0**-6 for m in range(8)]
    )
)
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def states(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def fitted(form: StateForm, x: Tensor, dtype: torch.dtype | None = None) -> QuantizedState:
    """A state whose range is that of ``x``."""
    dims = (0, 2) if form.scope == "per_channel" else (0, 2, 3)
    low, high = x.float().amin(dims).flatten(), x.float().amax(dims).flatten()
    return QuantizedState(form, *state_parameters(form, low, high, dtype))


def naive_int8(x: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    codes = np.clip(np.round(x / scale + offset), -128, 127)
    return ((codes - offset) * scale).astype(np.float32)


def nearest(x: float, grid: np.ndarray, *, even: bool) -> float:
    """The nearest number of a grid of magnitudes; half-way to the even entry, or away from zero."""
    distance = np.abs(grid - min(abs(x), grid[-1]))
    best = np.flatnonzero(distance == distance.min())
    entry = best[-1] if len(best) == 1 or not even else best[best % 2 == 0][0]
    return float(np.copysign(grid[entry], x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_is_the_naive_arithmetic_channel_by_channel(symmetric: bool) -> None:
    x = states(0, 2, 3, 5, 4)
    state = fitted(CHANNEL if symmetric else SHIFTED, x)
    assert state.scale is not None
    assert state.offset is not None
    found = state.simulate(x).numpy()
    for head in range(3):
        for channel in range(4):
            values = x[:, head, :, channel].numpy()
            low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
            if symmetric:
                scale, offset = max(-low, high) / np.float32(127), np.float32(0)
            else:
                scale = high / np.float32(255) - low / np.float32(255)
                offset = np.clip(np.round(-low / scale) - 128, -128, 127)
            index = head * 4 + channel
            assert state.scale[index] == scale
            assert state.offset[index] == offset
            np.testing.assert_array_equal(found[:, head, :, channel], naive_int8(values, scale, offset))


def test_per_head_is_the_naive_arithmetic_head_by_head() -> None:
    x = states(1, 2, 3, 5, 4)
    state = fitted(HEAD, x)
    for head in range(3):
        values = x[:, head].numpy()
        scale = np.float32(np.abs(values).max()) / np.float32(127)
        np.testing.assert_array_equal(state.simulate(x)[:, head].numpy(), naive_int8(values, scale, np.float32(0)))


def test_fp8_per_head_rounds_to_the_grid_half_to_even_and_saturates() -> None:
    x = states(2, 1, 2, 6, 4)
    state = fitted(FP8_HEAD, x)
    beyond = x * 1.5
    for head in range(2):
        scale = np.float32(np.abs(x[:, head].numpy()).max()) / np.float32(448)
        expected = [nearest(v, E4M3, even=True) * scale for v in (beyond[:, head].numpy() / scale).flatten()]
        np.testing.assert_array_equal(state.simulate(beyond)[:, head].flatten().numpy(), np.float32(expected))


def test_per_token_has_a_scale_for_every_token_of_every_head() -> None:
    x = states(3, 2, 2, 3, 8)
    int8 = QuantizedState(StateForm("int8", "per_token")).simulate(x).numpy()
    fp8 = QuantizedState(StateForm("fp8_e4m3", "per_token")).simulate(x).numpy()
    for index in np.ndindex(2, 2, 3):
        values = x[index].numpy()
        largest = np.float32(np.abs(values).max())
        np.testing.assert_array_equal(int8[index], naive_int8(values, largest / np.float32(127), np.float32(0)))
        scale = largest / np.float32(448)
        expected = [nearest(v, E4M3, even=True) * scale for v in values / scale]
        np.testing.assert_array_equal(fp8[index], np.float32(expected))


def naive_micro(values: Any, dtype: str) -> Any:
    """One row in blocks of 32 that share an exponent, the last one shorter."""
    grid, largest, even = (E2M1, 2, False) if dtype == "mxfp4" else (E4M3, 8, True)
    found: list[float] = []
    for start in range(0, len(values), 32):
        block = values[start : start + 32]
        step = 2.0 ** (np.floor(np.log2(np.float64(np.abs(block).max()))) - largest)
        found += [nearest(v / step, grid, even=even) * step for v in block]
    return np.array(found, np.float32)


@pytest.mark.parametrize("dtype", ["mxfp4", "mxfp8"])
def test_microscaling_has_an_exponent_for_every_32_channels(dtype: str) -> None:
    x = states(4, 1, 2, 3, 48)
    found = QuantizedState(StateForm(dtype, "per_block")).simulate(x).numpy()
    for index in np.ndindex(1, 2, 3):
        np.testing.assert_array_equal(found[index], naive_micro(x[index].numpy(), dtype))


@pytest.mark.parametrize("dtype", ["mxfp4", "mxfp8"])
def test_blocks_of_the_value_lie_along_what_it_is_summed_over(dtype: str) -> None:
    state = QuantizedState(StateForm(dtype, "per_block"))
    query, key, value = states(5, 1, 2, 40, 8), states(6, 1, 2, 40, 8), states(7, 1, 2, 40, 8)
    found = QuantizedAttention(AttentionKind.FAQUANT, state, state, state).simulate(query, key, value)
    for seen, x, along in zip(found, (query, key, value), ("channels", "channels", "tokens"), strict=True):
        assert seen is not None
        rows, expected = (seen, x) if along == "channels" else (seen.mT, x.mT)
        for index in np.ndindex(*rows.shape[:-1]):
            np.testing.assert_array_equal(rows[index].numpy(), naive_micro(expected[index].numpy(), dtype))


STATIC = [CHANNEL, SHIFTED, HEAD, FP8_HEAD]
ranges = st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)).map(sorted)


@pytest.mark.parametrize("form", [*STATIC, *DYNAMIC])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-8, 8))
def test_invariants(form: StateForm, seed: int, power: int) -> None:
    x = states(seed, 2, 2, 3, 4) * 2.0**power
    x[0, 0, 0, 0] = 0
    kept = x.clone()
    state = fitted(form, x) if form.is_static else QuantizedState(form)
    y = state.simulate(x)
    assert torch.equal(x, kept)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y[0, 0, 0, 0] == 0
    if form.is_static:
        assert torch.equal(state.simulate(y), y)
        assert state.scale is not None
        assert bool((state.scale >= EPSILON).all())
        if form.dtype == "int8":
            half = state.scale.view(1, 2, 1, -1) / 2
            # The range of an offset is rounded: an end may lie half a step outside.
            reach = half * (1 if form.symmetric else 2)
            assert bool(((x - y).abs() <= reach * (1 + 1e-5)).all())
    larger = fitted(form, x * 4) if form.is_static else state
    assert torch.equal(larger.simulate(x * 4), y * 4)


@pytest.mark.parametrize("form", [CHANNEL, HEAD, FP8_HEAD, *DYNAMIC])
def test_negation(form: StateForm) -> None:
    x = states(5, 1, 2, 6, 4)
    plain, negated = (fitted(form, each) if form.is_static else QuantizedState(form) for each in (x, -x))
    assert torch.equal(negated.simulate(-x), -plain.simulate(x))


@pytest.mark.parametrize("form", [*STATIC, *DYNAMIC])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_a_container(form: StateForm, dtype: torch.dtype) -> None:
    x = states(6, 1, 2, 6, 4, dtype=dtype)
    state, wide = (fitted(form, each) if form.is_static else QuantizedState(form) for each in (x, x.float()))
    assert torch.equal(state.simulate(x), wide.simulate(x.float()).to(dtype))


def test_one_sided_zero_and_constant_channels() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[..., 1], x[..., 2] = torch.arange(4.0), -torch.arange(4.0)
    x[..., 3] = 5.0
    for form in (CHANNEL, SHIFTED):
        state = fitted(form, x)
        assert state.scale is not None
        assert state.offset is not None
        assert state.scale[0] == EPSILON
        assert bool((state.simulate(x)[..., 0] == 0).all())
        assert torch.allclose(state.simulate(x), x, rtol=0, atol=float(state.scale.max()))
    assert state.offset.tolist() == [-128, -128, 127, -128]
    assert bool((fitted(FP8_HEAD, torch.zeros(1, 1, 2, 2)).simulate(torch.zeros(1, 1, 2, 2)) == 0).all())


@settings(max_examples=60, deadline=None)
@given(bounds=ranges, dtype=st.sampled_from([torch.bfloat16, torch.float16]), form=st.sampled_from(STATIC))
def test_the_scale_fits_the_dtype_of_the_engine(bounds: Any, dtype: torch.dtype, form: StateForm) -> None:
    low, high = (torch.tensor([bound]) for bound in bounds)
    scale, offset = state_parameters(form, low, high, dtype)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert float(scale) > 0
    assert float(offset) == round(float(offset))
    assert -128 <= float(offset) <= 127
    exact, _ = state_parameters(form, low, high, None)
    assert float(scale) == pytest.approx(float(exact), rel=2**-8, abs=1e-7)
    zero = QuantizedState(form, scale, offset).simulate(torch.zeros(1, 1, 1, 1))
    assert float(zero) == 0


def test_key_and_value_are_independent_and_what_is_left_out_stays() -> None:
    q, k, v = states(7, 1, 4, 3, 2), states(8, 1, 2, 3, 2), states(9, 1, 2, 3, 2)
    key, value = fitted(SHIFTED, k), fitted(CHANNEL, v)
    cache = QuantizedAttention(AttentionKind.C8, None, key, value)
    query_out, key_out, value_out = cache.simulate(q, k, v)
    assert query_out is q
    assert torch.equal(key_out, key.simulate(k))
    assert torch.equal(value_out, value.simulate(v))
    assert cache.simulate(None, k, v)[0] is None
    only_query = QuantizedAttention(AttentionKind.FAQUANT, fitted(HEAD, q), None, None)
    assert only_query.simulate(q, k, v)[1:] == (k, v)
    assert [name for name, _ in only_query.states()] == ["query"]
    with pytest.raises(UnexpectedError, match="has no scale"):
        QuantizedState(HEAD).simulate(q)


def test_forms_in_words() -> None:
    every = AttentionForm(AttentionKind.FAQUANT, HEAD, HEAD, HEAD)
    assert str(every) == "FAQuant int8 per_head"
    assert str(AttentionForm(AttentionKind.C8, None, CHANNEL, CHANNEL)) == "C8 int8 per_channel"
    mixed = AttentionForm(AttentionKind.C8, None, SHIFTED, CHANNEL)
    assert str(mixed) == "C8 k int8 per_channel asymmetric, v int8 per_channel"
    assert str(AttentionForm(AttentionKind.FAQUANT, DYNAMIC[0], None, None)) == "FAQuant int8 per_token (q)"
    assert every.needs_data
    assert not AttentionForm(AttentionKind.FAQUANT, *DYNAMIC[:3]).needs_data
    assert (CHANNEL.rows(3, 4), HEAD.rows(3, 4)) == (12, 3)


def test_what_an_attention_cannot_become() -> None:
    cache = AttentionForm(AttentionKind.C8, None, CHANNEL, CHANNEL)
    kernel = AttentionForm(AttentionKind.FAQUANT, HEAD, HEAD, HEAD)
    plain, latent = AttentionInfo("a", "a", 4, 2, 8, 8), AttentionInfo("a", "a", 4, 1, 8, 8, latent=True)
    hidden = AttentionInfo("a", "a", 4, 2, 8, 8, sees_query=False)
    for form, info in ((cache, plain), (kernel, plain), (kernel, latent), (cache, hidden)):
        check_attention(form, info)
    forgetful = AttentionInfo("a", "a", 4, 4, 8, 8, cached=False)
    check_attention(kernel, forgetful)
    with pytest.raises(UnsupportedError, match=r"a: cannot become C8: it keeps no keys and values.*use fa3_quant"):
        check_attention(cache, forgetful)
    with pytest.raises(UnsupportedError, match=r"a: cannot become C8: .*latent.*use fa3_quant"):
        check_attention(cache, latent)
    with pytest.raises(UnsupportedError, match="cannot become FAQuant: its query cannot be reached"):
        check_attention(kernel, hidden)
    with pytest.raises(UnsupportedError, match=r"strange.*exclude this attention"):
        check_attention(cache, AttentionInfo("a", "a", 4, 2, 8, 8, problem="strange"))

"""Norms fused into linears: the output stays the same, and doing it twice changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.rotation.norm_fusion import fold_norm_bias, fuse_norm, norm_gain

EXACT = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_output_stays(widths: list[int], plus_one: bool, has_bias: bool, seed: int) -> None:
    """One norm or several side by side, with biases of their own, before a linear with or without a bias."""
    gains = [normal(width, seed=seed + i).float() for i, width in enumerate(widths)]
    shifts = torch.cat([normal(width, seed=seed + 10 + i) for i, width in enumerate(widths)])
    total = sum(widths)
    weight, bias = normal(4, total, seed=seed + 20), normal(4, seed=seed + 21) * has_bias
    x = normal(6, total, seed=seed + 22)
    factor = torch.cat(gains).double() + plus_one
    want = (x * factor + shifts) @ weight.T + bias
    fused, folded = fuse_norm(weight, norm_gain(gains, plus_one=plus_one)), bias + fold_norm_bias(weight, shifts)
    assert torch.allclose(x @ fused.T + folded, want, atol=1e-5)
    left = torch.zeros(total) if plus_one else torch.ones(total)
    assert torch.equal(fuse_norm(fused, norm_gain([left], plus_one=plus_one)), fused)
    assert not fold_norm_bias(fused, torch.zeros(total)).any()


def test_half_precision_is_computed_in_float32() -> None:
    weight, gain = normal(3, 4).bfloat16(), normal(4, seed=1).bfloat16()
    found = fuse_norm(weight, norm_gain([gain], plus_one=True))
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float() * (gain.float() + 1))
    assert fuse_norm(weight.double(), norm_gain([gain])).dtype == EXACT


@pytest.mark.parametrize("gain", [torch.ones(3), torch.ones(5), torch.ones(4, 1), torch.ones(())])
def test_shapes_that_do_not_fit(gain: Tensor) -> None:
    for use in (fuse_norm, fold_norm_bias):
        with pytest.raises(
            UnsupportedError, match=r"a norm of shape \[.*cannot be fused into a weight of shape \[2, 4\]"
        ):
            use(torch.ones(2, 4), gain)
    with pytest.raises(UnsupportedError, match="cannot be fused"):
        fuse_norm(torch.ones(4), torch.ones(4))

"""The integer product, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.quantization.integer import int8_matmul

WIDTHS = st.one_of(st.integers(0, 40), st.sampled_from([1023, 1024, 1025, 2047, 2048, 2049, 5000]))


@given(st.integers(0, 4), st.integers(1, 4), WIDTHS, st.integers(0, 2**32 - 1))
def test_equals_int64(tokens: int, out: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (out, width), generator=generator, dtype=torch.int8)
    product = int8_matmul(x, weight)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("width", [1023, 1024, 1025, 3072, 3073])
@pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, 127), (127, -127)])
def test_extremes(width: int, a: int, b: int) -> None:
    x = torch.full((2, width), a, dtype=torch.int8)
    weight = torch.full((3, width), b, dtype=torch.int8)
    weight[1, ::2] = 1  # odd sums next to 2^24
    assert torch.equal(int8_matmul(x, weight).long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("width", [1025, 1500, 2048, 4096])
def test_sums_that_float32_cannot_hold(width: int) -> None:
    x = torch.full((1, width), -128, dtype=torch.int8)
    weight = torch.full((1, width), -128, dtype=torch.int8)
    x[0, -1] = weight[0, -1] = 1
    assert int(int8_matmul(x, weight)) == (width - 1) * 16384 + 1

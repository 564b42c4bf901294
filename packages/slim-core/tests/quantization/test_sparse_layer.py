"""W16A16S layers compute what a float linear computes."""

from __future__ import annotations

import pytest
import torch

from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import SparseFloat

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6), (1, 0, 6)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_simulation(dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=g).to(dtype) * (torch.rand(4, 6, generator=g) > 0.5)
    bias = torch.randn(4, generator=g).to(dtype) if with_bias else None
    x = torch.randn(shape, generator=g).to(dtype)
    layer = SparseFloat(weight, bias)
    assert layer.kind is LayerKind.W16A16S
    y = layer.simulate(x)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(layer.dequantized(), weight.float())
    other = torch.float32 if dtype is not torch.float32 else torch.bfloat16
    assert layer.simulate(x.to(other)).dtype == other

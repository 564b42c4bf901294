"""Activations as quantized layers see them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slim_core.quantization.autoround.inputs import DynamicInput, FloatInput, StaticInput

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_float() -> None:
    x = random(3, 4)
    assert FloatInput()(x) is x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 9), (0, 4), (1, 1)])
def test_dynamic(bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape).to(dtype).requires_grad_()
    y = DynamicInput(bits)(x)
    exact = x.detach().double().numpy()
    scale = np.maximum(np.abs(exact).max(-1, keepdims=True) / (2 ** (bits - 1) - 1), 2.0**-23)
    assert y.dtype == torch.float32
    assert np.allclose(y.detach().numpy(), np.round(exact / scale) * scale, atol=1e-6)
    weights = random(*shape, seed=1)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(gradient, weights.to(dtype))


def test_one_token_does_not_change_another() -> None:
    x = random(2, 8)
    louder = x * torch.tensor([[1.0], [50.0]])
    assert torch.equal(DynamicInput(4)(x)[0], DynamicInput(4)(louder)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_static(dtype: torch.dtype) -> None:
    x = (3 * random(4, 50)).to(dtype).requires_grad_()
    y = StaticInput(torch.tensor([0.02]), torch.tensor([-20.0]))(x)
    exact = x.detach().double().numpy()
    low, high = (-128 + 20) * 0.02, (127 + 20) * 0.02
    # Whether a value in the middle between two codes goes up or down depends on the last bit.
    assert np.abs(y.detach().numpy() - np.clip(exact, low, high)).max() <= 0.0101
    assert float(y.detach().min()) == pytest.approx(low)
    assert float(y.detach().max()) == pytest.approx(high)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    inside = (exact > low - 0.009) & (exact < high + 0.009)
    outside = (exact < low - 0.011) | (exact > high + 0.011)
    assert bool((gradient[torch.from_numpy(inside)] == 1).all())
    assert bool((gradient[torch.from_numpy(outside)] == 0).all())
    assert outside.any()

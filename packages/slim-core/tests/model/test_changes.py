"""Parameters with changed values: new tensors, whatever the size and the dtype."""

from __future__ import annotations

import pytest
import torch

from slim_core.model.changes import with_columns, with_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_many_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3000, 512, generator=generator).to(dtype)
    before = value.clone()
    columns = 2.0 ** torch.randint(-2, 3, (512,), generator=generator)
    assert torch.equal(with_columns(columns, value), (before.float() * columns).to(dtype))
    rows = torch.randperm(3000, generator=generator)[:2500]
    scale = 2.0 ** torch.randint(-2, 3, (2500,), generator=generator)
    expected = before.float().clone()
    expected[rows] /= scale.unsqueeze(1)
    assert torch.equal(with_rows(rows, scale, value), expected.to(dtype))
    assert torch.equal(value, before)


def test_biases() -> None:
    value = torch.tensor([1.0, 2.0, 4.0])
    assert with_rows(torch.tensor([2, 0]), torch.tensor([4.0, 2.0]), value).tolist() == [0.5, 2.0, 1.0]
    assert value.tolist() == [1.0, 2.0, 4.0]

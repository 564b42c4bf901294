"""Quick sums of rows: the bits of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slim_llm.models.row_sums import QuickRowSums


def both(target: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    want = target.clone().index_add_(0, index, rows)
    got = target.clone()
    with QuickRowSums():
        assert got.index_add_(0, index, rows) is got
    return want, got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(40, 24), (40, 3, 8), (40,)])
def test_sums_are_those_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=generator).to(dtype)
    index = torch.randperm(40, generator=generator)[:17]
    rows = (torch.randn(17, *shape[1:], generator=generator) * 3).to(dtype)
    want, got = both(target, index, rows)
    assert torch.equal(want, got)


def test_rows_named_twice_get_both() -> None:
    target, index = torch.zeros(4, 2, dtype=torch.bfloat16), torch.tensor([1, 1, 3])
    want, got = both(target, index, torch.ones(3, 2, dtype=torch.bfloat16))
    assert torch.equal(want, got)
    assert got[1].tolist() == [2, 2]


def test_other_dimensions_and_factors_are_left_to_torch() -> None:
    target, rows = torch.zeros(3, 4, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16)
    with QuickRowSums():
        target.index_add_(1, torch.tensor([0, 2]), rows)
        target.index_add_(0, torch.tensor([1]), torch.ones(1, 4, dtype=torch.bfloat16), alpha=2)
    assert target.tolist() == [[1, 0, 1, 0], [3, 2, 3, 2], [1, 0, 1, 0]]


def test_gradients_flow_to_what_is_added() -> None:
    rows = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    with QuickRowSums():
        total = torch.zeros(4, 3, dtype=torch.bfloat16).index_add_(0, torch.tensor([2, 0]), rows)
    (total * torch.arange(4).unsqueeze(1)).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [2, 0]

"""Masks of the smallest elements, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.sparsity import selection
from slim_core.sparsity.selection import smallest

VALUES = st.lists(
    st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, torch.finfo(torch.float32).max]),
    ),
    min_size=1,
    max_size=40,
)


@given(VALUES, st.data())
def test_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    want = np.zeros(len(values), dtype=bool)
    want[np.argsort(np.abs(np.float32(values)), kind="stable")[:count]] = True
    assert smallest(torch.tensor(values), count).tolist() == want.tolist()


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 31, generator=torch.Generator().manual_seed(0))
    x[::2] = x[0].clone()  # many ties
    want = [smallest(x, count) for count in range(0, 187, 31)]
    monkeypatch.setattr(selection, "_BLOCK", block)
    for count, mask in zip(range(0, 187, 31), want, strict=True):
        found = smallest(x, count)
        assert found.shape == x.shape
        assert int(found.sum()) == count
        assert torch.equal(found, mask)


def test_nothing_of_nothing() -> None:
    assert smallest(torch.empty(0, 3), 0).shape == (0, 3)

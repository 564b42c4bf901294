"""What the tests of several weight methods use."""

from __future__ import annotations

import pytest
from torch import Tensor


class CountedRows:
    """A matrix in memory; counts how often each row is read."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = tuple(matrix.shape)
        self.reads = [0] * len(matrix)

    def rows(self, start: int, stop: int) -> Tensor:
        for row in range(start, stop):
            self.reads[row] += 1
        return self.matrix[start:stop]


@pytest.fixture
def counted_rows() -> type[CountedRows]:
    """``counted_rows(matrix)``: the matrix as a source of rows, with ``reads`` of every row."""
    return CountedRows

"""Rotations that are given as a matrix, and how far a matrix is from being one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.rotation.matrices import Rotation

__all__ = ["DenseRotation", "orthogonality_error"]

_ORTHOGONAL_ENOUGH = 1e-5


@dataclass(frozen=True)
class DenseRotation(Rotation):
    """A matrix that is given, e.g. a learned one: square, float32 or float64, never written to.

    Two are equal if their digests are.

    Raises:
        UnsupportedError: it is not square, not finite or not orthogonal.
    """

    matrix: Tensor = field(repr=False, compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise UnsupportedError(f"a rotation is a square matrix, not of shape {list(shape)}")
        if not (error := orthogonality_error(self.matrix)) <= _ORTHOGONAL_ENOUGH:
            raise UnsupportedError(f"the matrix is not orthogonal: R R^T differs from the identity by {error:.1e}")
        data = self.matrix.detach().double().cpu().contiguous().numpy()
        object.__setattr__(self, "digest", hashlib.sha256(data.tobytes()).hexdigest()[:16])

    @property
    def size(self) -> int:
        return len(self.matrix)

    @cached_property
    def _single(self) -> Tensor:
        return self.matrix.float()

    def rotate(self, cube: Tensor, inverse: bool) -> Tensor:
        matrix = (self._single if cube.dtype == torch.float32 else self.matrix.double()).to(cube.device)
        matrix = matrix.T if inverse else matrix
        return (cube.squeeze(2) @ matrix).unsqueeze(2) if cube.shape[2] == 1 else torch.matmul(matrix.T, cube)


def orthogonality_error(rotation: Rotation | Tensor) -> float:
    """The largest entry of ``|R R^T - I|``, computed in float64; NaN if R holds one."""
    matrix = rotation.dense() if isinstance(rotation, Rotation) else rotation.double()
    return float(
        (matrix @ matrix.T).sub_(torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)).abs().max()
    )

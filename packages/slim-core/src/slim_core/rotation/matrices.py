"""Orthogonal matrices that are multiplied onto weights, as small immutable values.

With ``R`` between two linears, the one that reads takes ``W R`` (:meth:`Rotation.right`) and the one that writes takes
``R^T W`` and ``R^T b`` (:meth:`Rotation.left`); what they compute together stays the same (QuaRot, arXiv 2404.00456).
Randomised Hadamard matrices are applied without being built. Two rotations are equal if they are the same matrix by
construction; their text says which, so that a plan can be printed and compared.

Everything is computed in float32, or in float64 for float64 tensors. In float32 the largest error is about 1e-6 of the
root mean square of the results, three orders below what bfloat16 resolves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.rotation.hadamard import apply_hadamard, hadamard_factors

__all__ = [
    "Concatenated",
    "Hadamard",
    "Identity",
    "Kronecker",
    "Rotation",
    "create_rotation",
    "repeated_to",
]

SEED = 1234


class Rotation(ABC):
    """An orthogonal matrix ``R`` of ``size`` rows and columns."""

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def rotate(self, cube: Tensor, inverse: bool) -> Tensor:
        """``(outer, size, inner)`` times R along the middle, or times R^T; dtype and shape stay."""

    def along(self, x: Tensor, dim: int, *, inverse: bool = False) -> Tensor:
        """``x R`` along one axis, which is ``R^T x`` where that axis is the first; with R^T if ``inverse``.

        Args:
            x: any float dtype and shape; not written to.

        Returns:
            float64 for a float64 tensor, float32 for all others.

        Raises:
            UnsupportedError: the axis has another length.
        """
        if x.shape[dim] != self.size:
            raise UnsupportedError(
                f"a rotation of size {self.size} cannot be applied to an axis of length {x.shape[dim]}",
                remedy="repeat it explicitly if it is meant for parts of the axis",
            )
        dim %= x.dim()
        exact = x if x.dtype == torch.float64 else x.float()
        cube = exact.reshape(math.prod(x.shape[:dim]), self.size, math.prod(x.shape[dim + 1 :]))
        return self.rotate(cube, inverse).reshape(x.shape)

    def right(self, weight: Tensor) -> Tensor:
        """``W R``: what a linear becomes whose input is rotated, or an embedding whose output is."""
        return self.along(weight, -1)

    def left(self, weight: Tensor) -> Tensor:
        """``R^T W``, or ``R^T b`` of a vector: what a linear becomes whose output is rotated."""
        return self.along(weight, 0)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix itself, computed in float64."""
        return self.along(torch.eye(self.size, dtype=torch.float64), -1).to(dtype)


@dataclass(frozen=True)
class Identity(Rotation):
    """Leaves ``length`` channels as they are."""

    length: int

    @property
    def size(self) -> int:
        return self.length

    def rotate(self, cube: Tensor, inverse: bool) -> Tensor:
        return cube


@lru_cache(64)
def _signs(order: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (order,), generator=generator).mul_(2).sub_(1)


@dataclass(frozen=True)
class Hadamard(Rotation):
    """``D H / sqrt(n)``: a Hadamard matrix whose rows have random signs.

    The signs come from a generator of their own with this seed: the same on every machine and rank.

    Raises:
        UnsupportedError: no Hadamard matrix of this order can be constructed.
    """

    order: int
    seed: int = SEED

    def __post_init__(self) -> None:
        hadamard_factors(self.order)

    @property
    def size(self) -> int:
        return self.order

    def rotate(self, cube: Tensor, inverse: bool) -> Tensor:
        scale = _signs(self.order, self.seed).double() / math.sqrt(self.order)
        scale = scale.to(device=cube.device, dtype=cube.dtype).unsqueeze(1)
        if inverse:
            return apply_hadamard(cube, 1, transpose=True).mul_(scale)
        return apply_hadamard(cube * scale, 1)


@dataclass(frozen=True)
class Kronecker(Rotation):
    """``A (x) B``: channels are seen as ``(A.size, B.size)`` and rotated along both.

    With an :class:`Identity` for A this is B repeated on the diagonal: one rotation per head, or per block.
    """

    outer: Rotation
    inner: Rotation

    @property
    def size(self) -> int:
        return self.outer.size * self.inner.size

    def rotate(self, cube: Tensor, inverse: bool) -> Tensor:
        before, a, b, after = cube.shape[0], self.outer.size, self.inner.size, cube.shape[2]
        cube = self.outer.rotate(cube.reshape(before, a, b * after), inverse)
        return self.inner.rotate(cube.reshape(before * a, b, after), inverse).reshape(before, a * b, after)


@dataclass(frozen=True)
class Concatenated(Rotation):
    """The parts one after the other on the diagonal."""

    parts: tuple[Rotation, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def rotate(self, cube: Tensor, inverse: bool) -> Tensor:
        rotated: list[Tensor] = []
        start = 0
        for part in self.parts:
            rotated.append(part.rotate(cube[:, start : start + part.size].contiguous(), inverse))
            start += part.size
        return torch.cat(rotated, 1)


def create_rotation(size: int, block_size: int = -1) -> Rotation:
    """The rotation of a size and a block size; always the same matrix for the same arguments.

    Args:
        block_size: -1 for one Hadamard matrix of the whole size, else the size of the one matrix that is repeated on
            the diagonal.

    Raises:
        UnsupportedError: the block size does not divide the size, or there is no Hadamard matrix of the order.
    """
    if block_size in (-1, size):
        return Hadamard(size)
    if block_size < 1 or size % block_size:
        raise UnsupportedError(
            f"a block size of {block_size} does not divide {size}", remedy="use -1 or a power of two that divides it"
        )
    return Kronecker(Identity(size // block_size), Hadamard(block_size))


def repeated_to(rotation: Rotation, width: int) -> Rotation:
    """The rotation repeated on the diagonal up to a width: once per head.

    Raises:
        UnsupportedError: its size does not divide the width.
    """
    if rotation.size == width:
        return rotation
    if width % rotation.size:
        raise UnsupportedError(f"a rotation of size {rotation.size} cannot be repeated up to a width of {width}")
    return Kronecker(Identity(width // rotation.size), rotation)

"""Rotating the input of linears while the model runs, as an engine does that was given the matrices."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.checkpoint.source import TensorSource
from slim_core.errors import VerificationError
from slim_core.model.inputs import change_inputs
from slim_core.rotation.matrices import Identity, Kronecker

__all__ = ["UNDESCRIBED", "InputRotation", "InputRotations", "install", "read_input_rotations", "rotating"]

_HEADS = ".heads_rotation"
_OUTER, _INNER = ".kronecker_rotation_m", ".kronecker_rotation_n"
UNDESCRIBED = (_HEADS, _OUTER, _INNER)
"""How names of tensors end of which the description of an ascendv1 folder says nothing."""


@dataclass(frozen=True, eq=False)
class InputRotation:
    """``x (M (x) N)``: channels are seen as ``(m, n)``, and ``x`` becomes ``M^T x N``.

    Args:
        outer: float32 M ``(m, m)``.
        inner: float32 N ``(n, n)``; None for the identity.
    """

    outer: Tensor
    inner: Tensor | None = None

    @classmethod
    def of(cls, rotation: Kronecker) -> InputRotation:
        """The one that turns inputs as a weight must be turned from the right."""
        inner = None if isinstance(rotation.inner, Identity) else rotation.inner.dense(torch.float32)
        return cls(rotation.outer.dense(torch.float32), inner)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors that an engine needs, by name."""
        if self.inner is None:
            return {prefix + _HEADS: self.outer}
        return {prefix + _OUTER: self.outer, prefix + _INNER: self.inner}

    def rotate(self, x: Tensor) -> Tensor:
        """The rotated input ``(..., m * n)``, computed in float32, in the dtype of ``x``; gradients flow."""
        outer = self.outer.to(x.device)
        seen = x.float().reshape(*x.shape[:-1], len(outer), -1)
        turned = outer.T @ seen
        if self.inner is not None:
            turned = turned @ self.inner.to(x.device)
        return turned.reshape(x.shape).to(x.dtype)


InputRotations = Mapping[str, InputRotation]
"""By module name."""


def install(root: nn.Module, rotations: InputRotations) -> list[Any]:
    """From now on the inputs of these modules are rotated; handles that put an end to it."""
    return change_inputs(root, {name: rotation.rotate for name, rotation in rotations.items()})


@contextmanager
def rotating(root: nn.Module, rotations: InputRotations) -> Generator[None]:
    """Within this context the inputs of modules are rotated."""
    handles = install(root, rotations)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_input_rotations(source: TensorSource) -> dict[str, InputRotation]:
    """The rotations that a checkpoint has for inputs of linears, by the prefix of their tensors.

    Raises:
        VerificationError: one of a pair is missing.
    """
    found: dict[str, InputRotation] = {}
    for name in source:
        if name.endswith(_HEADS):
            found[name.removesuffix(_HEADS)] = InputRotation(source.load(name).float())
        elif name.endswith(_OUTER):
            prefix = name.removesuffix(_OUTER)
            if prefix + _INNER not in source:
                raise VerificationError("the tensor is missing", where=prefix + _INNER)
            found[prefix] = InputRotation(source.load(name).float(), source.load(prefix + _INNER).float())
    return found

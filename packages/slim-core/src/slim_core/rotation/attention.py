"""Query and key rotated by one orthogonal matrix while the model runs: what attention kernels in few bits are given.

``(q R)(k R)^T = q k^T``, so that scores stay what they are, whatever R is; but the outlier channels that query and key
have are spread over all channels of a head (QuaRot, arXiv 2404.00456, section 4.2). R comes after rotary embedding,
which it does not commute with, so it cannot be multiplied into weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import VerificationError
from slim_core.model.attention import AttentionAccess, AttentionInfo, States, Tap
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit

__all__ = ["KEY_ROTATION", "QUERY_ROTATION", "QueryKeyRotation", "rotate_queries_and_keys", "stored_rotations"]

QUERY_ROTATION, KEY_ROTATION = "q_rot", "k_rot"
"""Last parts of the names of the matrices, behind that of the attention; engines compute ``x @ matrix``."""


@dataclass(frozen=True, eq=False)
class QueryKeyRotation:
    """The matrices of one attention, ``(key_dim, key_dim)`` in the dtype that they are written in."""

    query: Tensor
    key: Tensor


class _RotatedAttentions:
    """Shows the states of an :class:`AttentionAccess` rotated, and goes on with what becomes of them."""

    def __init__(self, inner: AttentionAccess, rotations: Mapping[str, QueryKeyRotation]) -> None:
        self._inner = inner
        self._rotations = rotations

    @property
    def attentions(self) -> Sequence[AttentionInfo]:
        return tuple(_noted(info, self._rotations) for info in self._inner.attentions)

    def tapped(self, taps: Mapping[str, Tap]) -> AbstractContextManager[None]:
        rotations = self._rotations
        return self._inner.tapped(
            {name: _shown_rotated(tap, rotations[name]) if name in rotations else tap for name, tap in taps.items()}
        )


def _noted(info: AttentionInfo, rotations: Mapping[str, QueryKeyRotation]) -> AttentionInfo:
    return replace(info, rotated=True) if info.name in rotations else info


def _shown_rotated(tap: Tap, rotation: QueryKeyRotation) -> Tap:
    def rotated(query: Tensor | None, key: Tensor, value: Tensor) -> States | None:
        turned = None if query is None else _times(query, rotation.query)
        return tap(turned, _times(key, rotation.key), value)

    return rotated


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """As engines compute it: rounded once, to the dtype of the states."""
    return (x.float() @ matrix.to(device=x.device, dtype=torch.float32)).to(x.dtype)


def rotate_queries_and_keys(model: StreamedModel, rotations: Mapping[str, QueryKeyRotation]) -> StreamedModel:
    """The same model, these attentions having a rotation for their queries and keys.

    Whoever taps them sees rotated states. Their units are given the matrices as additional parameters.

    Args:
        rotations: by the module name of the attention.
    """
    if not rotations:
        return model
    assert model.attention is not None
    rotated = copy(model)
    rotated.attention = _RotatedAttentions(model.attention, rotations)
    rotated.units = [_with_matrices(unit, rotations) for unit in model.units]
    return rotated


def _with_matrices(unit: Unit, rotations: Mapping[str, QueryKeyRotation]) -> Unit:
    added = dict(unit.added)
    for info in unit.attentions:
        if (found := rotations.get(info.name)) is not None:
            for leaf, matrix in ((QUERY_ROTATION, found.query), (KEY_ROTATION, found.key)):
                added[f"{info.name}.{leaf}"] = TensorMeta(f"{info.prefix}.{leaf}", matrix.dtype, tuple(matrix.shape))
    return replace(unit, attentions=tuple(_noted(info, rotations) for info in unit.attentions), added=added)


def stored_rotations(attentions: Sequence[AttentionInfo], source: TensorSource) -> dict[str, QueryKeyRotation]:
    """The rotations that files hold for attentions, by module name.

    Raises:
        VerificationError: there is one of the two matrices of an attention only, or one of another shape.
    """
    found: dict[str, QueryKeyRotation] = {}
    for info in attentions:
        names = [f"{info.prefix}.{leaf}" for leaf in (QUERY_ROTATION, KEY_ROTATION)]
        here = [name for name in names if name in source]
        if not here:
            continue
        if len(here) == 1:
            missing = next(name for name in names if name not in source)
            raise VerificationError("the tensor is missing, and query and key would differ", where=missing)
        for name in names:
            if (shape := source.meta(name).shape) != (info.key_dim, info.key_dim):
                raise VerificationError(
                    f"has the shape {list(shape)}, the attention asks for {[info.key_dim] * 2}", where=name
                )
        found[info.name] = QueryKeyRotation(*(source.load(name) for name in names))
    return found

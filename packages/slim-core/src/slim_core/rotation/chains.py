"""What becomes of a tensor of the checkpoint on its way: steps that are plain values, to be printed and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.rotation.matrices import Rotation

__all__ = ["Chain", "Fill", "FoldNormBias", "FuseNorm", "RotateLeft", "RotateRight", "Step", "checked_meta", "read_by"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FuseNorm:
    """``W diag(g)`` of a matrix; g from the stored weights of one norm, or of several whose outputs are concatenated.

    ``plus_one``: the norms multiply with ``1 + w``.
    """

    norms: tuple[str, ...]
    plus_one: bool = False


@dataclass(frozen=True)
class RotateRight:
    """``W R`` of a matrix."""

    rotation: Rotation


@dataclass(frozen=True)
class RotateLeft:
    """``R^T W`` of a matrix, ``R^T b`` of a vector."""

    rotation: Rotation


@dataclass(frozen=True)
class FoldNormBias:
    """``c + W b`` of a linear's bias: W is the stored weight, b the stored bias of the norm before it."""

    weight: str
    norm_bias: str


@dataclass(frozen=True)
class Fill:
    """A constant in place of a vector: 1 for the weight of a norm that was fused, 0 for its bias and for ``1 + w``."""

    value: float


Step = FuseNorm | RotateRight | RotateLeft | FoldNormBias | Fill


@dataclass(frozen=True)
class Chain:
    """What a tensor becomes: steps in the order in which they are taken.

    Args:
        origin: the stored tensor to begin with. None: the one of the same name; or, if there is none, a vector of
            zeros, for a bias that begins with :class:`FoldNormBias`.
    """

    steps: tuple[Step, ...] = ()
    origin: str | None = None


def read_by(chain: Chain) -> list[str]:
    """The stored tensors that a chain reads."""
    names = [chain.origin] if chain.origin is not None else []
    for step in chain.steps:
        match step:
            case FuseNorm(norms, _):
                names += norms
            case FoldNormBias(weight, norm_bias):
                names += [weight, norm_bias]
            case _:
                pass
    return names


def checked_meta(inner: TensorSource, name: str, chain: Chain) -> TensorMeta:
    """What a chain makes, once it is sure that every step can be taken.

    Raises:
        InvalidModelError: it begins with, or reads, a tensor that is not there.
        UnsupportedError: a step does not fit the tensor; names it.
    """
    for origin in read_by(chain):
        if origin not in inner:
            raise InvalidModelError(f"there is no tensor {origin!r}, from which it is made", where=name)
        if chain.steps and (dtype := inner.meta(origin).dtype) not in _FLOATS:
            raise UnsupportedError(
                f"is stored as {str(dtype).removeprefix('torch.')} and cannot be transformed",
                where=origin,
                remedy="start from a floating-point checkpoint",
            )
    if chain.origin is not None:
        meta = replace(inner.meta(chain.origin), name=name)
    elif chain.steps and isinstance(first := chain.steps[0], FoldNormBias):
        weight = inner.meta(first.weight)
        meta = TensorMeta(name, weight.dtype, weight.shape[:1])
    else:
        raise InvalidModelError("is not in the checkpoint, and its chain names nothing that it is made of", where=name)
    for step in chain.steps:
        if reason := _misfit(inner, meta.shape, step):
            raise UnsupportedError(reason, where=name)
    return meta


def _misfit(inner: TensorSource, shape: tuple[int, ...], step: Step) -> str | None:
    """Why a step cannot be taken on a tensor of this shape; None if it can."""
    kind = type(step).__name__
    wanted = {FuseNorm: (2,), RotateRight: (2,), RotateLeft: (1, 2), FoldNormBias: (1,), Fill: (1,)}[type(step)]
    if len(shape) not in wanted:
        return f"{kind} cannot be applied to a tensor of shape {list(shape)}"
    match step:
        case FuseNorm(norms, _):
            lengths = [inner.meta(norm).shape for norm in norms]
            if any(len(length) != 1 for length in lengths) or sum(length[0] for length in lengths) != shape[1]:
                return f"norms of shape {', '.join(map(str, lengths))} do not fit its {shape[1]} input features"
        case RotateRight(rotation) if rotation.size != shape[1]:
            return f"a rotation of size {rotation.size} does not fit its {shape[1]} input features"
        case RotateLeft(rotation) if rotation.size != shape[0]:
            return f"a rotation of size {rotation.size} does not fit its {shape[0]} output features"
        case FoldNormBias(weight, norm_bias):
            matrix, vector = inner.meta(weight).shape, inner.meta(norm_bias).shape
            if len(matrix) != 2 or matrix != (*shape, *vector):
                return f"{norm_bias!r} {list(vector)} does not fit {weight!r} {list(matrix)}"
        case _:
            pass
    return None

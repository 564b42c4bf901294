"""Pruning a linear while its other weights make up for what is lost, by ADMM (arXiv 2401.02938).

For inputs ``x`` with second moment ``H = E[x x^T]``, a sparse ``P`` is sought that is near ``W`` in the output:
``tr((P - W) H (P - W)^T)`` is small. In units of every channel's root mean square ``d``, with ``A = H / (d d^T)``,
``V0 = W d`` and a damping ``rho`` that draws the solution to ``V0``, one iteration is::

    M = all but the smallest of |V + U|         U = V + U - (V + U) M
    V = (A + (rho + 1) I)^-1 ((A + rho I) V0 + (V + U) M - U)

Written for the one state ``S = V + U``, with ``T = S`` where it is kept and ``T = -S`` where it is dropped::

    S = V0 + (A + (rho + 1) I)^-1 (T - V0) + S (1 - M)

which needs neither ``A`` nor a second state. The number of dropped weights grows over the first iterations by the cubic
schedule of gradual pruning (arXiv 1710.01878), steeply at first; then the mask stands still and ``V`` settles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.sparsity.selection import smallest

__all__ = ["InputMetric", "prune"]

_linalg: Any = torch.linalg  # its members have no types
_ITERATIONS = 20
_RAMP = 15
_DAMPING = 0.1
_PENALTY = 1.0
# A channel that is next to zero counts as this share of the average one, so that dividing by it stays possible.
_FLOOR = 1e-8
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class InputMetric:
    """What pruning needs to know of an input; linears with the same input share it.

    Args:
        scale: float32 ``(in,)``, the root mean square of every channel, above 0.
        factor: lower Cholesky factor ``(in, in)`` of the normalised and damped second moment; float32, or float64 if
            float32 was not enough.
    """

    scale: Tensor
    factor: Tensor

    @classmethod
    def of(cls, second_moment: Tensor, name: str) -> InputMetric | None:
        """The metric of an input, None if all its channels are zero.

        Args:
            second_moment: float32 ``(in, in)``, finite; overwritten.
            name: the linear, for errors.

        Raises:
            InvalidModelError: the matrix is no second moment.
        """
        scale = second_moment.diagonal().clamp(min=0).sqrt()
        typical = float(scale.square().mean().sqrt())
        if typical == 0:
            return None
        scale = scale + _FLOOR * typical
        normal = second_moment.div_(scale).div_(scale.unsqueeze(1))
        diagonal = normal.diagonal()
        diagonal.add_(_DAMPING * diagonal.mean() + _PENALTY)
        return cls(scale, _cholesky(normal, name))

    def solve(self, rows: Tensor) -> Tensor:
        """``rows @ (A + (rho + 1) I)^-1``, float32 ``(rows, in)``."""
        # Not torch.cholesky_solve: it copies the factor first, which takes as long again for a wide one.
        half = _linalg.solve_triangular(self.factor.mT, rows.to(self.factor.dtype), upper=True, left=False)
        return _linalg.solve_triangular(self.factor, half, upper=False, left=False).to(rows.dtype)


def _cholesky(matrix: Tensor, name: str) -> Tensor:
    """Its lower factor in float32, or in float64 where rounding made it look indefinite.

    Raises:
        InvalidModelError: it is indefinite.
    """
    for dtype in (torch.float32, torch.float64):
        factor, failed = _linalg.cholesky_ex(matrix.to(dtype))
        if not int(failed):
            return factor
    raise InvalidModelError(
        "the second moment of its inputs is not positive definite",
        where=name,
        remedy="check the model and the calibration set",
    )


def prune(weight: Tensor, ratio: float, metric: InputMetric | None, name: str) -> Tensor:
    """A weight ``round(ratio * numel)`` of whose elements are zero; unchanged if as many already are.

    The zeros are chosen over the whole matrix. Besides ``weight`` and the result, each 4 bytes per element, it takes
    two masks of one byte per element and blocks of a few MiB.

    Args:
        weight: float32 ``(out, in)``, contiguous; not written to.
        ratio: from 0 to 1.
        metric: of its input; None prunes by magnitude and changes no weight that is kept.
        name: the tensor, for errors.

    Raises:
        InvalidModelError: the weights are too large for float32 arithmetic.
    """
    total = weight.numel()
    target = round(total * ratio)
    if total - int(torch.count_nonzero(weight)) >= target:
        return weight.clone()
    if target == total:
        return torch.zeros_like(weight)
    if metric is None:
        return weight.masked_fill(smallest(weight, target), 0)
    state = weight * metric.scale
    dropped = torch.zeros(0)
    for iteration in range(_ITERATIONS):
        if iteration < _RAMP:
            dropped = smallest(state, round(target * _ramp(iteration)))
        _iterate(state, dropped, weight, metric)
    pruned = state.masked_fill_(dropped, 0).div_(metric.scale)
    if not bool(torch.isfinite(pruned.sum())) and not bool(torch.isfinite(pruned).all()):
        raise InvalidModelError(
            "its weights are too large to be pruned in float32", where=name, remedy="exclude this linear"
        )
    return pruned


def _ramp(iteration: int) -> float:
    """The share of the final number of zeros that an iteration drops: 0.19, 0.35 ... 1."""
    return 1 - (1 - (iteration + 1) / _RAMP) ** 3


def _iterate(state: Tensor, dropped: Tensor, weight: Tensor, metric: InputMetric) -> None:
    """One iteration on ``S``, in place; rows do not depend on each other."""
    step = max(1, _BLOCK_ELEMENTS // state.shape[1])
    for rows in (slice(start, start + step) for start in range(0, state.shape[0], step)):
        exact = weight[rows] * metric.scale
        now, off = state[rows], dropped[rows]
        change = metric.solve(torch.where(off, -now, now).sub_(exact))
        now.masked_fill_(~off, 0).add_(exact).add_(change)

"""The factor of a Hessian that tells how an error in one input column can be made good by the others.

With ``H + damping = L D L^T``, L unit lower triangular, the output error of a row with the residual ``r`` is
``sum_k D_k (sum_(j >= k) r_j L_jk)^2``: columns are rounded from the last to the first, each after ``sum_(j > k) r_j
L_jk`` was added to it, and ``D_k`` is what the square of its rounding error counts. This gives what GPTQ gives
(Frantar et al. 2022, arXiv:2210.17323), without the inverse (LDLQ, Chee et al. 2023, arXiv:2307.13304).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slim_core.quantization.row_blocks import for_each_block, rows_per_block
from slim_core.quantization.statistics import Hessian

__all__ = ["Factor", "factor_of", "factorise"]

_linalg: Any = torch.linalg  # its members have no types
# What is tried in turn: the dtype, a factor for the damping asked for, and the least damping.
_ATTEMPTS = (
    (torch.float32, 1, 0.0),
    (torch.float64, 1, 0.0),
    (torch.float64, 10, 1e-6),
    (torch.float64, 100, 1e-4),
    (torch.float64, 1000, 1e-2),
)


@dataclass(frozen=True, eq=False)
class Factor:
    """``order``: the input columns, those rounded first at the end, int64 ``(in,)``.

    Args:
        coefficients: float32 ``(in, in)`` in that order; what a residual in column j > k adds to column k lies in
            ``[k, j]``. The rest is not defined.
        pivots: float32 ``(in,)`` in that order: what the squared rounding error of a column counts.
        damping: the share of the mean diagonal that was added.
        dead: how many inputs are always zero.
    """

    order: Tensor
    coefficients: Tensor
    pivots: Tensor
    damping: float
    dead: int = 0

    @property
    def importance(self) -> Tensor:
        """The pivots by input column."""
        return torch.empty_like(self.pivots).index_copy_(0, self.order, self.pivots)


def factor_of(
    hessian: Hessian, name: str, damping: float, actorder: bool, device: torch.device | None
) -> Factor | None:
    """The factor of what was observed; None if nothing was, or nothing but zeros, or if it cannot be factorised.

    Linears that share their input have the same ``hessian`` object: it keeps the factor for the next of them.

    Raises:
        InvalidModelError: NaN or infinity was observed.
    """
    key = ("gptq", damping, actorder, device)
    if key in hessian.derived:
        return hessian.derived[key]
    total = hessian.checked(name)
    factor = None if total is None else factorise(total.to(device), damping, actorder)
    if hessian.shared:
        hessian.derived[key] = factor
    return factor


def factorise(hessian: Tensor, damping: float, actorder: bool) -> Factor | None:
    """Factorise a Hessian.

    In float32 first, then in float64, then with ten, a hundred and a thousand times the damping, and at least 1e-6,
    1e-4 and 1e-2.

    Args:
        hessian: ``(in, in)``, finite, symmetric, in any unit. It is not changed.
        damping: share of the mean diagonal that is added to the diagonal.
        actorder: whether the columns with the largest inputs come first; else they come in their own order.

    Returns:
        None if it is zero or all attempts failed.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean(dtype=torch.float64))
    if not mean > 0:
        return None
    count = len(diagonal)
    backwards = torch.arange(count - 1, -1, -1, device=hessian.device)
    order = backwards[torch.argsort(diagonal[backwards], stable=True)] if actorder else backwards
    ordered = _reordered(hessian, order)
    exact, dead = ordered.diagonal().double(), int((diagonal == 0).sum())
    for dtype, times, least in _ATTEMPTS:
        share = max(damping * times, least)
        damped = ordered.to(dtype)
        damped.diagonal().copy_(exact + share * mean)
        lower, info = _linalg.cholesky_ex(damped)
        del damped
        roots: Tensor = lower.diagonal().clone()
        if int(info) == 0 and bool((torch.isfinite(roots) & (roots > 0)).all()):
            # LAPACK writes columns, so this transpose is row after row in memory.
            coefficients: Tensor = lower.mT.contiguous().div_(roots.unsqueeze(1)).float()
            return Factor(order, coefficients, roots.square().float(), share, dead)
    return None


def _reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a square matrix in another order, float32; block by block, because fresh memory is slow."""
    found = torch.empty(matrix.shape, device=matrix.device)
    block = rows_per_block(len(matrix), matrix.device)

    def work(start: int) -> None:
        part = order[start : start + block]
        found[start : start + block] = matrix.index_select(0, part).index_select(1, order)

    for_each_block(work, range(0, len(matrix), block))
    return found

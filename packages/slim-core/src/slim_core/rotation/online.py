"""The rotations that are applied at run time: of the heads before ``o_proj``, of the intermediate state before
``down_proj``.

With t = ``max_tp_size``, heads are mixed by ``R_h (x) I_d`` with ``R_h`` of t x t blocks, and the intermediate state of
size n = n1 n2 by ``R_1 (x) R_2`` with ``R_1`` of t x t blocks and ``R_2`` full. A rank of a tensor-parallel engine
that holds whole blocks of ``R_h`` or ``R_1`` needs nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from slim_core.errors import UnsupportedError
from slim_core.rotation.hadamard import constructible
from slim_core.rotation.matrices import Identity, Kronecker, create_rotation

__all__ = ["down_rotation", "heads_rotation", "kronecker_orders", "shard_refusal"]

# The orders that engines know: 1, 2 and the multiples of 4 up to this one.
_LARGEST_ORDER = 256


def kronecker_orders(n: int) -> tuple[int, int]:
    """``(n1, n2)`` with ``n1 n2 = n``: as close to each other as can be.

    With the smallest ``a >= sqrt(n)`` for which ``a^2 - n = b^2`` is a square, ``n1 = a - b`` and ``n2 = a + b``. Both
    are 1, 2 or a multiple of 4, at most 256 where that is possible; the next a is taken where they are not, or where
    no Hadamard matrix of order n2 can be constructed.

    Raises:
        UnsupportedError: no such pair exists.
    """
    pairs = [(n1, n2) for n1, n2 in _square_differences(n) if _order(n1) and _order(n2) and constructible(n2)]
    if not pairs:
        raise UnsupportedError(
            f"{n} cannot be written as a product of two orders of Hadamard matrices",
            remedy="leave out down_proj_online_layers",
        )
    return next((pair for pair in pairs if pair[1] <= _LARGEST_ORDER), pairs[0])


def _square_differences(n: int) -> Iterator[tuple[int, int]]:
    """Factors of the same parity, closest first: those that ``a^2 - n = b^2`` can give."""
    for n1 in range(math.isqrt(max(n, 0)), 0, -1):
        if n % n1 == 0 and (n1 + n // n1) % 2 == 0:
            yield n1, n // n1


def _order(n: int) -> bool:
    return n in (1, 2) or n % 4 == 0


def heads_rotation(heads: int, head_dim: int, max_tp_size: int) -> Kronecker:
    """``R_h (x) I``: its ``outer`` is what the engine multiplies the heads with.

    Raises:
        UnsupportedError: the block does not divide the number of heads.
    """
    outer = create_rotation(heads, max_tp_size)
    return Kronecker(outer, Identity(head_dim))


def down_rotation(intermediate_size: int, max_tp_size: int) -> Kronecker:
    """``R_1 (x) R_2`` of the input of ``down_proj``.

    Raises:
        UnsupportedError: the size has no fitting factors, or the block does not divide the first.
    """
    n1, n2 = kronecker_orders(intermediate_size)
    first = create_rotation(n1, max_tp_size)
    return Kronecker(first, create_rotation(n2))


def shard_refusal(what: str, count: int, max_tp_size: int) -> tuple[str, str] | None:
    """Why ranks cannot rotate their shares by themselves, and what to do; None if they can with every power of two of
    ranks up to ``max_tp_size``.

    A rank has ``count / tp`` rows of the rotation, which must be whole blocks of ``max_tp_size``.

    Args:
        what: what is shared out, in plural: ``heads``.
        count: heads, or n1 of the intermediate size.
    """
    block = max_tp_size
    ranks = [1 << i for i in range(block.bit_length())]
    bad = next((tp for tp in ranks if count % tp or count // tp % block), None)
    if bad is None:
        return None
    fitting = [t for t in ranks if t > 1 and count % (t * t) == 0]
    advice = f"use max_tp_size {fitting[-1]}" if fitting else "rotate offline only, without online: true"
    share = f"{count // bad} {what} per rank" if count % bad == 0 else f"{count} {what} that do not come out even"
    held = f"with {bad} rank{'s' * (bad > 1)} there are {share}"
    return f"{held}, which is no multiple of the rotation's block of {block}", advice

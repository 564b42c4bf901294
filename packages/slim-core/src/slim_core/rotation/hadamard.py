"""Hadamard matrices by construction, and their product with a tensor without building them.

A Hadamard matrix of order n has entries +1 and -1 and ``H H^T = n I``. Here n is written as a product of orders that
can be constructed, and ``H_n`` is the Kronecker product of their matrices:

- powers of two (Sylvester 1867);
- ``q + 1`` for a prime power ``q = 3 mod 4`` and ``2 (q + 1)`` for a prime power ``q = 1 mod 4`` (Paley 1933).

Multiplying by ``H_a (x) H_b`` takes two small products along parts of the axis, ``a + b`` operations per element
instead of ``a b``. Powers of two are cut into factors of at most 32: matrix products of that order are faster than
butterflies, because they touch memory less often.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.quantization.row_blocks import for_each_block

__all__ = ["apply_hadamard", "constructible", "hadamard", "hadamard_factors"]

# A base of this order takes as long to multiply by as a dense matrix of it, so larger ones would be of no use.
_LARGEST_BASE = 4096
_LARGEST_POWER = 5
_BLOCK_BYTES = 1 << 20


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p^k``, p prime; None if there are none."""
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    k = 0
    while p > 1 and q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 and k else None


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """``(p, k, 1 or 2)``: the field and the kind of Paley's construction that gives this order, or None."""
    for kind, q, residue in ((1, order - 1, 3), (2, order // 2 - 1, 1)):
        if order % 4 == 0 and q % 4 == residue and (field := _prime_power(q)):
            return (*field, kind)
    return None


def _quadratic_character(p: int, k: int) -> Tensor:
    """int8 ``(p^k,)``: 0 at zero, +1 at the squares of GF(p^k), -1 elsewhere.

    An element is a polynomial of degree below k over the integers mod p; its index has the coefficients as digits to
    the base p. Polynomials f are tried until one is primitive: then x runs through all of the field, and the squares
    are its even powers.
    """
    one = (1,) + (0,) * (k - 1)
    for tail in product(range(p), repeat=k):  # x^k = tail[0] + tail[1] x + ... mod f
        power, powers = one, list[int]()
        while any(power) and (power != one or not powers) and len(powers) < p**k:
            powers.append(sum(digit * p**i for i, digit in enumerate(power)))
            carry, shifted = power[-1], (0, *power[:-1])
            power = tuple((s + carry * t) % p for s, t in zip(shifted, tail, strict=True))
        if power == one and len(powers) == p**k - 1:
            character = torch.zeros(p**k, dtype=torch.int8)
            character[powers[0::2]], character[powers[1::2]] = 1, -1
            return character
    raise UnexpectedError(f"no primitive polynomial of degree {k} over GF({p})")


def _paley(p: int, k: int, kind: int) -> Tensor:
    """Paley's matrix over GF(p^k), from the bordered table of the characters of all differences."""
    q = p**k
    elements = torch.arange(q, dtype=torch.int32)
    difference = torch.zeros(q, q, dtype=torch.int32)
    for i in range(k):
        digit = elements // p**i % p
        difference += (digit[:, None] - digit[None, :]) % p * p**i
    core = torch.ones(q + 1, q + 1, dtype=torch.int8)
    core[0, 0] = 0
    core[1:, 1:] = _quadratic_character(p, k)[difference.long()]
    if kind == 1:
        core[1:, 0] = -1
        return core + torch.eye(q + 1, dtype=torch.int8)
    around = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    middle = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, around) + torch.kron(torch.eye(q + 1, dtype=torch.int8), middle)


@lru_cache(32)
def _base(order: int) -> Tensor:
    """int8 Hadamard matrix of a factor: Sylvester's, Paley's, or one of these doubled. Never write to it."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if order.bit_count() > 1 and (field := _paley_field(order)):
        matrix = _paley(*field)
    else:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), _base(order // 2))
    whole = matrix.float()  # sums of up to 4096 terms of size 1 are exact
    if not torch.equal(whole @ whole.T, order * torch.eye(order)):
        raise UnexpectedError(f"the matrix constructed for order {order} is no Hadamard matrix")
    return matrix


@lru_cache(64)
def _factor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _base(order).to(device=device, dtype=dtype)


@lru_cache(1024)
def _paley_orders(odd: int, twos: int) -> tuple[int, ...] | None:
    """The cheapest Paley orders whose product is ``odd * 2^j`` with ``j <= twos``; None if there are none."""
    if odd == 1:
        return ()
    best: tuple[int, ...] | None = None
    for part in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        j = next((j for j in range(2, twos + 1) if part << j <= _LARGEST_BASE and _paley_field(part << j)), None)
        if j is None or (rest := _paley_orders(odd // part, twos - j)) is None:
            continue
        orders = tuple(sorted((part << j, *rest), reverse=True))
        if best is None or (sum(orders), orders) < (sum(best), best):
            best = orders
    return best


@lru_cache(256)
def hadamard_factors(n: int) -> tuple[int, ...]:
    """The orders of the Kronecker factors of ``H_n``, outermost first; their product is n.

    Powers of two come last and grow: the product with an innermost factor of 8 is slow.

    Raises:
        UnsupportedError: no Hadamard matrix of this order is known to the constructions; says what was tried.
    """
    twos = (n & -n).bit_length() - 1 if n > 0 else 0
    odd = n >> twos if n > 0 else 0
    orders = _paley_orders(odd, twos) if odd else None
    if orders is None:
        raise UnsupportedError(
            f"no Hadamard matrix of order {n} can be constructed: {_why_not(n, odd, twos)}",
            remedy="use a block_size that is a power of two and divides it",
        )
    taken = twos - sum((order & -order).bit_length() - 1 for order in orders)
    if orders and taken < 3:
        return *orders[:-1], orders[-1] << taken
    count = -(-taken // _LARGEST_POWER)
    powers = [1 << (taken // count + (i >= count - taken % count)) for i in range(count)]
    return *orders, *powers


def _why_not(n: int, odd: int, twos: int) -> str:
    if n < 1 or (n > 2 and n % 4):
        return "an order is 1, 2 or a multiple of 4"
    if odd << 2 > _LARGEST_BASE:
        return f"its odd part {odd} needs a base of more than {_LARGEST_BASE}"
    tried = [odd << j for j in range(2, twos + 1) if odd << j <= _LARGEST_BASE]
    reasons = [f"{b - 1} is no prime power = 3 mod 4 and {b // 2 - 1} is none = 1 mod 4" for b in tried]
    return "; ".join(f"for a base of {base}, {reason}" for base, reason in zip(tried, reasons, strict=True))


def constructible(n: int) -> bool:
    """Whether :func:`hadamard` can give a matrix of this order."""
    try:
        return bool(hadamard_factors(n)) or n == 1
    except UnsupportedError:
        return False


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix itself, ``(n, n)`` with entries +1 and -1.

    Raises:
        UnsupportedError: as :func:`hadamard_factors`.
    """
    matrix = torch.ones(1, 1, dtype=dtype)
    for order in hadamard_factors(n):
        matrix = torch.kron(matrix, _base(order).to(dtype))
    return matrix


def apply_hadamard(x: Tensor, dim: int = -1, *, transpose: bool = False) -> Tensor:
    """``x H`` along one axis, or ``x H^T``, not normalised.

    A result is a sum of sums, one for each factor and of as many terms: in float32 the largest error is about 1e-6 of
    the root mean square of the results.

    Args:
        x: float32 or float64, any shape; not written to.
        dim: the axis whose length is the order.

    Returns:
        A new tensor of that dtype and shape.

    Raises:
        UnsupportedError: as :func:`hadamard_factors`.
    """
    dim %= x.dim()
    n, outer, inner = x.shape[dim], math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    orders = hadamard_factors(n)
    factors = [_factor(order, x.dtype, x.device) for order in orders]
    factors = [factor.T if transpose else factor for factor in factors]
    if not x.numel() or not factors:
        return x.clone()
    cube = x.reshape(outer, n, inner)
    if x.device.type != "cpu":
        return _multiply(cube, factors).reshape(x.shape)
    result = torch.empty_like(cube, memory_format=torch.contiguous_format)
    along, length = (0, outer) if outer > 1 else (2, inner)
    step = max(1, _BLOCK_BYTES * length // (x.numel() * x.dtype.itemsize))

    def work(start: int) -> None:
        count = min(step, length - start)
        result.narrow(along, start, count).copy_(_multiply(cube.narrow(along, start, count), factors))

    for_each_block(work, range(0, length, step))
    return result.reshape(x.shape)


def _multiply(x: Tensor, factors: list[Tensor]) -> Tensor:
    """``(outer, n, inner)`` times the Kronecker product of the factors, along n."""
    shape, before, after = x.shape, x.shape[0], x.shape[1] * x.shape[2]
    for factor in factors:
        order = len(factor)
        after //= order
        x = x.reshape(before, order, after)
        x = x.view(before, order) @ factor if after == 1 else torch.matmul(factor.T, x)
        before *= order
    return x.reshape(shape)

"""Hadamard matrices: every construction against the definition, the fast product against the matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import UnsupportedError
from slim_core.rotation.hadamard import _paley, apply_hadamard, constructible, hadamard, hadamard_factors

MODEL_SIZES = [
    *(896, 1152, 1280, 1536, 2048, 2304, 2560, 2816, 2880, 3072, 3584, 3840, 4096, 4608, 5120, 5376, 6144, 7168, 8192),
    *(11008, 13824, 14336, 18944, 25600, 27648, 29568),
]
BASES = [12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 140, 148, 152, 344]
IMPOSSIBLE = [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]


def is_hadamard(matrix: torch.Tensor) -> bool:
    """In integers: entries are signs, rows are orthogonal."""
    whole = matrix.to(torch.int32)
    return bool((whole.abs() == 1).all()) and torch.equal(
        whole @ whole.T, len(whole) * torch.eye(len(whole), dtype=torch.int32)
    )


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 256, *BASES, 200, 688])
def test_rows_are_orthogonal(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.shape == (n, n)
    assert is_hadamard(matrix)


def test_which_orders_up_to_300_exist() -> None:
    """All multiples of 4 but those that neither Sylvester nor Paley reach."""
    found = [n for n in range(1, 301) if constructible(n)]
    assert found == [n for n in range(1, 301) if (n in (1, 2) or n % 4 == 0) and n not in IMPOSSIBLE]
    for n in found[::3]:
        assert is_hadamard(hadamard(n, torch.float32)), n


FIELDS = [(3, 1, 1), (7, 1, 1), (3, 3, 1), (7, 3, 1), (5, 1, 2), (3, 2, 2), (5, 2, 2), (7, 2, 2), (3, 4, 2), (5, 3, 2)]


@pytest.mark.parametrize(("p", "k", "kind"), [*FIELDS, (11, 2, 2), (13, 2, 2), (17, 2, 2), (461, 1, 2)])
def test_paley_over_prime_and_prime_power_fields(p: int, k: int, kind: int) -> None:
    matrix = _paley(p, k, kind)
    assert len(matrix) == kind * (p**k + 1)
    assert is_hadamard(matrix)


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_sizes_of_real_models(n: int) -> None:
    factors = hadamard_factors(n)
    assert math.prod(factors) == n
    assert max(factors) <= 344  # no factor is so large that its product costs as much as a dense one
    one = torch.zeros(3, n, dtype=torch.float64)
    one[0, 0] = one[1, n // 3] = one[2, n - 1] = 1.0
    spread = apply_hadamard(one)
    assert bool((spread.abs() == 1).all())
    assert torch.equal(spread @ spread.T, n * torch.eye(3, dtype=torch.float64))
    assert torch.equal(apply_hadamard(spread, transpose=True), n * one)


def test_powers_of_two_are_sylvesters() -> None:
    for n in (2, 16, 128, 1024):
        index = torch.arange(n)
        common = index[:, None] & index[None, :]
        parity = sum((common >> bit) & 1 for bit in range(10)) % 2
        assert torch.equal(hadamard(n), 1.0 - 2.0 * parity.double())


@given(
    st.sampled_from([1, 2, 12, 24, 64, 80, 144, 148, 336]),
    st.integers(0, 2),
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_fast_product_is_the_product(n: int, dim: int, others: list[int], transpose: bool, seed: int) -> None:
    shape = (*others[:dim], n, *others[dim:])
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = hadamard(n).T if transpose else hadamard(n)
    want = torch.tensordot(x.movedim(dim, -1), matrix, dims=1).movedim(-1, dim)
    before = x.clone()
    for where in (dim, dim - 3):
        found = apply_hadamard(x, where, transpose=transpose)
        assert found.shape == x.shape
        assert torch.allclose(found, want, rtol=0, atol=1e-11)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_of_a_large_tensor_fit_together(dim: int) -> None:
    """More than one block along the rows, and along the columns; also a view that is not contiguous."""
    x = torch.randn(768, 1536, generator=torch.Generator().manual_seed(0))
    for y in (x, x.T):
        matrix = hadamard(y.shape[dim], torch.float32)
        want = y @ matrix if dim else matrix.T @ y
        assert torch.allclose(apply_hadamard(y, dim), want, atol=2e-3)


def test_threads_change_nothing() -> None:
    x = torch.randn(700, 1280, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = apply_hadamard(x)
        torch.set_num_threads(2)
        assert torch.equal(apply_hadamard(x), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("n", [5120, 14336, 29568])
def test_error_of_float32(n: int) -> None:
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 500.0
    exact = apply_hadamard(x.double())
    error = (apply_hadamard(x).double() - exact).abs().amax(1)
    assert float((error / exact.square().mean(1).sqrt()).max()) <= 2e-6


REFUSALS = [
    (0, "an order is 1, 2 or a multiple of 4"),
    (-4, "an order is 1, 2 or a multiple of 4"),
    (3, "an order is 1, 2 or a multiple of 4"),
    (10, "an order is 1, 2 or a multiple of 4"),
    (92, "for a base of 92, 91 is no prime power = 3 mod 4 and 45 is none = 1 mod 4"),
    (184, r"base of 92, .*base of 184, 183 is no prime power = 3 mod 4 and 91 is none"),
    (4 * 5003, "its odd part 5003 needs a base of more than 4096"),
]


@pytest.mark.parametrize(("n", "reason"), REFUSALS)
def test_orders_that_cannot_be_made(n: int, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"no Hadamard matrix of order {n} can be constructed: .*{reason}"):
        hadamard_factors(n)
    assert not constructible(n)


def test_products_reach_what_no_single_base_does() -> None:
    """172 * 2 is Paley over GF(343); 29568 = 44 * 28 * 24 needs no base of 924."""
    assert hadamard_factors(11008) == (344, 32)
    assert hadamard_factors(29568) == (44, 28, 24)

"""Which steps which tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import UnsupportedError
from slim_core.model.residual import BlockRoles, Rank
from slim_core.model.subgraphs import Subgraph
from slim_core.rotation.chains import Chain, Fill, FoldNormBias, FuseNorm, RotateLeft, RotateRight
from slim_core.rotation.matrices import Concatenated, Hadamard, Identity
from slim_core.rotation.steps import Steps, head_columns, head_rows


def ov(rows: torch.Tensor, columns: torch.Tensor, dim: int) -> Subgraph:
    return Subgraph("ov", "a.v", ("a.o",), columns, rows, head_dim=dim)


@given(
    heads=st.integers(1, 4),
    dim=st.sampled_from([1, 2, 4]),
    before=st.integers(0, 6),
    gap=st.integers(0, 5),
    after=st.integers(0, 6),
    leading=st.booleans(),
)
def test_heads_in_the_rows_of_a_matrix(heads: int, dim: int, before: int, gap: int, after: int, leading: bool) -> None:
    """Fused projections have keys and queries before, between or after the values; those are left alone."""
    starts = [before + head * (dim + gap) + (gap if leading else 0) for head in range(heads)]
    rows = torch.cat([torch.arange(start, start + dim) for start in starts])
    out = before + heads * (dim + gap) + after
    rotation = Hadamard(dim)
    found = head_rows(ov(rows, torch.arange(heads * dim), dim), rotation, out)
    assert found is not None
    expected = torch.eye(out).double()
    for start in starts:
        expected[start : start + dim, start : start + dim] = rotation.dense()
    assert torch.allclose(found.dense(), expected)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([0, 2, 4, 6]),  # heads that alternate
        torch.tensor([0, 1, 2, 3, 6, 7]),  # of unequal distance
        torch.tensor([2, 3, 0, 1]),  # the wrong way round
        torch.tensor([0, 1, 1, 2]),  # overlapping
        torch.arange(3),
    ],
)
def test_rows_in_disorder(rows: torch.Tensor) -> None:
    assert head_rows(ov(rows, torch.arange(4), 2), Hadamard(2), 8) is None
    with pytest.raises(UnsupportedError, match="the value heads do not lie in a regular order"):
        steps("a.v.weight", "a.o.weight", rows=8).value(ov(rows, torch.arange(4), 2), Hadamard(2))


def test_columns_of_the_output_projection() -> None:
    grouped = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    assert head_columns(ov(torch.arange(4), grouped, 2))
    assert not head_columns(ov(torch.arange(4), torch.tensor([0, 2, 1, 3]), 2))
    assert not head_columns(ov(torch.arange(4), torch.tensor([1, 2, 3, 4]), 2))
    assert not head_columns(ov(torch.arange(3), torch.arange(3), 2))
    assert not head_columns(ov(torch.arange(4), grouped, 0))


def steps(*parameters: str, rows: int = 4, **shared: str) -> Steps:
    stored = {name: name for name in parameters} | {name.replace("__", "."): tensor for name, tensor in shared.items()}
    return Steps(stored, lambda _: rows)


def norm(source: str, *targets: str, plus_one: bool = False) -> Subgraph:
    return Subgraph("norm-linear", source, targets, torch.arange(4), plus_one=plus_one)


def test_a_block() -> None:
    rotation = Hadamard(4)
    made = steps("n.weight", "q.weight", "q.bias", "o.weight", "o.bias", "r.weight")
    made.stream(BlockRoles((norm("n", "q"),), ("r",), (("o",),)), rotation)
    assert made.taken == {
        "n.weight": [Fill(1.0)],
        "q.weight": [FuseNorm(("n.weight",)), RotateRight(rotation)],
        "r.weight": [RotateRight(rotation)],
        "o.weight": [RotateLeft(rotation)],
        "o.bias": [RotateLeft(rotation)],
    }


def test_a_norm_with_a_bias() -> None:
    made = steps("n.weight", "n.bias", "q.weight", "q.bias")
    made.norm(norm("n", "q", plus_one=True))
    assert made.taken == {
        "n.weight": [Fill(0.0)],
        "n.bias": [Fill(0.0)],
        "q.weight": [FuseNorm(("n.weight",), plus_one=True)],
        "q.bias": [FoldNormBias("q.weight", "n.bias")],
    }
    with pytest.raises(UnsupportedError, match="it adds a bias, for which q has no place") as caught:
        steps("n.weight", "n.bias", "q.weight").norm(norm("n", "q"))
    assert caught.value.where == "n"


def test_a_low_rank() -> None:
    rotation = Hadamard(4)
    made = steps("n.weight", "a.weight", "a.bias", "b.weight", rows=7)
    made.rank(Rank(norm("n", "b"), "a", 1), rotation)
    left = RotateLeft(Concatenated((Identity(1), rotation, Identity(2))))
    assert made.taken["a.weight"] == made.taken["a.bias"] == [left]
    assert made.taken["b.weight"] == [FuseNorm(("n.weight",)), RotateRight(rotation)]


def test_parameters_that_share_a_tensor() -> None:
    """A tied head gets a tensor of its own, whichever of the two names is stored; equal steps stay shared."""
    rotation = Hadamard(4)
    for name, other in (("embed.weight", "head.weight"), ("head.weight", "embed.weight")):
        made = steps(name, **{other.replace(".", "__"): name})
        made.right("embed", rotation)
        made.right("head", rotation)
        assert made.chains(str) == {name: Chain((RotateRight(rotation),))}
        made.taken["head.weight"].insert(0, FuseNorm(("n.weight",)))
        fused = (FuseNorm(("n.weight",)), RotateRight(rotation))
        plain = (RotateRight(rotation),)
        assert made.chains(str) == {"embed.weight": Chain(plain, name), "head.weight": Chain(fused, name)}


def test_a_parameter_that_keeps_what_it_shares() -> None:
    made = steps("embed.weight", copy__weight="embed.weight")
    made.right("embed", Hadamard(4))
    assert made.chains(str) == {
        "embed.weight": Chain((RotateRight(Hadamard(4)),), "embed.weight"),
        "copy.weight": Chain((), "embed.weight"),
    }

    def one_name(_: str) -> str:
        return "embed.weight"

    with pytest.raises(UnsupportedError, match=r"shares its tensor 'embed\.weight' .*cannot be told apart"):
        made.chains(one_name)


def test_what_does_not_exist_takes_no_step() -> None:
    made: Any = steps("o.weight")
    made.left("o", Hadamard(4))
    made.left("gone", Hadamard(4))
    assert set(made.taken) == {"o.weight"}

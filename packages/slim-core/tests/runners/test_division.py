"""Who does what in a run of several ranks, and when there are any."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.budget import MemoryBudget
from slim_core.devices import Devices
from slim_core.runners.choice import choose_runner
from slim_core.runners.division import part_of, shares


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 5))
def test_shares_are_about_equal(sizes: list[int], ranks: int) -> None:
    """Nobody has more than the average and one item."""
    owners = shares(sizes, ranks)
    assert len(owners) == len(sizes)
    counted = [max(1, size) for size in sizes]
    loads = [sum(size for size, owner in zip(counted, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(counted)
    assert max(loads) <= sum(counted) / ranks + max(counted, default=0)
    assert owners == shares(sizes, ranks)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 4))
def test_every_sample_has_one_rank(tokens: list[int], ranks: int) -> None:
    inputs = [f"sample {i}" for i in range(len(tokens))]
    parts = [list(part_of(inputs, tokens, rank, ranks)) for rank in range(ranks)]
    assert sorted(sample for part in parts for sample in part) == sorted(inputs)
    for part in parts:
        assert part == sorted(part, key=inputs.index)


def test_inputs_that_are_made_ahead_are_asked_for_a_part() -> None:
    class Made(list[int]):
        def part(self, numbers: list[int]) -> list[int]:
            return [-number for number in numbers]

    assert part_of(Made(range(4)), [1, 1, 1, 1], 1, 2) == [-1, -3]
    assert part_of(Made(range(4)), [], 0, 1) == [0, 1, 2, 3]


def test_a_part_closes_what_it_is_of() -> None:
    class Closed(list[int]):
        closed = False

        def close(self) -> None:
            self.closed = True

    inputs = Closed(range(5))
    part: Any = part_of(inputs, [], 1, 2)
    assert (len(part), list(part)) == (2, [1, 3])
    part.close()
    assert inputs.closed


class Nothing:
    """A model without blocks."""

    running: tuple[Any, ...] = ()


CHOICES = [
    ("auto", 2, {"needs_data": True}, "dp_layer_wise", 2, False, "2 devices are given; 2 ranks divide samples"),
    ("auto", 2, {"needs_data": False}, "layer_wise", 1, False, "no longer than reading them"),
    ("auto", 2, {"needs_data": False, "searches": True}, "dp_layer_wise", 2, True, "2 ranks divide the units"),
    ("auto", 1, {"needs_data": True}, "layer_wise", 1, False, "on the CPU"),
    ("layer_wise", 2, {"needs_data": True}, "layer_wise", 1, False, "of 2 devices the first is used"),
    ("layer_wise", 2, {"needs_data": True, "distributes": True}, "dp_layer_wise", 2, False, "2 devices are given"),
    ("dp_layer_wise", 3, {"needs_data": False}, "dp_layer_wise", 3, True, "the recipe asks for it"),
    ("dp_layer_wise", 1, {"needs_data": True}, "layer_wise", 1, False, "there is one device"),
    ("auto", 2, {"needs_data": True, "whole_units": "it trains"}, "dp_layer_wise", 2, True, "because it trains"),
]


@pytest.mark.parametrize(("asked", "ranks", "about", "name", "count", "by_units", "reason"), CHOICES)
def test_choice(asked: str, ranks: int, about: Any, name: str, count: int, by_units: bool, reason: str) -> None:
    model: Any = Nothing()
    choice = choose_runner(asked, model, Devices("cpu", tuple(range(ranks))), ranks=ranks, **about)
    assert (choice.name, choice.ranks, choice.by_units) == (name, count, by_units)
    assert reason in choice.reason


def test_ranks_on_a_host_share_its_memory() -> None:
    assert MemoryBudget(host=101, device=7).of_rank(2) == MemoryBudget(host=50, device=7)
    assert MemoryBudget().of_rank(3) == MemoryBudget()

"""Who does what in a run of several ranks: a function of the plan alone, so all ranks agree without a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment
from slim_core.quantization.statistics import Need
from slim_core.runners.prediction import input_of

if TYPE_CHECKING:
    from slim_core.runners.plan import Plan

__all__ = ["Division", "Part", "chosen", "part_numbers", "part_of", "shares"]

_T = TypeVar("_T")


def shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank of each of some items, so that all have about the same to do: the largest first, each to whoever has
    least."""
    loads = [0] * ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += max(1, sizes[index])
    return owners


class Part(Sequence[Any]):
    """Some of the inputs of a sequence that makes them when they are asked for."""

    def __init__(self, inputs: Sequence[Any], numbers: Sequence[int]) -> None:
        self._inputs, self._numbers = inputs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._inputs[self._numbers[index]]

    def close(self) -> None:
        """Nobody will ask for more."""
        if (close := getattr(self._inputs, "close", None)) is not None:
            close()


def part_numbers(count: int, tokens: Sequence[int], rank: int, ranks: int) -> list[int]:
    """Which of ``count`` samples a rank runs, in their order; about as many tokens for each rank.

    Args:
        tokens: of every sample; if there are not as many, samples count as equal.
    """
    sizes = tokens if len(tokens) == count else [1] * count
    return [number for number, owner in enumerate(shares(sizes, ranks)) if owner == rank]


def chosen(inputs: Sequence[_T], numbers: Sequence[int]) -> Sequence[_T]:
    """Some samples by their numbers; by their own method ``part``, if they have one."""
    choose = getattr(inputs, "part", None)
    return choose(numbers) if choose is not None else Part(inputs, numbers)


def part_of(inputs: Sequence[_T], tokens: Sequence[int], rank: int, ranks: int) -> Sequence[_T]:
    """The samples of a rank."""
    return inputs if ranks == 1 else chosen(inputs, part_numbers(len(inputs), tokens, rank, ranks))


class Division:
    """What of each unit falls to which rank.

    Either every rank runs its share of the samples, and the linears of each unit are divided; or, *by units*, whole
    units are.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.rank, self.ranks = rank, plan.runner.ranks
        self.by_units = plan.runner.by_units
        self._plan = plan
        sizes = [unit.bytes_in + unit.bytes_out for unit in plan.units]
        owners = shares(sizes, self.ranks) if self.by_units else [i % self.ranks for i in range(len(sizes))]
        self._keepers = {unit.name: owner for unit, owner in zip(plan.units, owners, strict=True)}
        self._owners: dict[str, dict[str, int]] = {}
        self._units = {unit.name: unit for unit in plan.model.units}

    def keeper(self, unit: str) -> int:
        """Who writes what no linear of a unit owns; by units, all of it."""
        return self._keepers[unit]

    def works_on(self, unit: str) -> bool:
        """Whether this rank has to do with the weights of a unit at all."""
        return not self.by_units or self.keeper(unit) == self.rank

    def owner(self, unit: str, name: str) -> int:
        """Who makes and writes a quantized linear; or writes an attention, which all of them make."""
        if self.by_units or self.ranks == 1:
            return self.keeper(unit)
        if unit not in self._owners:
            self._owners[unit] = _owners(self._units[unit], self._plan, self.ranks)
        return self._owners[unit].get(name, self.keeper(unit))

    def owns(self, unit: str, name: str) -> bool:
        return self.owner(unit, name) == self.rank

    def makes(self, unit: str, name: str) -> bool:
        """Whether this rank makes a quantized linear of a unit that it works on."""
        return self.by_units or self.owns(unit, name)

    def written_by(self, rank: int) -> list[str]:
        """The names of the tensors that a rank writes."""
        return [
            tensor.meta.name
            for tensor in self._plan.output.tensors
            if (self.keeper(tensor.unit) if tensor.owner is None else self.owner(tensor.unit, tensor.owner)) == rank
        ]


def _owners(unit: Unit, plan: Plan, ranks: int) -> dict[str, int]:
    """Linears that share a Hessian stay together: it is made ready once for all of them."""
    groups: dict[Any, list[LinearInfo]] = {}
    for info in unit.linears:
        if (assigned := plan.assignments.get(info.name)) is not None:
            alike = input_of(info) if Need.HESSIAN in assigned.needs else info.name
            groups.setdefault(alike, []).append(info)
    owners = shares([_work(group, plan.assignments) for group in groups.values()], ranks)
    return {info.name: owner for group, owner in zip(groups.values(), owners, strict=True) for info in group}


def _work(group: Iterable[LinearInfo], assignments: dict[str, Assignment]) -> int:
    """What quantizing takes, in products of numbers: every weight once, or against its whole row and a factor."""
    cost = width = 0
    for info in group:
        solves = Need.HESSIAN in assignments[info.name].needs
        cost += info.out_features * info.in_features * (info.in_features if solves else 1)
        width = max(width, info.in_features if solves else 0)
    return cost + width**3

"""Which linears of a block belong to which routed expert."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from slim_core.model.units import LinearInfo

__all__ = ["ExpertLayer", "expert_layers"]

_PLACE = re.compile(r"(.+)\.(\d+)(?:\.(.+))?")


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one module.

    Args:
        name: the module that holds them, e.g. ``model.layers.3.mlp.experts``.
        experts: number of an expert to its linears: their place within the expert, e.g. ``gate_proj``, to their names.
            The place is empty where the expert is itself a linear.
    """

    name: str
    experts: dict[int, dict[str, str]]

    def siblings(self, place: str) -> list[str]:
        """The linears of the same place in all experts."""
        return [linears[place] for linears in self.experts.values() if place in linears]


def expert_layers(model: nn.Module, linears: Iterable[LinearInfo]) -> list[ExpertLayer]:
    """The layers of experts that these linears make, in order.

    Experts are numbered children of a module that is called ``experts``, or that was taken apart into them.
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    for info in linears:
        for place in _places(info.name):
            if _holds_experts(model, place[0]):
                found.setdefault(place[0], {}).setdefault(place[1], {})[place[2]] = info.name
                break
    return [ExpertLayer(name, dict(sorted(experts.items()))) for name, experts in found.items()]


def _places(name: str) -> Iterable[tuple[str, int, str]]:
    """Every way to read a name as holder, number and rest, the innermost number first."""
    end = len(name)
    while match := _PLACE.fullmatch(name, 0, end):
        yield match[1], int(match[2]), name[match.end(2) + 1 :]
        end = match.end(1)


def _holds_experts(model: nn.Module, name: str) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return (leaf.endswith("experts") and "shared" not in leaf) or hasattr(model.get_submodule(name), "apart")

"""Stacked experts of drafting layers, which no parameter of the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from slim_core.checkpoint.sliced import Slice
from slim_core.checkpoint.source import TensorSource

__all__ = ["cut_alike"]


def cut_alike(source: TensorSource, slices: Mapping[str, Slice], used: set[str]) -> dict[str, Slice]:
    """The slices of stacks that no parameter takes but that are called and shaped like all stacks of a module, whatever
    comes before the place in the block. They are cut as the module's are.

    Args:
        slices: of all stacks of the module.
        used: stacks that something takes; those that are cut are added.
    """
    places = {stack: _place(stack) for stack in dict.fromkeys(part.stack for part in slices.values())}
    if not places or not all(places.values()):
        return {}
    first = next(iter(places.values()))
    alike: dict[str, Slice] = {}
    for front in [name.removesuffix(first) for name in source if name.endswith(f".{first}") and name not in used]:
        twins = {stack: front + place for stack, place in places.items()}
        if any(twin not in source or source.meta(twin).shape != source.meta(one).shape for one, twin in twins.items()):
            continue
        alike |= {front + _place(name): replace(part, stack=twins[part.stack]) for name, part in slices.items()}
        used.update(twins.values())
    return alike


def _place(name: str) -> str:
    """What follows the number of the block in the name of one of its tensors; empty if there is no number."""
    pieces = name.split(".")
    at = next((i for i, piece in enumerate(pieces) if piece.isdigit()), len(pieces))
    return ".".join(pieces[at + 1 :])

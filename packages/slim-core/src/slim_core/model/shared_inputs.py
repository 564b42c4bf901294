"""Linears that read one and the same input, which a scale can divide while the model runs (non-fusion smoothing).

Diffusion transformers normalise without weights and modulate what comes out, so that often there is nothing to fold a
scale into. What such linears share is only their input; that they do share it is seen by running the block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.inputs import is_changed
from slim_core.model.skeleton import named_modules
from slim_core.model.subgraphs import Subgraph

__all__ = ["find_shared_inputs"]

Groups = Sequence[Sequence[str]]


def find_shared_inputs(
    root: nn.Module, block: str, run: Callable[[], object], linears: Collection[str], given: Groups | None
) -> tuple[list[Subgraph], dict[str, str]]:
    """The subgraphs of a block that have no source.

    Args:
        root: the model; the block's parameters hold their values.
        block: dotted name of the block.
        run: runs the block on one sample.
        linears: module names of the block's linears that can be quantized.
        given: groups of linears that share their input, by their names below the block; what the block does not have is
            passed over. None: groups are found, the linears of each in the order of their first calls.

    Returns:
        The subgraphs, and why linears are in none, by the name of the linear.

    Raises:
        UnsupportedError: a linear is in two of the groups given.
    """
    groups = None if given is None else _present(root, block, given)
    wanted = linears if groups is None else {name for group in groups for name in group}
    refused = {name: "it is no linear that can be quantized" for name in wanted if name not in linears}
    modules = {name: root.get_submodule(name) for name in wanted if name in linears}
    refused |= {name: "its input is rotated while the model runs" for name, one in modules.items() if is_changed(one)}
    calls = _calls({name: one for name, one in modules.items() if name not in refused}, run)
    refused |= {name: "it did not run" for name in modules if name not in calls and name not in refused}
    if groups is None:
        together: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in calls.items():
            together.setdefault(tuple(inputs), []).append(name)
        groups = list(together.values())
    found: list[Subgraph] = []
    for group in groups:
        members = [name for name in group if name in calls]
        for name in members[1:]:
            if calls[name] != calls[members[0]]:
                refused[name] = f"it is not given what {members[0]} is given"
        if targets := tuple(name for name in members if name not in refused):
            width = modules[targets[0]].get_parameter("weight").shape[1]
            found.append(Subgraph("norm-linear", "", targets, torch.arange(width)))
    return found, refused


def _present(root: nn.Module, block: str, given: Groups) -> list[list[str]]:
    """Full names of those that the block has."""
    known = {name for name, _ in named_modules(root.get_submodule(block))}
    seen: set[str] = set()
    for name in (name for group in given for name in group):
        if name in seen:
            raise UnsupportedError(
                "the linear is in two groups of those that share their input",
                where=f"{block}.{name}",
                remedy="correct what the model's opener gives as scaled_inputs",
            )
        seen.add(name)
    return [[f"{block}.{name}" for name in group if name in known] for group in given]


def _calls(modules: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, list[int]]:
    """For each module that ran the inputs of its calls, numbered: equal numbers are equal tensors."""
    inputs: list[tuple[Tensor, Tensor]] = []
    calls: dict[str, list[int]] = {}

    def number_of(x: Tensor) -> int:
        for number, (itself, values) in enumerate(inputs):
            alike = x is itself or (x.shape == values.shape and bool(values.any()))  # zeros are given to many
            if alike and torch.equal(x, values):
                return number
        inputs.append((x, x.clone()))  # something may be written into it later
        return len(inputs) - 1

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel():
                calls.setdefault(name, []).append(number_of(x))

        return note

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls

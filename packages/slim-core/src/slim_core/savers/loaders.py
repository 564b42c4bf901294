"""What the serving engines can load, from a table that says which engine version it was read from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["engines", "is_loadable", "layer_class", "mixed_fusions", "unloadable"]

MAIN_ENGINE = "vllm-ascend"
_EXPERT = re.compile(r"\.experts\.\d+\.")


@cache
def _tables() -> dict[str, Any]:
    return yaml.safe_load(files("slim_core.savers").joinpath("loader_tables.yaml").read_text("utf-8"))


def engines() -> list[str]:
    """The engines that there is a table for."""
    return [name for name in _tables() if name != "fused"]


def layer_class(name: str) -> str:
    """``experts`` for the linears of routed experts, ``linear`` for all others."""
    return "experts" if _EXPERT.search(name) else "linear"


def is_loadable(engine: str, kind: str, name: str) -> bool:
    """Whether an engine has a class for a layer of this type at this place."""
    return bool(_tables()[engine]["types"].get(kind, {}).get(layer_class(name)))


def unloadable(kinds: Mapping[str, str]) -> list[str]:
    """One warning for each type and kind of layer that the main engine has no class for."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, kind in kinds.items():
        if not is_loadable(MAIN_ENGINE, str(kind), name):
            found.setdefault((str(kind), layer_class(name)), []).append(name)
    return [
        f"{MAIN_ENGINE} has no class for {kind} {where} layers ({len(names)} linears, e.g. {names[0]})"
        for (kind, where), names in found.items()
    ]


def mixed_fusions(kinds: Mapping[str, str]) -> list[str]:
    """One warning for each set of linears that engines fuse but that end up with different types."""
    parents: dict[str, dict[str, str]] = {}
    for name, kind in kinds.items():
        parent, _, leaf = name.rpartition(".")
        parents.setdefault(parent, {})[leaf] = str(kind)
    warnings: dict[str, list[str]] = {}
    for parent, leaves in parents.items():
        for fused in _tables()["fused"]:
            present = {leaf: leaves[leaf] for leaf in fused if leaf in leaves}
            if len(set(present.values())) > 1:
                text = ", ".join(f"{leaf} {kind}" for leaf, kind in present.items())
                warnings.setdefault(text, []).append(parent)
    return [
        f"engines fuse these linears and need one type for all: {text} ({len(where)} times, e.g. {where[0]})"
        for text, where in warnings.items()
    ]

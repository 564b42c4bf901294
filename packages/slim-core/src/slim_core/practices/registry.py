"""Which pedigree (folder of the practice library) a model type belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from slim_core.errors import SchemaValidateError
from slim_core.recipe.yaml_source import read_yaml

__all__ = ["load_registry", "pedigree_of"]


@cache
def load_registry(path: Path) -> Mapping[str, str]:
    """Model type to pedigree.

    Raises:
        SchemaValidateError: the file is not a mapping of lists of names, or a name stands in it twice.
    """
    document = read_yaml(path)
    pedigrees: dict[str, str] = {}
    lines: dict[str, int | None] = {}
    for pedigree, names in document.data.items():
        if not isinstance(names, list):
            raise SchemaValidateError("must be a list of model types", where=document.where((pedigree,)))
        for i, name in enumerate(cast("list[Any]", names)):
            where, line = document.where((pedigree, i)), document.line((pedigree, i))
            if not isinstance(name, str):
                raise SchemaValidateError(f"got {name!r}; a model type must be a string", where=where)
            if name in pedigrees:
                raise SchemaValidateError(f"{name!r} is already listed on line {lines[name]}", where=where)
            pedigrees[name], lines[name] = pedigree, line
    return MappingProxyType(pedigrees)


def pedigree_of(model_type: str, registry: Path) -> str | None:
    """Pedigree of a model type, case-sensitive; None for one that the registry does not know."""
    return load_registry(registry).get(model_type)

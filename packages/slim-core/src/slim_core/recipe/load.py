"""From a file to a recipe and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import yaml
from pydantic import BaseModel

from slim_core.errors import SchemaValidateError
from slim_core.recipe.problems import dotted, validate
from slim_core.recipe.schema import Metadata, SpecV1
from slim_core.recipe.wording import nearest_name
from slim_core.recipe.yaml_source import Document, Location, kind_of, read_yaml

__all__ = ["Recipe", "dump_recipe", "dump_yaml", "load_recipe", "recipe_from_dict"]

S = TypeVar("S", bound=BaseModel)

_KEYS = ("apiversion", "spec", "metadata")
_PATH = re.compile(r"[\w.\[\]]+")
_STEP = re.compile(r"\w+")


@dataclass(frozen=True)
class Recipe:
    """``apiversion`` and ``metadata`` are checked; ``raw_spec`` waits for the service that understands it."""

    apiversion: str
    metadata: Metadata
    raw_spec: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Free top-level blocks, where authors park their anchors."""
    document: Document = field(default_factory=lambda: Document({}, None, "<recipe>"), repr=False, compare=False)

    @overload
    def spec(self) -> SpecV1: ...

    @overload
    def spec(self, model: type[S]) -> S: ...

    def spec(self, model: type[BaseModel] = SpecV1) -> BaseModel:
        """``spec`` as the protocol's typed form; imports the processors and savers that it names.

        Raises:
            SchemaValidateError: it does not fit; names every problem with line and field.
            EnvError: a processor or saver that it names belongs to a broken package.
        """
        return validate(model, self.raw_spec, document=self.document, at=("spec",))

    def placed(self, remarks: Iterable[str]) -> list[str]:
        """Remarks on ``spec`` with file and line; each begins with a path, as :meth:`StrictModel.warnings` has them."""
        return [f"{self.document.where(('spec', *_steps(text)))}: spec.{text}" for text in remarks]


def _steps(text: str) -> Location:
    """The path that a remark begins with: of ``process[0].qconfig: ...`` process, 0, qconfig."""
    path = _PATH.match(text)
    return tuple(int(step) if step.isdigit() else step for step in _STEP.findall(path[0] if path else ""))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Its ``spec`` is not validated yet and no entry point is imported.

    Raises:
        SecurityError: the file is missing, unreadable or too large.
        SchemaValidateError: not YAML, no apiversion or spec, a misspelt top-level key, or bad metadata.
    """
    return _recipe(read_yaml(path))


def recipe_from_dict(data: Mapping[str, Any], where: str = "<recipe>") -> Recipe:
    """A recipe from plain data or from configuration objects; ``where`` names it in messages.

    Raises:
        SchemaValidateError: as :func:`load_recipe`, without lines.
    """
    return _recipe(Document(dict(data), None, where))


def dump_recipe(recipe: Recipe, spec: BaseModel | None = None) -> str:
    """The effective configuration as YAML: every default filled in, aliases written out.

    Args:
        recipe: the recipe.
        spec: its typed form, where that is not :class:`SpecV1`.

    Raises:
        SchemaValidateError: the recipe's spec does not fit.
    """
    content: dict[str, Any] = {
        "apiversion": recipe.apiversion,
        "spec": (spec or recipe.spec()).model_dump(mode="json"),
        "metadata": recipe.metadata.model_dump(mode="json"),
        **recipe.extra,
    }
    return dump_yaml(content)


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Plain data as the YAML of a recipe: keys in their order, aliases written out."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes aliases out, and quotes the line ends of Unicode, which PyYAML would turn into blanks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return cast("Any", self).represent_scalar(
            "tag:yaml.org,2002:str", text, style='"' if _BREAKS & set(text) else None
        )


_BREAKS = set("\r\x85\u2028\u2029")
_Dumper.add_representer(str, _Dumper.represent_text)


def _recipe(document: Document) -> Recipe:
    data = document.data
    for key in data:
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SchemaValidateError(f"a key must be a string, got {kind_of(key)}", where=document.name)
    for key in data:
        if key not in _KEYS and (near := nearest_name(key, _KEYS, cutoff=0.75)):
            raise _error(document, (key,), f"unknown top-level key; did you mean {near!r}?", f"or rename {key!r}")
    for key, remedy in (
        ("apiversion", "add `apiversion: modelslim_v1`"),
        ("spec", "add `spec:` with `process:` and `save:`"),
    ):
        if data.get(key) is None:
            what = f"{key} is empty" if key in data else f"{key} is missing"
            raise SchemaValidateError(what, where=document.where((key,)), remedy=remedy)
    apiversion, spec, metadata = data["apiversion"], data["spec"], data.get("metadata")
    if not isinstance(apiversion, str) or not apiversion:
        raise _error(document, ("apiversion",), f"got {kind_of(apiversion)}; must be a string")
    if not isinstance(spec, Mapping):
        raise _error(document, ("spec",), f"got {kind_of(spec)}; must be a mapping", "indent its fields below it")
    return Recipe(
        apiversion=apiversion,
        metadata=validate(Metadata, {} if metadata is None else metadata, document=document, at=("metadata",)),
        raw_spec=cast("Mapping[str, Any]", spec),
        extra={key: value for key, value in data.items() if key not in _KEYS},
        document=document,
    )


def _error(document: Document, loc: Location, what: str, remedy: str | None = None) -> SchemaValidateError:
    return SchemaValidateError(what, where=f"{document.where(loc)}: {dotted(loc)}", remedy=remedy)

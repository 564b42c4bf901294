"""Validation of a part of a document, with every problem reported as ``file:line: dotted.path: text``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import get_type_hints, is_typeddict

from slim_core.errors import EnvError, SchemaValidateError, UnsupportedError
from slim_core.recipe.order import WRONG_ORDER
from slim_core.recipe.plugins import PluginConfig
from slim_core.recipe.stages import WRONG_STAGE
from slim_core.recipe.wording import nearest, one_of
from slim_core.recipe.yaml_source import Document, Location, kind_of

__all__ = ["dotted", "validate"]

M = TypeVar("M", bound=BaseModel)

_OWN_WORDS = {"unknown_type", "missing_type", WRONG_ORDER, WRONG_STAGE}
_KEYWORD = re.compile(r"'([^']*)'")


def validate(model: type[M], data: Any, *, document: Document, at: Location) -> M:
    """``data``, found at ``at`` of ``document``, as an instance of ``model``.

    Raises:
        SchemaValidateError: it does not fit; names every problem, in the order of the lines.
        EnvError: a processor or saver that it names belongs to a broken package.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [_problem(details, model, data, document, at) for details in _causes(error)]
        found.sort(key=lambda problem: problem[0])
        lines = [f"{where}: {what}" for _, where, what in found]
        raise SchemaValidateError("\n".join(dict.fromkeys(lines))) from None
    except (EnvError, UnsupportedError) as error:
        where = ": ".join(part for part in (document.where(at), error.where) if part)
        raise type(error)(error.what, where=where, remedy=error.remedy) from error


def dotted(loc: Location) -> str:
    """A location as a reader writes it: ``spec.process[0].qconfig``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return text.removeprefix(".")


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """The errors without those that merely follow from others: of a container because of what is wrong inside it,
    of a default that depends on a field which is wrong itself."""
    details = [one for one in error.errors(include_url=False) if one["type"] != "default_factory_not_called"]
    places = [one["loc"] for one in details]
    return [
        one
        for one in details
        if not any(len(loc) > len(one["loc"]) and loc[: len(one["loc"])] == one["loc"] for loc in places)
    ]


def _problem(
    details: ErrorDetails, model: type[BaseModel], data: Any, document: Document, at: Location
) -> tuple[int, str, str]:
    kind = details["type"]
    loc = _real_steps(details["loc"], data, missing_leaf=kind in ("missing", "missing_type"))
    full = (*at, *loc)
    words = _words(details, kind, loc, model, data)
    return document.line(full) or 0, f"{document.where(full)}: {dotted(full)}", words


def _real_steps(loc: Sequence[str | int], data: Any, *, missing_leaf: bool) -> Location:
    """``loc`` without the steps that are no keys of the data: pydantic adds the branches of a union that it tried."""
    steps: list[str | int] = []
    for i, step in enumerate(loc):
        if isinstance(data, Mapping) and step in data:
            data = cast("Mapping[Any, Any]", data)[step]
        elif isinstance(data, (list, tuple)) and isinstance(step, int) and step < len(cast("Sequence[Any]", data)):
            data = cast("Sequence[Any]", data)[step]
        elif not (missing_leaf and i == len(loc) - 1):
            continue
        steps.append(step)
    return tuple(steps)


def _words(details: ErrorDetails, kind: str, loc: Location, model: type[BaseModel], data: Any) -> str:
    message = details["msg"]
    value: Any = details["input"]
    if kind == "missing":
        return "required field is missing"
    if kind == "extra_forbidden":
        names = _names(model, data, loc[:-1])
        return f"unknown field{nearest(str(loc[-1]), names)} (fields: {one_of(names)})"
    if kind in _OWN_WORDS:
        return message
    if kind == "literal_error":
        allowed = _KEYWORD.findall(str(details.get("ctx", {}).get("expected", "")))
        return f"got {kind_of(value)}; allowed: {one_of(allowed)}{nearest(str(value), allowed)}"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        return f"got {kind_of(value)}; must be a mapping"
    if kind in ("tuple_type", "list_type"):
        return f"got {kind_of(value)}; must be a list"
    message = re.sub(r"^(Input|String|Tuple|List|Dictionary) should", "must", message)
    message = message.replace(" after validation", "")
    if kind_of(value) in ("a mapping", "a list") and not message.startswith("must"):
        return message  # a check of several fields together, which says itself what it met
    return f"got {kind_of(value)}; {message}"


def _names(annotation: Any, data: Any, loc: Location) -> list[str]:
    """Names of the fields that the type expects at ``loc``; empty where any key is welcome."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        for mark in marks:
            if isinstance(mark, PluginConfig) and isinstance(data, Mapping):
                return _names(mark.config_class(str(cast("Mapping[str, Any]", data)["type"])), data, loc)
        return _names(inner, data, loc)
    if get_origin(annotation) in (Union, UnionType):
        return [name for part in get_args(annotation) for name in _names(part, data, loc)]
    fields = _fields(annotation)
    if not loc:
        return list(fields)
    step, rest = loc[0], loc[1:]
    position = 1 if isinstance(step, str) else 0
    inner = fields.get(str(step)) if fields else _item(annotation, position)
    return _names(inner, data[step], rest) if inner is not None else []


def _fields(annotation: Any) -> dict[str, Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {
            field.alias or name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            for name, field in annotation.model_fields.items()
            if not field.exclude  # a field that is there to be refused with its reason
        }
    if is_typeddict(cast("Any", annotation)):
        return get_type_hints(annotation, include_extras=True)
    return {}


def _item(annotation: Any, position: int) -> Any:
    arguments = get_args(annotation)
    return arguments[position] if len(arguments) > position else None

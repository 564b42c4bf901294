"""Command-line options made from the fields of a request, for any argument parser. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from slim_core.errors import SchemaValidateError

__all__ = ["Option", "make_request", "options_of", "read_boolean"]

R = TypeVar("R", bound=BaseModel)

# The protocol writes these with a value, `--trust_remote_code True`; every other boolean is a flag.
_SPELLED_OUT = ("trust_remote_code",)
_LITERALS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One field of a request as an option.

    Args:
        type: what one value is: ``str``, ``int``, ``Path`` or ``bool``.
        flag: the option takes no value.
        several: the option may be repeated.
    """

    name: str
    type: type[Any]
    help: str
    required: bool = False
    flag: bool = False
    several: bool = False

    @property
    def spellings(self) -> tuple[str, ...]:
        """``--model_path`` and ``--model-path``."""
        return tuple(dict.fromkeys((f"--{self.name}", f"--{self.name.replace('_', '-')}")))

    @property
    def metavar(self) -> str:
        """What stands for the value in a help text."""
        if self.type is bool:
            return "True|False"
        return {Path: "PATH", int: "N"}.get(self.type, "TEXT")


def options_of(model: type[BaseModel]) -> list[Option]:
    """The options of a request, in the order of its fields; help texts are the descriptions of the fields."""
    options: list[Option] = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        several = get_origin(kind) is list
        kind = next((part for part in get_args(kind) if part is not type(None)), kind)
        default = field.default
        shown = f" [default: {default}]" if not (field.is_required() or several or default in (None, False)) else ""
        options.append(
            Option(
                name,
                kind,
                f"{field.description or name}{shown}",
                required=field.is_required(),
                flag=kind is bool and name not in _SPELLED_OUT,
                several=several,
            )
        )
    return options


def read_boolean(text: str) -> bool:
    """A boolean as the command line spells it.

    Raises:
        ValueError: it is none of True, False, true, false, 1, 0.
    """
    if text not in _LITERALS:
        raise ValueError(f"write True or False, not {text!r}")
    return _LITERALS[text]


def make_request(model: type[R], given: Mapping[str, Any]) -> R:
    """A request from what the user gave; None and empty lists count as not given, so that ``model_fields_set`` tells.

    Raises:
        SchemaValidateError: a value is not allowed.
    """
    try:
        return model(**{name: value for name, value in given.items() if value is not None and value != []})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        own: Any = first.get("ctx", {}).get("error")  # what a validator of the request says, in its own words
        raise SchemaValidateError(
            f"got {first['input']!r}: {own or first['msg'].lower()}", where=f"--{first['loc'][0]}"
        ) from error

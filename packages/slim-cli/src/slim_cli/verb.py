"""From a plain function to a typer command: requests become options, errors become exit codes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import BaseModel

from slim_core.console import run_command
from slim_core.options import Option, make_request, options_of, read_boolean

__all__ = ["verb"]

_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]


def verb(body: Callable[..., int | None], *, argument: str | None = None) -> Callable[..., None]:
    """``body`` as a typer command.

    A parameter of ``body`` that is a request (a pydantic model) is replaced by one option for each of its fields; the
    field named ``argument`` has no dashes. Every command has ``--debug``. What ``body`` returns is the exit status.
    """
    hints = get_type_hints(body, include_extras=True)
    requests: dict[str, type[BaseModel]] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(body).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            requests[name] = hint
            for option in options_of(hint):
                parameters[option.name] = _parameter(option, is_argument=option.name == argument)
        else:
            parameters[name] = parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
    own_debug = "debug" in parameters
    if not own_debug:
        parameters["debug"] = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG
        )

    def command(**given: Any) -> None:
        debug = bool(given["debug"] if own_debug else given.pop("debug"))
        raise typer.Exit(run_command(lambda: body(**_gathered(given, requests)), debug=debug))

    command.__doc__ = body.__doc__
    command.__name__ = body.__name__
    command.__signature__ = inspect.Signature(list(parameters.values()))  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


def _gathered(given: Mapping[str, Any], requests: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The arguments of the body: fields collected into their requests, the others as they are."""
    collected = {name: make_request(model, _only(given, model.model_fields)) for name, model in requests.items()}
    fields = {field for model in requests.values() for field in model.model_fields}
    return {**{name: value for name, value in given.items() if name not in fields}, **collected}


def _only(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _boolean(text: str) -> bool:
    try:
        return read_boolean(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _parameter(option: Option, *, is_argument: bool) -> inspect.Parameter:
    kind: Any = option.type
    settings: dict[str, Any] = {"help": option.help, "show_default": False}
    if is_argument:
        info: Any = typer.Argument(metavar=option.name.removesuffix("_path").upper(), **settings)
    elif option.flag:
        info = typer.Option(*option.spellings, **settings)
    elif kind is bool:
        kind = str
        info = typer.Option(*option.spellings, metavar=option.metavar, parser=_boolean, **settings)
    else:
        info = typer.Option(*option.spellings, metavar=option.metavar, **settings)
    if option.several:
        kind = list[kind]
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.required else None,
        annotation=Annotated[kind if option.required else kind | None, info],
    )

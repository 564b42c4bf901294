"""The command line of a package that has a service, where the slim-cli package is not installed: quant, eval, practices
and recipe, with the options, messages and exit statuses of ``slim``. Imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from slim_core.console import run_command
from slim_core.options import Option, make_request, options_of, read_boolean
from slim_core.service import EvalRequest, QuantRequest

__all__ = ["main"]


def main(prog: str, description: str, package: str, arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit status; the same as that of ``slim``.

    Args:
        prog: what the user typed to come here.
        description: what the package does, for ``--help``.
        package: the distribution whose version ``--version`` shows.
        arguments: without ``prog``; None: those of the process.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with 2 for a wrong command line.
    """
    given = _parser(prog, description, package).parse_args(arguments)

    def work() -> None:
        from slim_core import commands

        given.work(commands, given)

    return run_command(work, debug=bool(given.debug))


def _parser(prog: str, description: str, package: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=f"{package} {version(package)}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(
        group: Any, name: str, text: str, work: Callable[[Any, argparse.Namespace], None]
    ) -> argparse.ArgumentParser:
        verb = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.set_defaults(work=work)
        return verb

    quant = add(verbs, "quant", "Quantize a model", lambda does, given: does.quantize(_request(QuantRequest, given)))
    for option in options_of(QuantRequest):
        _add(quant, option)
    score = add(
        verbs,
        "eval",
        "Score a model and its quantized files",
        lambda does, given: does.evaluate(_request(EvalRequest, given), given.json),
    )
    for option in options_of(EvalRequest):
        _add(score, option, is_argument=option.name == "model_path")
    score.add_argument("--json", metavar="PATH", type=Path, help="Write the scores to this file too")
    practices = verbs.add_parser("practices", help="The practice library").add_subparsers(metavar="VERB", required=True)
    every = add(practices, "list", "All practices", lambda does, given: does.list_practices())
    show = add(practices, "show", "Print a practice", lambda does, given: does.show_practice(given.config_id))
    show.add_argument("config_id", metavar="ID", help="Name of the practice")
    match = add(
        practices,
        "match",
        "Say which practice quant would use",
        lambda does, given: does.match_practices(given.model_type, given.quant_type, given.tag or []),
    )
    match.add_argument("model_type", metavar="MODEL_TYPE", help="Model name, as for quant")
    for option in options_of(QuantRequest):
        if option.name in ("quant_type", "tag"):
            _add(match, option)
    recipes = verbs.add_parser("recipe", help="Recipes").add_subparsers(metavar="VERB", required=True)
    check = add(
        recipes,
        "check",
        "Validate a recipe and print it with every default filled in",
        lambda does, given: does.say(does.effective_recipe(given.file).rstrip()),
    )
    migrate = add(
        recipes,
        "migrate",
        "Print a recipe of modelslim_v0 as one of modelslim_v1",
        lambda does, given: does.migrate_recipe(given.file, given.output),
    )
    for verb in (check, migrate):
        verb.add_argument("file", metavar="FILE", type=Path, help="Recipe (YAML)")
    migrate.add_argument("--output", metavar="PATH", type=Path, help="New file to write; default: standard output")
    for verb in (score, every, show, match, check, migrate):
        verb.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    return parser


def _add(parser: argparse.ArgumentParser, option: Option, *, is_argument: bool = False) -> None:
    settings: dict[str, Any] = {"help": option.help.replace("%", "%%")}
    if is_argument:
        parser.add_argument(option.name, metavar="MODEL", type=option.type, **settings)
        return
    settings |= {"dest": option.name, "required": option.required}
    if option.flag:
        parser.add_argument(*option.spellings, action="store_true", default=None, **settings)
        return
    settings |= {"metavar": option.metavar, "type": _boolean if option.type is bool else option.type}
    parser.add_argument(*option.spellings, action="append" if option.several else "store", **settings)


def _boolean(text: str) -> bool:
    try:
        return read_boolean(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _request(model: type[BaseModel], given: argparse.Namespace) -> Any:
    return make_request(model, {name: getattr(given, name) for name in model.model_fields})

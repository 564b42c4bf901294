"""The ``slim`` command: which verbs there are."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from slim_cli import practices, recipe
from slim_cli.evaluate import evaluate
from slim_cli.inspect import inspect
from slim_cli.quant import quant
from slim_cli.schema import schema
from slim_cli.verb import verb
from slim_cli.verify import verify

__all__ = ["app", "main"]

_PACKAGES = ("slim-cli", "slim-core", "slim-llm", "slim-vlm", "slim-sd")
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def _group(help_text: str, *, bare_shows_help: bool) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        no_args_is_help=bare_shows_help,
        invoke_without_command=not bare_shows_help,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
    )


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    for package in _PACKAGES:
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    raise typer.Exit


app = _group(
    "Post-training quantization: a floating-point checkpoint in, one that engines load as it is out.",
    bare_shows_help=False,
)


@app.callback()
def slim(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_practices = _group("The practice library: list, show, match.", bare_shows_help=True)
_practices.command("list")(verb(practices.list_all))
_practices.command("show")(verb(practices.show))
_practices.command("match")(verb(practices.match))
_recipes = _group("Recipes: check, migrate.", bare_shows_help=True)
_recipes.command("check")(verb(recipe.check))
_recipes.command("migrate")(verb(recipe.migrate))

app.command("quant")(verb(quant))
app.command("eval")(verb(evaluate, argument="model_path"))
app.command("inspect")(verb(inspect))
app.command("verify")(verb(verify))
app.add_typer(_practices, name="practices")
app.add_typer(_recipes, name="recipe")
app.command("schema")(verb(schema))


def main() -> None:
    """The console script."""
    app()

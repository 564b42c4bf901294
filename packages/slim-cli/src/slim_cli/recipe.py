"""``slim recipe``: check, migrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slim_core.console import say

__all__ = ["check", "migrate"]


def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe (YAML)")]) -> None:
    """Validate a recipe and print it with every default filled in."""
    from slim_core.commands import effective_recipe

    say(effective_recipe(file).rstrip())


def migrate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe (YAML) of modelslim_v0")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="New file to write; default: standard output")
    ] = None,
) -> None:
    """Print a recipe of an outdated protocol as one of the protocol that replaced it."""
    from slim_core.commands import migrate_recipe

    migrate_recipe(file, output)

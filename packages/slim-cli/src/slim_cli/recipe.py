"""``slim recipe``: check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slim_core.console import say

__all__ = ["check"]


def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe (YAML)")]) -> None:
    """Validate a recipe and print it with every default filled in."""
    from slim_core.commands import effective_recipe

    say(effective_recipe(file).rstrip())

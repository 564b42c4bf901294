"""``slim schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slim_core.console import say

__all__ = ["schema"]


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="File to write; default: standard output")
    ] = None,
    apiversion: Annotated[
        str, typer.Option("--apiversion", metavar="NAME", help="Protocol of the recipes")
    ] = "modelslim_v1",
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from slim_core.commands import write_file
    from slim_core.recipe import recipe_json_schema
    from slim_core.service import find_service

    spec = find_service(apiversion, where="--apiversion").spec_type()
    text = json.dumps(recipe_json_schema(spec), indent=2, ensure_ascii=False)
    if output is None:
        say(text)
    else:
        write_file(output, text + "\n")

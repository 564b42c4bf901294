"""``slim verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slim_core.console import EXIT_PROBLEMS, say

__all__ = ["verify"]


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that slim quant wrote")],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="PATH", help="Original model, to compare the weights with")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="NAME", help="Engine that must be able to load every layer")
    ] = None,
) -> int:
    """Check an output folder.

    Structure, dtypes, shapes, scales, and whether the engines' loaders have a class for every layer.
    """
    from slim_core.dispatch import original_opener, original_parts
    from slim_core.evaluation.verify import verify_folder

    verification = verify_folder(folder, model, engine, original_opener(folder), original_parts(folder))
    say(verification.text())
    return EXIT_PROBLEMS if verification.problems else 0

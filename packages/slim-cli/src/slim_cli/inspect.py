"""``slim inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slim_core.console import say

__all__ = ["inspect"]


def inspect(folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that slim quant wrote")]) -> None:
    """Say what an output folder holds."""
    from slim_core.evaluation.inspect import inspect_folder

    say(inspect_folder(folder).text())

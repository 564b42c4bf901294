"""``slim eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slim_core.service import EvalRequest

__all__ = ["evaluate"]


def evaluate(
    request: EvalRequest,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the scores to this file too")
    ] = None,
) -> None:
    """Score a model and its quantized files.

    Perplexity, KL divergence and agreement, computed as the target's integer arithmetic would.
    """
    from slim_core.commands import evaluate as run

    run(request, json)

"""``slim practices``: list, show, match."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["list_all", "match", "show"]


def list_all() -> None:
    """All practices, in the order in which they are tried."""
    from slim_core.commands import list_practices

    list_practices()


def show(config_id: Annotated[str, typer.Argument(metavar="ID", help="Name of the practice")]) -> None:
    """Print the recipe of a practice."""
    from slim_core.commands import show_practice

    show_practice(config_id)


def match(
    model_type: Annotated[str, typer.Argument(metavar="MODEL_TYPE", help="Model name, as for slim quant")],
    quant_type: Annotated[
        str | None, typer.Option("--quant_type", "--quant-type", metavar="TEXT", help="Quantization type, e.g. w8a8")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="TEXT", help="Scenario tag, repeatable")] = None,
) -> None:
    """Say which practice slim quant would use, and whether it would ask first."""
    from slim_core.commands import match_practices

    match_practices(model_type, quant_type, tag or [])

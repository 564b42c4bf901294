"""Whether the stages of a recipe fit together: what one learns must be used by another."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from slim_core.recipe.base import ProcessorConfig
from slim_core.recipe.order import Place, leaves

__all__ = ["WRONG_STAGE", "check_stages"]

WRONG_STAGE = "wrong_stage"


def check_stages(prior: Sequence[Sequence[ProcessorConfig]], main: Sequence[ProcessorConfig]) -> None:
    """Let every processor say whether it can stand where it stands.

    Raises:
        pydantic.ValidationError: names every processor that cannot, and why.
    """
    placed: list[list[tuple[Place, ProcessorConfig]]] = [
        [((*start, *place), config) for place, config in leaves(process)]
        for start, process in [*((("prior", i, "process"), one) for i, one in enumerate(prior)), (("process",), main)]
    ]
    stages = [[config for _, config in stage] for stage in placed]
    problems = [
        InitErrorDetails(type=PydanticCustomError(WRONG_STAGE, "{text}", {"text": text}), loc=place, input=config.type)
        for at, stage in enumerate(placed)
        for place, config in stage
        if (text := config.objection(stages, at)) is not None
    ]
    if problems:
        raise ValidationError.from_exception_data("spec", problems)

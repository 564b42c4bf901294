"""The order in which processors must stand, since each works on what those before it have left.

Rotating a model folds the norms into the linears behind them, which would undo a smoothing; and both reshape float
weights, so they come before whatever quantizes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from slim_core.recipe.base import Phase, ProcessorConfig

__all__ = ["WRONG_ORDER", "Place", "in_order", "leaves"]

WRONG_ORDER = "wrong_order"
_WORK = {
    Phase.ROTATION: "rotates the model",
    Phase.SMOOTHING: "smooths float weights",
    Phase.QUANTIZATION: "quantizes",
}
Place = tuple[str | int, ...]
"""Steps into a list of processors."""


def in_order(processors: tuple[ProcessorConfig, ...]) -> tuple[ProcessorConfig, ...]:
    """The processors of one stage of a recipe, if each comes before those of a later :class:`Phase`.

    Groups count as what they hold; processors without a phase may stand anywhere.

    Raises:
        pydantic.ValidationError: names every processor that stands too late, and where to move it.
    """
    problems: list[InitErrorDetails] = []
    latest: tuple[Place, ProcessorConfig, Phase] | None = None
    for place, config in leaves(processors):
        phase = config.phase
        if phase is None:
            continue
        if latest is not None and phase < latest[2]:
            text = (
                f"{config.type} {_WORK[phase]}, but {latest[1].type} before it {_WORK[latest[2]]}; "
                f"move {config.type} above process{_path(latest[0])} ({latest[1].type})"
            )
            error = PydanticCustomError(WRONG_ORDER, "{text}", {"text": text})
            problems.append(InitErrorDetails(type=error, loc=place, input=config.type))
        elif latest is None or phase > latest[2]:
            latest = place, config, phase
    if problems:
        raise ValidationError.from_exception_data("process", problems)
    return processors


def leaves(configs: Sequence[ProcessorConfig], at: Place = ()) -> Iterator[tuple[Place, ProcessorConfig]]:
    """The processors that do the work, with their places: a group is replaced by its members."""
    for index, config in enumerate(configs):
        place = (*at, index)
        members = [(name, held) for name in type(config).model_fields if (held := _held(getattr(config, name)))]
        if not members:
            yield place, config
        for name, held in members:
            yield from leaves(held, (*place, name))


def _held(value: Any) -> Sequence[ProcessorConfig]:
    items = cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else ()
    return items if items and all(isinstance(item, ProcessorConfig) for item in items) else ()


def _path(place: Place) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)

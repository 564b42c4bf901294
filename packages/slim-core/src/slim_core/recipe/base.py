"""Base classes of everything a recipe is parsed into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

__all__ = ["Flag", "Integer", "Number", "Phase", "ProcessorConfig", "SaverConfig", "StrictModel"]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_expected", "must be a number, not true or false")
    return value


Flag = Annotated[bool, Strict()]
"""A boolean that only YAML's own true and false satisfy; for containers, since fields of a model check this anyway."""

Integer = Annotated[int, BeforeValidator(_no_flag)]
"""An integer that true and false do not satisfy; for containers, since fields of a model check this anyway."""

Number = Annotated[float, BeforeValidator(_no_flag)]
"""A float that true and false do not satisfy; takes YAML 1.1's ``1e-5``, which arrives as a string."""


class StrictModel(BaseModel):
    """Immutable, refuses unknown keys, and keeps booleans and numbers apart.

    Raises:
        pydantic.ValidationError: when built from values that do not fit. Recipes go through
            :func:`slim_core.recipe.load_recipe`, which reports the same as SchemaValidateError with lines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _keep_flags_apart(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _members(cls.model_fields[info.field_name].annotation) if info.field_name else set[Any]()
        if bool in kinds:
            if not isinstance(value, bool) and not kinds & {str, int, float} and value is not None:
                raise PydanticCustomError("flag_expected", "must be true or false, without quotes")
        elif isinstance(value, bool) and kinds & {int, float} and not kinds - {int, float, type(None)}:
            raise PydanticCustomError("number_expected", "must be a number, not true or false")
        return value

    def warnings(self) -> list[str]:
        """What is accepted but has no effect, here and below: one ``field.path: text`` each."""
        return [text for name in type(self).model_fields for text in _warnings_of(name, getattr(self, name))]


def _members(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _members(part)}
    return {annotation}


def _warnings_of(place: str, value: Any) -> list[str]:
    if isinstance(value, StrictModel):
        return [f"{place}{'' if text.startswith('[') else '.'}{text}" for text in value.warnings()]
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[Any]", value)
        return [text for i, item in enumerate(items) for text in _warnings_of(f"{place}[{i}]", item)]
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return [text for key, item in entries.items() for text in _warnings_of(f"{place}.{key}", item)]
    return []


class Phase(IntEnum):
    """What a processor does to the model; in a recipe all of one phase come before those of the next."""

    ROTATION = 1
    SMOOTHING = 2
    QUANTIZATION = 3


class ProcessorConfig(StrictModel):
    """Configuration of one processor. Subclasses narrow ``type`` to the literal name of their entry point."""

    phase: ClassVar[Phase | None] = None
    """Where it must stand among the processors of a recipe; None: anywhere."""

    # A string; declared Any since a type checker lets no mutable field be narrowed to a literal.
    type: Any = Field(description="Which processor this is")

    def objection(self, stages: Sequence[Sequence[ProcessorConfig]], at: int) -> str | None:
        """Why it cannot stand in this stage of a recipe, given what stands in the others; None if it can.

        Args:
            stages: the processors of all stages, groups replaced by their members; the main stage is the last.
            at: which of the stages it stands in.
        """
        return None


class SaverConfig(StrictModel):
    """Configuration of one saver. Subclasses narrow ``type`` to the literal name of their entry point."""

    # A string; declared Any since a type checker lets no mutable field be narrowed to a literal.
    type: Any = Field(description="Which saver this is")

"""``spec`` of the multimodal protocols, whose models are always quantized layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, field_validator, model_validator

from slim_core.recipe.schema import SpecV1

__all__ = ["LayerWiseSpec"]

_RUNNER = "layer_wise"


class LayerWiseSpec(SpecV1):
    """The fields of ``modelslim_v1``. ``runner`` takes what that takes, and becomes ``layer_wise`` with a warning."""

    models: ClassVar[str] = "these models"
    """What is quantized, for the warning."""

    runner: Literal["auto", "layer_wise", "dp_layer_wise", "model_wise"] = Field(
        default=_RUNNER, description="How layers are scheduled: whatever is given, one at a time"
    )

    _asked: str = PrivateAttr(default=_RUNNER)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_the_runner(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        spec = handler(data)
        if isinstance(data, Mapping):
            spec._asked = cast("Mapping[str, Any]", data).get("runner", _RUNNER)
        return spec

    @field_validator("runner")
    @classmethod
    def _one_layer_at_a_time(cls, value: str) -> str:
        return _RUNNER

    def coercions(self) -> list[str]:
        """What was given and is not what counts, as :meth:`warnings` has it."""
        if self._asked == _RUNNER:
            return []
        return [f"runner: {self._asked!r} becomes {_RUNNER!r}, the only one for {self.models}"]

    def warnings(self) -> list[str]:
        return [*self.coercions(), *super().warnings()]

"""Why what was observed of the input of a linear is of no use."""

from __future__ import annotations

from slim_core.errors import InvalidModelError, SpecError

__all__ = ["not_finite", "not_observed"]


def not_observed(linear: str) -> SpecError:
    """The error where nothing was observed of an input whose range is needed."""
    return SpecError(
        "no calibration sample reached this linear, so its activation range is unknown",
        where=linear,
        remedy="use a larger calibration set, or exclude the linear or quantize it per_token",
    )


def not_finite(linear: str) -> InvalidModelError:
    """The error where NaN or infinity was observed."""
    return InvalidModelError(
        "its activations hold NaN or infinity", where=linear, remedy="check the model and the calibration set"
    )

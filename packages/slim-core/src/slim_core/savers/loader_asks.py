"""What a class of an engine may ask of a layer beyond its type: the words of the loader tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slim_core.quantization.kinds import LayerForm

__all__ = ["ASKED", "Facts"]


@dataclass(frozen=True)
class Facts:
    """What is known of a layer; a width or a bias of which nothing is known counts as right."""

    form: LayerForm
    width: int | None
    has_bias: bool | None

    def divides(self, size: int) -> bool:
        return not (self.width or 0) % size


ASKED: dict[str, tuple[Callable[[Facts], bool], str]] = {
    "per_channel": (lambda it: not it.form.group_size, "only per channel, not in groups"),
    "grouped": (lambda it: it.form.group_size > 0, "only in groups, not per channel"),
    "symmetric": (lambda it: it.form.symmetric, "only without weight_offset; quantize symmetrically"),
    # Its inputs are packed as it runs, eight to a number of 32 bits.
    "packed": (lambda it: it.divides(8), "only if 8 divides their input features"),
    "even_blocks": (lambda it: it.divides(64), "only if 64 divides their input features"),
    "whole_blocks": (lambda it: it.divides(32), "only if 32 divides their input features"),
    "bias": (lambda it: it.has_bias is not False, "only with a bias"),
    "alone": (lambda _: True, "only in models without groups"),  # see refused_together
}
"""Whether a layer is what a word asks for, and the end of a sentence that begins with what the engine loads."""

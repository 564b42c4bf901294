"""Which parts of blocks are given some tokens at a time while samples run through them."""

from __future__ import annotations

from collections.abc import Mapping

from slim_core.model.experts import expert_layers
from slim_core.model.portions import FeedForward, feed_forwards
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit
from slim_core.quantization.statistics import Need

__all__ = ["portioned"]


def portioned(model: StreamedModel, unit: Unit, requests: Mapping[str, frozenset[Need]]) -> list[FeedForward]:
    """The parts of a unit for which that is possible; they are tried when the unit is at work.

    Experts are given few tokens each; where the extremes of whole samples are asked for, samples stay whole.

    Args:
        requests: by linear, what is to be observed of its inputs.
    """
    layers = expert_layers(model.module, unit.linears)
    apart = {name for layer in layers for expert in layer.experts.values() for name in expert.values()}
    apart |= {name for name, needs in requests.items() if Need.SAMPLE_RANGES in needs}
    return feed_forwards(model.module, unit.name, unit.linears, apart)

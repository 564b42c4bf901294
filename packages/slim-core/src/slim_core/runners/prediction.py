"""How much memory a run will take, worked out before it from headers and from what is to be observed.

What is counted was held against ``benchmarks/memory.py --prediction`` on the CPU with one thread, one or two runs of a
method: static and dynamic minmax, GPTQ and AutoRound came within 0.89 to 1.06 of what was measured, which itself varies
by some percent. Other allocators and more threads keep other amounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slim_core.checkpoint.writer import QUEUE_BYTES
from slim_core.model.units import LinearInfo, StreamedModel, Unit
from slim_core.processors.base import Assignment, Processor
from slim_core.quantization.statistics import Need
from slim_core.quantization.statistics.histogram import BINS
from slim_core.quantization.statistics.inputs import SAMPLED_TOKENS
from slim_core.runners.choice import RunnerChoice, unit_bytes
from slim_core.savers.loaders import fused_leaves

__all__ = ["Calibration", "peak_memory"]

# What the first forward of a block loads (kernels, thread stacks) and the heaps of the threads keep.
_LIBRARIES = 48 << 20
# Without a forward: the blocks of rows at work, and the pages of the file that they come from.
_ROW_BLOCKS = 16 << 20
# Tensors as wide as the widest linear that a block has in memory at once.
_WIDE_TENSORS = 4


@dataclass(frozen=True)
class Calibration:
    """What passes through the blocks.

    Args:
        hidden_bytes: what all samples keep while they wait between two blocks.
        tokens: of the largest forward.
        keeps_layers: whether the quantized layers of a block wait for a forward through them.
        trains: whether gradients flow through the block.
    """

    hidden_bytes: int
    tokens: int = 0
    keeps_layers: bool = False
    trains: bool = False


def peak_memory(
    model: StreamedModel,
    runner: RunnerChoice,
    processors: Sequence[Processor],
    assignments: Mapping[str, Assignment],
    requests: Mapping[str, frozenset[Need]],
    calibration: Calibration | None,
) -> int:
    """Predicted bytes beyond what the process takes when the run begins.

    Args:
        calibration: None if no sample is run.
    """
    sizes = [info.in_features * info.out_features for unit in model.units for info in unit.linears]
    codes = [
        info.in_features * info.out_features
        for unit in model.units
        for info in unit.linears
        if info.name in assignments
    ]
    largest, queue = max(codes, default=0), min(QUEUE_BYTES, sum(codes))
    if calibration is None:
        working = max((_working(unit, processors, assignments) for unit in model.units), default=0)
        itemsize = (model.dtype.itemsize if model.dtype else 4) + 1
        return itemsize * largest + working + queue + _ROW_BLOCKS
    blocks = [unit for unit in model.units if unit.block is not None]
    loaded = [unit_bytes(model, unit) for unit in blocks]
    resident = sum(loaded) if runner.keeps_model else max(loaded, default=0)
    itemsize = model.dtype.itemsize if model.dtype else 4
    phases: list[int] = []
    for unit, size in zip(blocks, loaded, strict=True):
        observed = _observed(unit, requests)
        forward = _forward(unit, calibration, itemsize) + itemsize * max(sizes, default=0)  # the product packs a weight
        work = _working(unit, processors, assignments)
        if calibration.trains:
            work += forward
        layers = size // 2 + 4 * largest if calibration.keeps_layers else 2 * largest
        phases.append(observed + max(forward, work + layers))
    return resident + max(phases, default=0) + queue + calibration.hidden_bytes + _LIBRARIES


def _working(unit: Unit, processors: Iterable[Processor], assignments: Mapping[str, Assignment]) -> int:
    """What processors need: those that reshape keep it until the unit is done, the others take turns."""
    kept, turns = 0, [0]
    for processor in processors:
        size = processor.working_bytes(unit.linears, assignments)
        if processor.reshapes:
            kept += size
        else:
            turns.append(size)
    return kept + max(turns)


def _observed(unit: Unit, requests: Mapping[str, frozenset[Need]]) -> int:
    """What the statistics of a block take; linears with the same input share them."""
    inputs: dict[tuple[str, str], tuple[int, frozenset[Need]]] = {}
    for info in unit.linears:
        if needs := requests.get(info.name):
            _, before = inputs.get(_input_of(info), (0, frozenset[Need]()))
            inputs[_input_of(info)] = info.in_features, before | needs
    return sum(_statistics(width, needs) for width, needs in inputs.values())


def _input_of(info: LinearInfo) -> tuple[str, str]:
    """The same for linears that are known to read the same input: q, k and v; gate and up."""
    parent, _, leaf = info.name.rpartition(".")
    return parent, next((fused[0] for fused in fused_leaves() if leaf in fused), leaf)


def _statistics(width: int, needs: frozenset[Need]) -> int:
    sizes = {
        Need.HESSIAN: 4 * width * width,
        Need.TOKENS: 4 * width * SAMPLED_TOKENS,
        Need.HISTOGRAM: 8 * BINS,
        Need.CHANNELS: 32 * width,
    }
    return sum(sizes.get(need, 0) for need in needs)


def _forward(unit: Unit, calibration: Calibration, itemsize: int) -> int:
    """Activations inside a block; all of them where gradients will need them."""
    if calibration.trains:
        return calibration.tokens * sum(8 * info.in_features + 4 * info.out_features for info in unit.linears)
    widest = max((max(info.in_features, info.out_features) for info in unit.linears), default=0)
    return calibration.tokens * widest * itemsize * _WIDE_TENSORS

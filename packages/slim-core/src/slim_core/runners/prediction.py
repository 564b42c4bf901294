"""How much memory a run will take, worked out before it from headers and from what is to be observed.

What is counted was held against ``benchmarks/memory.py --prediction`` on the CPU with one thread, one or two runs of a
method: static and dynamic minmax, GPTQ and AutoRound came within 0.89 to 1.06 of what was measured, which itself varies
by some percent. Other allocators and more threads keep other amounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from slim_core.checkpoint.writer import QUEUE_BYTES
from slim_core.model.expert_weights import parameters_of_experts
from slim_core.model.experts import ExpertLayer, expert_layers
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment, Processor
from slim_core.quantization.statistics import Need, hessian_bytes
from slim_core.quantization.statistics.histogram import BINS
from slim_core.quantization.statistics.inputs import SAMPLED_TOKENS
from slim_core.runners.choice import RunnerChoice, unit_bytes
from slim_core.savers.loaders import fused_leaves

__all__ = ["Calibration", "Share", "TowerLoad", "input_of", "memory_shares"]

# What the first forward of a block loads (kernels, thread stacks) and the heaps of the threads keep.
_LIBRARIES = 48 << 20
# Without a forward: the blocks of rows at work, and the pages of the file that they come from.
_ROW_BLOCKS = 16 << 20
# Kernels that the library compiles for half-precision products on the CPU and keeps (limits in slim_core.memory), if
# every expert is given another number of tokens, and what of the heap lies between them: so much for samples of 256
# tokens and more. The kernels alone took 36 MiB with experts of 768 x 384, 35 with 1024 x 512.
_EXPERT_KERNELS, _EXPERT_TOKENS = 64 << 20, 256
# Tensors as wide as the widest linear that a block has in memory at once.
_WIDE_TENSORS = 4
# Of the sample at work, of those that wait for it, and what making another takes besides.
_IMAGES_AT_ONCE = 7


@dataclass(frozen=True)
class TowerLoad:
    """What runs through towers, such as images.

    Args:
        tokens: of the largest forward inside a tower, such as patches.
        largest, total: bytes of the inputs of the largest sample that only towers read, and of all samples.
    """

    tokens: int = 0
    largest: int = 0
    total: int = 0


@dataclass(frozen=True)
class Calibration:
    """What passes through the blocks.

    Args:
        hidden_bytes: what all samples keep while they wait between two blocks.
        tokens: of the largest forward.
        keeps_layers: whether the quantized layers of a block wait for a forward through them.
        trains: whether gradients flow through the block.
        runs_again: whether the block is run once more after processors have reshaped it.
        towers: what runs through the model's towers.
        waiting_bytes: what the sample at work keeps, which is all that is in memory if the others wait on disk.
    """

    hidden_bytes: int
    tokens: int = 0
    keeps_layers: bool = False
    trains: bool = False
    runs_again: bool = True
    towers: TowerLoad = TowerLoad()
    waiting_bytes: int = 0


@dataclass(frozen=True)
class Share:
    """A part of the memory that a run takes when it takes the most.

    Args:
        what: what it is for.
        host, device: where it lies if the run computes on a device other than the CPU; on the CPU both are one. What
            lies in neither is not there then.
    """

    what: str
    nbytes: int
    host: bool = True
    device: bool = False


def memory_shares(
    model: StreamedModel,
    runner: RunnerChoice,
    processors: Sequence[Processor],
    assignments: Mapping[str, Assignment],
    requests: Mapping[str, frozenset[Need]],
    calibration: Calibration | None,
    experts: Mapping[str, Sequence[ExpertLayer]] = MappingProxyType({}),
    *,
    spills: bool = False,
) -> list[Share]:
    """What the predicted memory beyond what the process takes when the run begins is made of.

    Args:
        calibration: None if no sample is run.
        experts: by unit, the experts that are in memory one at a time; none where whole blocks are.
        spills: whether samples that are not at work wait on disk.
    """
    sizes = [info.in_features * info.out_features for unit in model.units for info in unit.linears]
    codes = [
        info.in_features * info.out_features
        for unit in model.units
        for info in unit.linears
        if info.name in assignments
    ]
    largest, queue = max(codes, default=0), min(QUEUE_BYTES, sum(codes))
    waiting = Share("what waits to be written", queue)
    if calibration is None:
        working = max((_working(unit, processors, assignments) for unit in model.units), default=0)
        itemsize = (model.dtype.itemsize if model.dtype else 4) + 1
        return [
            Share("the largest weight and its codes", itemsize * largest),
            Share("the work on it", working + _ROW_BLOCKS, device=True),
            waiting,
        ]
    blocks = model.running
    loaded = [unit_bytes(model, unit) - _absent(model, unit, experts.get(unit.name, ())) for unit in blocks]
    itemsize = model.dtype.itemsize if model.dtype else 4
    phases: list[list[Share]] = [[]]
    for unit in blocks:
        layers = experts.get(unit.name, ())
        packed = itemsize * max(sizes, default=0)  # the product packs a weight
        forward = _forward(unit, calibration, itemsize) + packed
        work = _working(unit, processors, assignments, layers, copied=calibration.runs_again)
        if calibration.trains:
            work += forward
        made = unit_bytes(model, unit) // 2 + 4 * largest if calibration.keeps_layers else 2 * largest
        observed = _observed(unit, requests)
        hessians = _observed(unit, {name: needs & {Need.HESSIAN} for name, needs in requests.items()})
        seen = [
            Share(f"Hessians of the inputs of {unit.name}", hessians, device=True),
            Share(f"other statistics of the inputs of {unit.name}", observed - hessians, device=True),
        ]
        if unit.block is None:
            seen.append(Share(f"images on their way to {unit.name}", _images(calibration)))
        running = [Share(f"activations inside {unit.name}", forward, host=False, device=True)]
        quantizing = [
            Share(f"the work of processors on {unit.name}", work, device=True),
            Share(f"quantized layers of {unit.name}", made),
        ]
        phases.append(seen + max(running, quantizing, key=_total))
    what = "weights of all blocks" if runner.keeps_model else "weights of the largest block"
    if experts:
        what += " without its experts, and of one expert"
    resident = sum(loaded) if runner.keeps_model else max(loaded, default=0)
    return [
        Share(what, resident, device=True),
        *max(phases, key=_total),
        waiting,
        Share("activations of the sample at work, before and after a block", calibration.waiting_bytes)
        if spills
        else Share("activations of all samples between two blocks", calibration.hidden_bytes),
        Share("kernels, and what the heap keeps", _LIBRARIES),
        Share("kernels for the tokens that experts are given", _kernels(model, blocks, calibration), host=False),
    ]


def _kernels(model: StreamedModel, blocks: Sequence[Unit], calibration: Calibration) -> int:
    half = model.dtype in (torch.bfloat16, torch.float16)
    if not half or not any(expert_layers(model.module, unit.linears) for unit in blocks):
        return 0
    return _EXPERT_KERNELS * min(calibration.tokens, _EXPERT_TOKENS) // _EXPERT_TOKENS


def _total(shares: Iterable[Share]) -> int:
    return sum(share.nbytes for share in shares)


def _absent(model: StreamedModel, unit: Unit, layers: Sequence[ExpertLayer]) -> int:
    """Bytes of the experts of a unit but for the largest one."""
    sizes: dict[tuple[str, int], int] = {}
    for name, key in parameters_of_experts(layers, unit.parameters).items():
        sizes[key] = sizes.get(key, 0) + model.source.meta(unit.parameters[name]).nbytes
    return sum(sizes.values()) - max(sizes.values(), default=0)


def _working(
    unit: Unit,
    processors: Iterable[Processor],
    assignments: Mapping[str, Assignment],
    layers: Sequence[ExpertLayer] = (),
    *,
    copied: bool = True,
) -> int:
    """What processors need: those that reshape keep it until the unit is done, the others take turns.

    Args:
        layers: experts that are in memory one at a time; what is made of their weights goes with them.
        copied: whether the module is given the weights that change.
    """
    kept, turns = 0, [0]
    others = {name for layer in layers for one in list(layer.experts.values())[1:] for name in one.values()}
    present = [info for info in unit.linears if info.name not in others]
    for processor in processors:
        if processor.reshapes:
            kept += processor.working_bytes(present, assignments)
            kept -= 0 if copied else processor.copied_bytes(present)
        else:
            turns.append(processor.working_bytes(unit.linears, assignments))
    return kept + max(turns)


def _observed(unit: Unit, requests: Mapping[str, frozenset[Need]]) -> int:
    """What the statistics of a block take; linears with the same input share them."""
    inputs: dict[tuple[str, str], tuple[int, frozenset[Need]]] = {}
    for info in unit.linears:
        if needs := requests.get(info.name):
            _, before = inputs.get(input_of(info), (0, frozenset[Need]()))
            inputs[input_of(info)] = info.in_features, before | needs
    return sum(_statistics(width, needs) for width, needs in inputs.values())


def input_of(info: LinearInfo) -> tuple[str, str]:
    """The same for linears that are known to read the same input: q, k and v; gate and up."""
    parent, _, leaf = info.name.rpartition(".")
    return parent, next((fused[0] for fused in fused_leaves() if leaf in fused), leaf)


def _statistics(width: int, needs: frozenset[Need]) -> int:
    sizes = {
        Need.HESSIAN: hessian_bytes(width),
        Need.TOKENS: 4 * width * SAMPLED_TOKENS,
        Need.HISTOGRAM: 8 * BINS,
        Need.CHANNELS: 32 * width,
    }
    return sum(sizes.get(need, 0) for need in needs)


def _forward(unit: Unit, calibration: Calibration, itemsize: int) -> int:
    """Activations inside a block; all of them where gradients will need them."""
    tokens = calibration.tokens if unit.block is not None else calibration.towers.tokens
    if calibration.trains:
        return tokens * sum(8 * info.in_features + 4 * info.out_features for info in unit.linears)
    widest = max((max(info.in_features, info.out_features) for info in unit.linears), default=0)
    return tokens * widest * itemsize * _WIDE_TENSORS


def _images(calibration: Calibration) -> int:
    """Inputs of towers that are in memory at once: of the sample at work and those that are made meanwhile; of all
    samples, if they run more than once."""
    load = calibration.towers
    several = calibration.runs_again or calibration.keeps_layers or calibration.trains
    return load.total if several else min(load.total, _IMAGES_AT_ONCE * load.largest)

"""How much memory a run will take, worked out before it from headers and from what is to be observed.

What is counted was held against ``benchmarks/memory.py --prediction`` on the CPU with one thread, for eight shapes of a
model; benchmarks/RESULTS.md has the figures. Other allocators and more threads keep other amounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from slim_core.checkpoint.writer import QUEUE_BYTES
from slim_core.model.expert_weights import parameters_of_experts
from slim_core.model.experts import ExpertLayer, expert_layers
from slim_core.model.portions import portion_tokens
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment, Processor
from slim_core.quantization.statistics import Need, hessian_bytes
from slim_core.quantization.statistics.histogram import BINS
from slim_core.quantization.statistics.inputs import SAMPLED_TOKENS
from slim_core.runners.choice import RunnerChoice, unit_bytes
from slim_core.runners.plan_portions import portioned
from slim_core.savers.loaders import fused_leaves

__all__ = ["Calibration", "Share", "TowerLoad", "input_of", "memory_shares"]

# Code that is loaded when it first computes (4 MiB without a forward, 13 with one), kernels compiled for a shape, and
# free places of the heap that what comes and goes touches: an aligned block of glibc never fits the place it left.
_QUANTIZES, _RUNS = 17 << 20, 28 << 20
# The code of factorisations.
_FACTORISES = 4 << 20
# The blocks of rows at work, and the pages of the file that they come from, at most.
_ROW_BLOCKS = 4 << 20
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
        device: the kind of device that blocks run on.
    """

    hidden_bytes: int
    tokens: int = 0
    keeps_layers: bool = False
    trains: bool = False
    runs_again: bool = True
    towers: TowerLoad = TowerLoad()
    waiting_bytes: int = 0
    device: str = "cpu"


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
    if calibration is None:
        phases = [_quantizing(unit, processors, assignments) for unit in model.units]
        return [*max(phases, key=_total), Share("kernels, and what the heap keeps", _QUANTIZES)]
    blocks = model.running
    loaded = [unit_bytes(model, unit) - _absent(model, unit, experts.get(unit.name, ())) for unit in blocks]
    itemsize = model.dtype.itemsize if model.dtype else 4
    factorises = any(Need.HESSIAN in needs for needs in requests.values())
    kept = _RUNS + (_FACTORISES if factorises else 0)
    what = "weights of all blocks" if runner.keeps_model else "weights of the largest block"
    if experts:
        what += " without its experts, and of one expert"
    phases = list[list[Share]]()
    for unit, own in zip(blocks, loaded, strict=True):
        layers = experts.get(unit.name, ())
        weights = Share(what, sum(loaded) if runner.keeps_model else own, device=True)
        observed = _observed(unit, requests)
        hessians = _observed(unit, {name: needs & {Need.HESSIAN} for name, needs in requests.items()})
        seen = [
            Share(f"Hessians of the inputs of {unit.name}", hessians, device=True),
            Share(f"other statistics of the inputs of {unit.name}", observed - hessians, device=True),
        ]
        if unit.block is None:
            seen.append(Share(f"images on their way to {unit.name}", _images(calibration)))
        forward = _forward(model, unit, calibration, requests, itemsize) + _observing(
            unit, calibration, requests, itemsize
        )
        running = Share(f"activations inside {unit.name}", forward, host=False, device=True)
        quantizing = _quantizing(unit, processors, assignments, layers, copied=calibration.runs_again)
        if calibration.trains:
            quantizing.append(running)
        if calibration.keeps_layers:
            made = unit_bytes(model, unit) // 2 + 2 * _largest(unit, assignments)
            quantizing.append(Share(f"quantized layers of {unit.name}", made))
        stays = runner.keeps_model or calibration.runs_again
        left = weights if stays else Share(what, 0)
        phases += [[weights, *seen, running], [left, *seen, *quantizing]]
    return [
        *max(phases, key=_total, default=list[Share]()),
        Share("activations of the sample at work, before and after a block", calibration.waiting_bytes)
        if spills
        else Share("activations of all samples between two blocks", calibration.hidden_bytes),
        Share("kernels, and what the heap keeps", kept),
        Share("kernels for the tokens that experts are given", _kernels(model, blocks, calibration), host=False),
    ]


def _largest(unit: Unit, assignments: Mapping[str, Assignment]) -> int:
    return max((i.in_features * i.out_features for i in unit.linears if i.name in assignments), default=0)


def _quantizing(
    unit: Unit,
    processors: Iterable[Processor],
    assignments: Mapping[str, Assignment],
    layers: Sequence[ExpertLayer] = (),
    *,
    copied: bool = True,
) -> list[Share]:
    """The work of processors on a unit, and the codes beside it: those that wait to be written, and with methods that
    work on a few rows at a time also those that they fill. Of these, two places of every size are used in turn."""
    kept, turn = _working(unit, processors, assignments, layers, copied=copied)
    codes = sorted(i.in_features * i.out_features for i in unit.linears if i.name in assignments)
    places: dict[int, list[int]] = {}
    for size in codes:
        places.setdefault(size.bit_length(), []).append(size)
    largest = max(codes, default=0)
    waiting = min(max(QUEUE_BYTES, largest), 2 * largest, sum(codes))
    filled = max(largest + min(waiting, sum(codes) - largest), sum(sum(sizes[-2:]) for sizes in places.values()))
    rows = min(_ROW_BLOCKS, 8 * largest)
    if turn + waiting < filled + rows:
        turn, waiting = rows, filled
    return [
        Share(f"the work of processors on {unit.name}", kept + turn, device=True),
        Share(f"codes of {unit.name} at work and waiting to be written", waiting),
    ]


def _observing(unit: Unit, calibration: Calibration, requests: Mapping[str, frozenset[Need]], itemsize: int) -> int:
    """What looking at an input takes: of tokens that are kept, their sizes, what is taken of them in float32, and those
    that were kept before, which the larger sample is beside."""
    widths = [info.in_features for info in unit.linears if Need.TOKENS in requests.get(info.name, ())]
    return max(widths, default=0) * (calibration.tokens * (2 * itemsize + 4) + 4 * SAMPLED_TOKENS // 2)


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
) -> tuple[int, int]:
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
    return kept, max(turns)


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


def _forward(
    model: StreamedModel,
    unit: Unit,
    calibration: Calibration,
    requests: Mapping[str, frozenset[Need]],
    itemsize: int,
) -> int:
    """Activations inside a block; all of them where gradients will need them."""
    tokens = calibration.tokens if unit.block is not None else calibration.towers.tokens
    if calibration.trains:
        return tokens * sum(8 * info.in_features + 4 * info.out_features for info in unit.linears)
    parts = portioned(model, unit, requests)
    inside = {name for part in parts for name in part.linears}
    whole = [info for info in unit.linears if info.name not in inside]
    widths = [tokens * max(info.in_features, info.out_features) for info in whole]
    for part in parts:
        portion = min(tokens, portion_tokens(part.widest, calibration.device))
        widths.append(portion * part.widest + (tokens * part.width if portion < tokens else 0))
    return max(widths, default=0) * itemsize * _WIDE_TENSORS


def _images(calibration: Calibration) -> int:
    """Inputs of towers that are in memory at once: of the sample at work and those that are made meanwhile; of all
    samples, if they run more than once."""
    load = calibration.towers
    several = calibration.runs_again or calibration.keeps_layers or calibration.trains
    return load.total if several else min(load.total, _IMAGES_AT_ONCE * load.largest)

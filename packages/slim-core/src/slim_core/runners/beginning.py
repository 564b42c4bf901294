"""Where the samples of a run begin: ahead of the first block, or where an interrupted run has left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from slim_core.errors import SlimError
from slim_core.logging import get_logger
from slim_core.memory import steady_heap
from slim_core.model.streamed import StreamedModel
from slim_core.ranks.group import Ranks
from slim_core.runners.boundaries import Boundaries, Boundary, keys_of, last_boundary
from slim_core.runners.calibration import BlockForwards, NotAsKeptError
from slim_core.runners.division import chosen, part_numbers
from slim_core.runners.plan import Plan
from slim_core.runners.spill import Spill

__all__ = ["Begun", "begin"]

Inputs = Sequence[Mapping[str, Any]]
Example = Callable[[], Mapping[str, Any]]
_SHORT = 4 << 20  # bytes of a sample that may run along
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Begun:
    """The samples of a run.

    Args:
        forwards: None if no unit that is left needs any.
        stop: the block or tower at which they are; units ahead of it are not even loaded.
    """

    forwards: BlockForwards | None = None
    stop: int = 0


def begin(
    stack: ExitStack,
    plan: Plan,
    model: StreamedModel,
    folder: Path,
    finished: Sequence[str],
    calibration: Callable[[], Inputs],
    extra_calibration: Callable[[], Inputs],
    ranks: Ranks,
    tokens: Sequence[int],
    example: Example | None,
    *,
    keeps: bool = True,
) -> Begun:
    """Open the forwards of a run that needs data.

    Args:
        stack: closes them in the end.
        model: as the stages ahead of the main one have left it.
        folder: of the run.
        finished: the units that an interrupted run has written.
        calibration, extra_calibration: give the samples; each is asked once or, where what was kept turns out to be of
            no use, twice.
        ranks: who runs them.
        tokens: of every forward.
        example: gives the inputs of a short sample.
        keeps: whether what samples need to go on is kept here; where all ranks run all samples, one of them does.
    """
    running = [unit.name for unit in model.running]
    due = next((at for at, name in enumerate(running) if name not in finished), None)
    if due is None:
        return Begun(None, len(running))
    quota = plan.experts.quota
    last_extra = running.index(quota.units[-1]) if quota is not None and quota.extra.count else -1
    witness = _witness(model, example)
    if not all(ranks.gather(witness is not None, "the decision to keep activations")):
        witness = None
    inputs = calibration()
    kept = None
    if finished and witness is not None:
        every = keys_of(range(len(inputs)), plan.streams, 0, first=True)
        kept = _common(ranks, last_boundary(folder, every, due))
    numbers = part_numbers(len(inputs), tokens, ranks.rank, ranks.size)
    while True:
        stop = kept.stop if kept is not None else 0
        extra = extra_calibration() if stop <= last_extra else ()
        mine = chosen(inputs, numbers) if ranks.size > 1 else inputs
        spill = Spill(folder) if plan.memory.spills else None
        with ExitStack() as own:
            if spill is not None:
                own.enter_context(steady_heap())
            forwards = own.enter_context(
                BlockForwards(model, mine, plan.devices.first, plan.streams, extra, spill, ranks.tick, witness)
            )
            if forwards.witness is not None and keeps:
                keys = keys_of(numbers, plan.streams, len(extra), first=ranks.first)
                towers, needed = len(model.towers), forwards.witness.needed
                forwards.boundaries = Boundaries(folder, keys, ranks, running, finished, towers, needed)
            carried = keys_of(numbers, plan.streams, len(extra), first=True)
            if kept is None or _gone_on(forwards, kept, carried, ranks):
                stack.push(own.pop_all())
                return Begun(forwards, stop)
        kept, inputs = None, calibration()


def _witness(model: StreamedModel, example: Example | None) -> Mapping[str, Any] | None:
    """A sample that passes everything that samples pass; None without one that is short."""
    given = model.tower_example if model.towers else example
    if given is None or len(model.running) < 2:
        return None
    try:
        inputs = given()
    except SlimError as error:
        _logger.debug("there is no example, so activations are not kept: %s", error)
        return None
    size = sum(leaf.nbytes for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor))
    return inputs if model.towers or size <= _SHORT else None


def _common(ranks: Ranks, kept: Boundary | None) -> Boundary | None:
    """The boundary that all ranks have found, if it is one."""
    stops = ranks.gather(kept.stop if kept is not None else -1, "the activations that were kept")
    return kept if len(set(stops)) == 1 else None


def _gone_on(forwards: BlockForwards, kept: Boundary, keys: Sequence[str], ranks: Ranks) -> bool:
    """Whether the samples of all ranks are where they were."""
    why = None
    try:
        forwards.go_on(kept, keys)
        if forwards.boundaries is not None:
            forwards.boundaries.go_on(kept)
    except NotAsKeptError as error:
        why = str(error)
    failures = [text for text in ranks.gather(why, "going on from what was kept") if text is not None]
    if failures:
        _logger.warning("finished blocks are run once more, since their activations are of no use: %s", failures[0])
    return not failures

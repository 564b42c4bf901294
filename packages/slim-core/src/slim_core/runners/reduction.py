"""From what each rank has observed to what one process would have: once per unit, after all samples have passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from slim_core.quantization.statistics import ChannelStatistics, Hessian, InputObserver, InputStatistics, Need
from slim_core.quantization.statistics.attention import AttentionStatistics
from slim_core.quantization.statistics.histogram import BINS
from slim_core.quantization.statistics.inputs import SAMPLED_TOKENS
from slim_core.ranks.group import Ranks

__all__ = ["reduced_attentions", "reduced_inputs"]

_AT_ONCE = 16 << 20  # bytes of statistics that a rank gives to the others at a time


@dataclass(frozen=True)
class _Input:
    """An input that some linears share, and how wide it is."""

    names: list[str]
    width: int
    needs: frozenset[Need]

    @property
    def nbytes(self) -> int:
        sizes = {Need.TOKENS: 4 * self.width * SAMPLED_TOKENS, Need.HISTOGRAM: 8 * BINS, Need.CHANNELS: 32 * self.width}
        return 256 + sum(sizes.get(need, 0) for need in self.needs)


def reduced_inputs(
    observer: InputObserver,
    widths: Mapping[str, int],
    ranks: Ranks,
    owner_of: Callable[[str], int],
    device: torch.device,
    unit: str,
) -> dict[str, InputStatistics]:
    """What was seen of the inputs of a unit's linears on all ranks.

    Extremes, counts, sums and sampled tokens everybody gets; a Hessian only who needs it.

    Args:
        widths: of the inputs, by linear.
        owner_of: who quantizes a linear.
    """
    if ranks.size == 1:
        return observer.settled()
    own = observer.statistics
    result: dict[str, InputStatistics] = {}
    inputs = _inputs(ranks.gather(observer.sharing(), f"the inputs of {unit}"), own, widths)
    for batch in _batches(inputs):
        mine = [_without_hessian(own[one.names[0]]) for one in batch]
        others = ranks.gather(mine, f"the statistics of {unit}")
        for i, one in enumerate(batch):
            total = InputStatistics(one.needs)
            total.kept.size = max(given[i].kept.size for given in others)
            for given in others:
                total.merge_small(given[i])
            if Need.HESSIAN in one.needs and total.tokens:
                shared = any(given[i].hessian.shared for given in others) or len(one.names) > 1
                tokens = sum(given[i].hessian.tokens for given in others)
                owners = {owner_of(name) for name in one.names if Need.HESSIAN in own[name].needs}
                total.hessian = _hessian(own[one.names[0]].hessian, one.width, tokens, owners, ranks, device, unit)
                total.hessian.shared = shared
            total.channels = _channels_on(total.channels, device)
            total.settle()
            result |= dict.fromkeys(one.names, total)
    return result


def _inputs(
    sharing: Sequence[Mapping[str, tuple[int, str]]], own: Mapping[str, InputStatistics], widths: Mapping[str, int]
) -> list[_Input]:
    """Which linears share an input, by all who have seen them called; what was said by nobody is not shared."""
    groups: dict[str, list[str]] = {}
    for name in own:
        leaders = {told[name][1] for told in sharing if told[name][0]}
        leader = leaders.pop() if len(leaders) == 1 else name
        groups.setdefault(leader, []).append(name)
    found: list[_Input] = []
    for names in groups.values():
        needs = frozenset[Need]().union(*(own[name].needs for name in names))
        found.append(_Input(names, widths[names[0]], needs))
    return found


def _batches(inputs: Sequence[_Input]) -> Iterator[list[_Input]]:
    batch: list[_Input] = []
    for one in inputs:
        if batch and sum(other.nbytes for other in (*batch, one)) > _AT_ONCE:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _without_hessian(seen: InputStatistics) -> InputStatistics:
    """The same to be sent, with what is known of the Hessian besides its values."""
    note = Hessian(None, seen.hessian.tokens, seen.hessian.shared)
    channels = _channels_on(seen.channels, torch.device("cpu"))
    return InputStatistics(seen.needs, seen.range, seen.histogram, channels, note, seen.kept)


def _channels_on(channels: ChannelStatistics, device: torch.device) -> ChannelStatistics:
    moved = {f.name: x.to(device) for f in fields(channels) if isinstance(x := getattr(channels, f.name), torch.Tensor)}
    return replace(channels, **moved)


def _hessian(
    own: Hessian, width: int, tokens: int, owners: set[int], ranks: Ranks, device: torch.device, unit: str
) -> Hessian:
    """The sum of the Hessians of all ranks; an empty one where it is not needed."""
    owner = next(iter(owners)) if len(owners) == 1 else None
    for strip in own.parts(width, device):
        ranks.add_up(strip, owner, f"the Hessians of {unit}")
    if ranks.rank not in owners:
        own.parts(width, device).clear()
        return Hessian()
    own.tokens = tokens
    return own


def reduced_attentions(
    seen: Mapping[str, AttentionStatistics], ranks: Ranks, unit: str
) -> dict[str, AttentionStatistics]:
    """What was seen of the states of a unit's attentions on all ranks."""
    found: dict[str, AttentionStatistics] = {}
    for name, own in seen.items():
        first, *others = ranks.gather(_on_host(own, ranks), f"the states of {name}")
        for other in others:
            first.merge(other)
        found[name] = first
    return found


def _on_host(own: Any, ranks: Ranks) -> Any:
    """Statistics that can be sent; where nobody is sent anything, as they are."""
    if ranks.size == 1:
        return own
    for state in own.states.values():
        for tail in (state, state.magnitudes, state.highs, state.lows):
            for field in ("minimum", "maximum", "values"):
                if isinstance(value := getattr(tail, field, None), torch.Tensor):
                    setattr(tail, field, value.cpu())
    return own

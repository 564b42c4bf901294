"""What the smoothing processors share that search their scales by the error they lead to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, UnitWork
from slim_core.processors.smoothing import Smoother, is_routed
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.quantization.statistics.problems import not_finite
from slim_core.smoothing.search import Evidence, WeightSample, working_bytes

__all__ = ["SearchingSmoother"]

_FEW_TOKENS = 64
_SAMPLED_EXPERTS = 8


class SearchingSmoother(Smoother):
    """Base of the smoothers that try scales on a sample of the tokens: memory for that sample of every input."""

    @property
    @abstractmethod
    def searches(self) -> bool:
        """Whether anything is left to be searched."""

    @property
    def takes_long(self) -> bool:
        return self.searches

    def requests(
        self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]
    ) -> Mapping[str, frozenset[Need]]:
        wanted = dict(super().requests(linears, assignments))
        for name in self._sampled():
            wanted[name] |= {Need.TOKENS}
        return wanted

    def working_bytes(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> int:
        sampled = self._sampled()
        widths = [info.in_features for info in linears if info.name in sampled]
        return super().working_bytes(linears, assignments) + (working_bytes(max(widths)) if widths else 0)

    def _sampled(self) -> set[str]:
        """The linears whose tokens are kept: one that sees all of a subgraph's, or else some of the experts."""
        if not self.searches:
            return set()
        chosen: set[str] = set()
        for unit, graphs in self._graphs.items():
            for graph in graphs:
                known = [target for target in graph.targets if target in self._linears]
                whole = [target for target in known if not is_routed(target, unit)]
                experts: dict[str, str] = {}
                for target in known:
                    experts.setdefault(target.rpartition(".")[0], target)
                chosen |= set(whole[:1] or list(experts.values())[:_SAMPLED_EXPERTS])
        return chosen

    def readers(self, graph: Subgraph) -> list[str]:
        """The targets that can be quantized, on which scales are judged; routers and the like are scaled along."""
        return [target for target in graph.targets if target in self._linears] or list(graph.targets)


def weights_of(names: Sequence[str], work: UnitWork) -> WeightSample:
    """The weights of linears that share their input."""
    assert work.weights is not None
    return WeightSample.of([(f"{name}.weight", work.weights[f"{name}.weight"]) for name in names])


def evidence_of(seen: InputStatistics, sample: WeightSample, work: UnitWork) -> Evidence:
    """What candidates are judged on."""
    return Evidence.of(seen.kept, sample.rows, work.device)


def largest_inputs(seen: InputStatistics, graph: Subgraph, work: UnitWork) -> Tensor:
    """The largest absolute value of every input channel, float32 ``(in,)``.

    Raises:
        InvalidModelError: NaN or infinity was observed.
    """
    largest = seen.channels.absmax()
    assert largest is not None
    return _steady(_checked(largest, graph), seen.tokens, graph, work)


def mean_inputs(seen: InputStatistics, graph: Subgraph, work: UnitWork) -> Tensor:
    """The mean absolute value of every input channel, float32 ``(in,)``.

    After a shift it is not known exactly; then it is that of the tokens kept, or the root of the mean square.

    Raises:
        InvalidModelError: NaN or infinity was observed.
    """
    channels = seen.channels
    if channels.magnitude is not None:
        mean = channels.magnitude / channels.tokens
    elif seen.kept.seen:
        counts = seen.kept.counts().double()
        mean = (seen.kept.tokens().abs().double() * counts.unsqueeze(1)).sum(0) / counts.sum()
    else:
        assert channels.square is not None
        mean = (channels.square / channels.tokens).sqrt()
    return _steady(_checked(mean.float(), graph), seen.tokens, graph, work)


def _checked(values: Tensor, graph: Subgraph) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise not_finite(graph.targets[0])
    return values.cpu()


def _steady(values: Tensor, tokens: int, graph: Subgraph, work: UnitWork) -> Tensor:
    """Channel statistics of an expert, drawn to their geometric mean where few tokens were routed to it.

    One token says little of how far a channel reaches: with ``n`` tokens of ``m`` wanted, ``A^(n/m) mean^(1 - n/m)``.
    """
    if tokens >= _FEW_TOKENS or not all(is_routed(target, work.name) for target in graph.targets):
        return values
    alive = values > 0
    mean = values[alive].log().mean().exp() if bool(alive.any()) else values.new_ones(())
    share = tokens / _FEW_TOKENS
    return torch.where(alive, values.pow(share) * mean.pow(1 - share), values)

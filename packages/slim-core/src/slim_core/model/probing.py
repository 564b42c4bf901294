"""Proof on the block itself: who reads a norm, and whether moving a scale leaves the block's output as it was.

A probe scales channels by powers of two, which floating-point numbers of every width carry without rounding, and runs
the block on one sample. A matrix whose input comes out scaled, channel by channel, reads that norm. Once all readers
are compensated the output must be what it was; a reader that was missed, a shared source, an activation function in
between or a wrong layout of heads changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from slim_core.model.changes import Change, changed, enlarging, of_norm, with_columns, with_rows
from slim_core.model.expert_weights import ExpertsOnCall
from slim_core.model.skeleton import named_modules
from slim_core.model.subgraphs import PRIORITY, GivenSubgraph, Subgraph, candidates, is_norm

__all__ = ["BlockProbe", "Findings"]

_TOKENS = 64
_COPIES = 64 << 20
_FACTORS = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
# What may be left of the change that the source alone makes: next to nothing, since powers of two round nothing. Only
# the weight of a (1 + weight) norm is rounded, by up to 2^-9 in bfloat16.
_TOLERANCE = 1e-4
_TOLERANCE_OF_ROUNDED = 0.05


@dataclass
class Findings:
    """The subgraphs of a block that were proved, in the order of smoothing, and why others were not taken.

    Args:
        inputs: what linears that share an input are given, to be scaled while the model runs; subgraphs without source.
    """

    subgraphs: list[Subgraph] = field(default_factory=list[Subgraph])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    inputs: list[Subgraph] = field(default_factory=list[Subgraph])

    @property
    def every(self) -> list[Subgraph]:
        """Subgraphs with a source, and then those without."""
        return [*self.subgraphs, *self.inputs]

    def sorted(self) -> Findings:
        return replace(self, subgraphs=sorted(self.subgraphs, key=lambda graph: PRIORITY[graph.type]))


class BlockProbe:
    """Probes one block.

    Args:
        root: the model; the block's parameters hold their values.
        block: dotted name of the block.
        run: runs the block on one sample and returns its hidden states; always the same sample.
        given: subgraphs that names do not tell.
        on_call: the experts of the block, where they hold their parameters only while they are called.
    """

    def __init__(
        self,
        root: nn.Module,
        block: str,
        run: Callable[[], Tensor],
        given: Sequence[GivenSubgraph] = (),
        on_call: ExpertsOnCall | None = None,
    ) -> None:
        self._root = root
        self._block = block
        self._run = run
        self._given = given
        self._on_call = on_call
        self._readers = dict(matrices(root, block))
        with self._outputs_watched() as self._made:
            self._output, self._inputs = self._forward(self._readers)
        self._generator = torch.Generator().manual_seed(0)

    def _scale_of(self, size: int) -> Tensor:
        return _FACTORS[torch.randint(len(_FACTORS), (size,), generator=self._generator)]

    def findings(self) -> Findings:
        """Everything that can be smoothed in this block."""
        found = Findings()
        layouts: dict[tuple[str, str], int] = {}
        every = list(candidates(self._root, self._block, self._given))
        ran = [options for options in every if len(self._inputs.get(options[0].source, ()))]
        idle = [options for options in every if not len(self._inputs.get(options[0].source, ()))]
        known = self._proved(ran)
        for options in ran:
            source = options[0].source
            proved = known.get(source)
            if proved is None:
                found.refused[source] = (
                    f"scaling it and {options[0].targets[0]} against each other changes what the block computes"
                )
            else:
                found.subgraphs.append(options[proved])
                layouts.setdefault(sibling(source), proved)
        for options in idle:  # experts that no token of the sample reached are like those that were reached
            number = layouts.get(sibling(options[0].source))
            if number is None:
                found.refused[options[0].source] = "it did not run"
            else:
                found.subgraphs.append(options[number])
        self._chained(found)
        for name, module in named_modules(self._root.get_submodule(self._block)):
            if is_norm(module):
                self._norm(f"{self._block}.{name}", module, found)
        return found.sorted()

    def _proved(self, ran: Sequence[list[Subgraph]]) -> dict[str, int]:
        """By source, which of its options holds. Those of experts are tried together first: mostly all of them hold."""
        alike: dict[tuple[tuple[str, str], int], list[list[Subgraph]]] = {}
        for options in ran:
            alike.setdefault((sibling(options[0].source), len(options)), []).append(options)
        proved: dict[str, int] = {}
        for group in alike.values():
            for some in self._portions(group):
                numbers = range(len(some[0]))
                all_hold = (n for n in numbers if len(some) > 1 and self._hold([options[n] for options in some]))
                together = next(all_hold, None)
                for options in some:
                    one_holds = (n for n in numbers if self.holds(options[n]))
                    number = next(one_holds, None) if together is None else together
                    if number is not None:
                        proved[options[0].source] = number
        return proved

    def _portions(self, group: list[list[Subgraph]]) -> Iterator[list[list[Subgraph]]]:
        """Parts of a group of which changed copies can be in memory; all of it where they come and go with experts."""
        if self._on_call is not None:
            yield group
            return
        names = [name for graph in group[0] for name in (graph.source, *graph.targets)]
        each = sum(self._readers[name].get_parameter("weight").nbytes for name in set(names) & self._readers.keys())
        count = max(1, _COPIES // max(each, 1))
        yield from (group[start : start + count] for start in range(0, len(group), count))

    def _chained(self, found: Findings) -> None:
        """Linears whose output others are given as it is, such as the halves of a low rank."""
        known = {*found.refused, *(graph.source for graph in found.subgraphs)}
        linears = {name for name, module in self._readers.items() if isinstance(module, nn.Linear)}
        readers: dict[str, list[str]] = {}
        for reader in self._inputs.keys() & linears:
            x = self._inputs[reader]
            sources = (self._made.keys() & linears) - known - {reader}
            source = next((one for one in sorted(sources) if bool(x.any()) and torch.equal(self._made[one], x)), None)
            if source is not None:
                readers.setdefault(source, []).append(reader)
        for source, targets in sorted(readers.items()):
            channels = torch.arange(_width(self._readers[targets[0]]))
            graph = Subgraph("linear-linear", source, tuple(sorted(targets)), channels, channels)
            if self.holds(graph):
                found.subgraphs.append(graph)
            else:
                found.refused[source] = f"something besides {', '.join(graph.targets[:4])} reads its output"

    def _norm(self, name: str, norm: nn.Module, found: Findings) -> None:
        for plus_one in (False, True):
            readers = self.readers(name, norm, plus_one=plus_one)
            if not readers:
                continue
            width = norm.get_parameter("weight").shape[0]
            graph = Subgraph("norm-linear", name, tuple(readers), torch.arange(width), plus_one=plus_one)
            if self.holds(graph):
                found.subgraphs.append(replace(graph, direct=self._is_direct(graph)))
            else:
                found.refused[name] = f"something besides {', '.join(readers[:4])} reads its output"
            return

    def readers(self, name: str, norm: nn.Module, *, plus_one: bool) -> list[str]:
        """The matrices whose input is the output of a norm, in the order in which they are called."""
        width = norm.get_parameter("weight").shape[0]
        scale = self._scale_of(width)
        parts = [part for part in ("weight", "bias") if norm._parameters.get(part) is not None]  # pyright: ignore
        scaled = {f"{name}.{part}": partial(of_norm, scale, plus_one and part == "weight") for part in parts}
        with self._changed(scaled):
            _, after = self._forward({reader: m for reader, m in self._readers.items() if _width(m) == width})
        direct = [reader for reader, x in after.items() if self._is_scaled(reader, x, scale)]
        return direct + self._experts(direct) if direct else []

    def _is_direct(self, graph: Subgraph) -> bool:
        """Whether the targets are given the output of the norm, and nothing lies in between."""
        made = self._made.get(graph.source)
        inputs = [x for target in graph.targets if (x := self._inputs.get(target)) is not None and len(x)]
        return made is not None and all(torch.equal(x, made) or _rows_of(x, made) for x in inputs)

    @contextmanager
    def _outputs_watched(self) -> Generator[dict[str, Tensor]]:
        """Within this context the first tokens of outputs are kept, of norms and matrices that are given one tensor.

        A second one is a gate, and whether a bias is added before or after it is not the same for all.
        """
        made: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
                given = sum(isinstance(one, Tensor) for one in (*args, *kwargs.values()))
                if given == 1 and isinstance(output, Tensor):
                    made[name] = output.detach().reshape(-1, output.shape[-1])[:_TOKENS].float().cpu()

            return keep

        block = named_modules(self._root.get_submodule(self._block))
        watched = {f"{self._block}.{name}": module for name, module in block if is_norm(module)} | self._readers
        handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in watched.items()]
        try:
            yield made
        finally:
            for handle in handles:
                handle.remove()

    def _is_scaled(self, reader: str, x: Tensor, scale: Tensor) -> bool:
        before = self._inputs.get(reader)
        if before is None or before.shape != x.shape or not bool(before.any()):
            return False
        expected = before * scale
        return float((x - expected).abs().max()) <= 0.02 * float(expected.abs().max())

    def _experts(self, direct: list[str]) -> list[str]:
        """The first matrices of experts, whose tokens are chosen by a router that reads the norm.

        They see rows of what the direct readers see; those that no token of the sample reached go by their siblings.
        """
        known = set(direct)
        whole = [self._inputs[name] for name in direct]
        ran = {name: x for name, x in self._inputs.items() if len(x)}
        some = {
            name
            for name, x in ran.items()
            if name not in known and any(_rows_of(x, rows) for rows in whole if rows.shape[1] == x.shape[1])
        }
        leaves = {sibling(name) for name in known | some}  # all tokens may have gone to one expert
        return [name for name in self._readers if name in some or (name not in ran and sibling(name) in leaves)]

    def holds(self, graph: Subgraph) -> bool:
        """Whether the block computes the same with random scales moved from the source to the targets.

        The measure is what the scaled source does to the output when the targets are left as they are. What comes out
        of a linear is also enlarged as a whole, since it may be clipped where this sample does not reach.
        """
        return self._hold([graph])

    def _hold(self, graphs: Sequence[Subgraph]) -> bool:
        """Whether all of these hold; they share no weight."""
        scales = [self._scale_of(graph.scales) for graph in graphs]
        alone = self._with(map(self._divided, graphs, scales))
        effect = float((alone - self._output).abs().max())
        rounded = any(graph.plus_one for graph in graphs) and self._output_dtype != torch.float32
        limit = (_TOLERANCE_OF_ROUNDED if rounded else _TOLERANCE) * effect
        if not (effect > 0 and self._left(graphs, scales) <= limit):
            return False
        enlarged = [graph for graph in graphs if graph.rows is not None]
        large = [enlarging(graph.scales, self._output_dtype) for graph in enlarged]
        return not enlarged or self._left(enlarged, large) <= limit

    def _left(self, graphs: Sequence[Subgraph], scales: Sequence[Tensor]) -> float:
        """How much the output changes when scales move from the sources to the targets."""
        moved = [*map(self._multiplied, graphs, scales), *map(self._divided, graphs, scales)]
        return float((self._with(moved) - self._output).abs().max())

    def _with(self, changes: Iterable[Mapping[str, Change]]) -> Tensor:
        """The output with these changes."""
        with self._changed({name: change for several in changes for name, change in several.items()}):
            return self._forward({})[0]

    def _multiplied(self, graph: Subgraph, scale: Tensor) -> dict[str, Change]:
        columns = graph.spread(scale)
        return {f"{target}.weight": partial(with_columns, columns) for target in graph.targets}

    def _divided(self, graph: Subgraph, scale: Tensor) -> dict[str, Change]:
        module = self._root.get_submodule(graph.source)
        parts = [part for part in ("weight", "bias") if module._parameters.get(part) is not None]  # pyright: ignore
        if graph.rows is None:
            return {
                f"{graph.source}.{part}": partial(of_norm, 1 / scale, graph.plus_one and part == "weight")
                for part in parts
            }
        return {f"{graph.source}.{part}": partial(with_rows, graph.rows, scale) for part in parts}

    @contextmanager
    def _changed(self, changes: Mapping[str, Change]) -> Generator[None]:
        """Within this context parameters have other values; those of experts on call whenever they are read."""
        on_call = self._on_call
        later = {name: change for name, change in changes.items() if on_call and name in on_call.owners}
        values = {n: change(self._root.get_parameter(n)) for n, change in changes.items() if n not in later}
        with changed(self._root, values), on_call.changed(later) if on_call else nullcontext():
            yield

    def _forward(self, watched: Mapping[str, nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, float32 ``(tokens, channels)``, and the first tokens of the inputs of some modules."""
        inputs: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                if x.shape[-1] != _width(module):
                    return
                inputs[name] = x.detach().reshape(-1, x.shape[-1])[:_TOKENS].float().cpu()

            return keep

        handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in watched.items()]
        try:
            with torch.no_grad():
                output = self._run()
        finally:
            for handle in handles:
                handle.remove()
        self._output_dtype = output.dtype
        return output.detach().reshape(-1, output.shape[-1]).float(), inputs


def matrices(root: nn.Module, block: str) -> Iterable[tuple[str, nn.Module]]:
    """Everything in a block that multiplies its input by a matrix ``weight`` ``(out, in)``: linears and routers."""
    for name, module in named_modules(root.get_submodule(block)):
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            yield f"{block}.{name}", module


def _width(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[1]


def sibling(name: str) -> tuple[str, str]:
    """Equal for the same leaf of different experts: the name without its last number, split there."""
    parts = name.split(".")
    position = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[:position]), ".".join(parts[position + 1 :])


def _rows_of(x: Tensor, rows: Tensor) -> bool:
    """Whether every row of ``x`` is one of ``rows``."""
    return bool((x[:8].unsqueeze(1) == rows.unsqueeze(0)).all(2).any(1).all())

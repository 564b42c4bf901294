"""Proof on the block itself: who reads a norm, and whether moving a scale leaves the block's output as it was.

A probe scales channels by powers of two, which floating-point numbers of every width carry without rounding, and runs
the block on one sample. A matrix whose input comes out scaled, channel by channel, reads that norm. Once all readers
are compensated the output must be what it was; a reader that was missed, a shared source, an activation function in
between or a wrong layout of heads changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from slim_core.model.skeleton import named_modules
from slim_core.model.subgraphs import PRIORITY, GivenSubgraph, Subgraph, candidates, is_norm

__all__ = ["BlockProbe", "Findings", "changed", "enlarging"]

_TOKENS = 64
_FACTORS = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
# What may be left of the change that the source alone makes: next to nothing, since powers of two round nothing. Only
# the weight of a (1 + weight) norm is rounded, by up to 2^-9 in bfloat16.
_TOLERANCE = 1e-4
_TOLERANCE_OF_ROUNDED = 0.05


@dataclass
class Findings:
    """The subgraphs of a block that were proved, in the order of smoothing, and why others were not taken."""

    subgraphs: list[Subgraph] = field(default_factory=list[Subgraph])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    def sorted(self) -> Findings:
        return replace(self, subgraphs=sorted(self.subgraphs, key=lambda graph: PRIORITY[graph.type]))


class BlockProbe:
    """Probes one block.

    Args:
        root: the model; the block's parameters hold their values.
        block: dotted name of the block.
        run: runs the block on one sample and returns its hidden states; always the same sample.
        given: subgraphs that names do not tell.
    """

    def __init__(
        self, root: nn.Module, block: str, run: Callable[[], Tensor], given: Sequence[GivenSubgraph] = ()
    ) -> None:
        self._root = root
        self._block = block
        self._run = run
        self._given = given
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
        idle: list[list[Subgraph]] = []
        for options in candidates(self._root, self._block, self._given):
            source = options[0].source
            if not len(self._inputs.get(source, ())):
                idle.append(options)
                continue
            proved = next((number for number, graph in enumerate(options) if self.holds(graph)), None)
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
        with self._changed(_scaled_norm(name, norm, scale, plus_one)):
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
        scale = self._scale_of(graph.scales)
        with self._changed(self._divided(graph, scale)):
            alone, _ = self._forward({})
        effect = float((alone - self._output).abs().max())
        rounded = graph.plus_one and self._output_dtype != torch.float32
        limit = (_TOLERANCE_OF_ROUNDED if rounded else _TOLERANCE) * effect
        if not (effect > 0 and self._left(graph, scale) <= limit):
            return False
        return graph.rows is None or self._left(graph, enlarging(graph.scales, self._output_dtype)) <= limit

    def _left(self, graph: Subgraph, scale: Tensor) -> float:
        """How much the output changes when a scale moves from the source to the targets."""
        with self._changed(self._multiplied(graph, scale) | self._divided(graph, scale)):
            output, _ = self._forward({})
        return float((output - self._output).abs().max())

    def _multiplied(self, graph: Subgraph, scale: Tensor) -> dict[str, Tensor]:
        changes: dict[str, Tensor] = {}
        for target in graph.targets:
            weight = self._root.get_parameter(f"{target}.weight")
            columns = graph.spread(scale).to(weight.device)
            changes[f"{target}.weight"] = (weight.float() * columns).to(weight.dtype)
        return changes

    def _divided(self, graph: Subgraph, scale: Tensor) -> dict[str, Tensor]:
        module = self._root.get_submodule(graph.source)
        if graph.rows is None:
            return _scaled_norm(graph.source, module, 1 / scale, graph.plus_one)
        changes: dict[str, Tensor] = {}
        for part in ("weight", "bias"):
            value = module._parameters.get(part)  # pyright: ignore[reportPrivateUsage]
            if value is not None:
                changed, rows = value.float().clone(), graph.rows.to(value.device)
                changed[rows] = changed[rows] / scale.to(value.device).view(-1, *[1] * (value.dim() - 1))
                changes[f"{graph.source}.{part}"] = changed.to(value.dtype)
        return changes

    def _changed(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return changed(self._root, values)

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


def enlarging(size: int, dtype: torch.dtype) -> Tensor:
    """Equal scales that make what is divided by them far larger, as far as the dtype bears it."""
    return torch.full((size,), 2.0**-4 if dtype == torch.float16 else 2.0**-8)


@contextmanager
def changed(root: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Within this context these parameters have other values."""
    kept = {name: root.get_parameter(name) for name in values}
    try:
        for name, value in values.items():
            _set(root, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for name, parameter in kept.items():
            _set(root, name, parameter)


def matrices(root: nn.Module, block: str) -> Iterable[tuple[str, nn.Module]]:
    """Everything in a block that multiplies its input by a matrix ``weight`` ``(out, in)``: linears and routers."""
    for name, module in named_modules(root.get_submodule(block)):
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            yield f"{block}.{name}", module


def _width(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[1]


def _scaled_norm(name: str, norm: nn.Module, scale: Tensor, plus_one: bool) -> dict[str, Tensor]:
    """The parameters of a norm whose output is to be multiplied by a scale."""
    changes: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        value = norm._parameters.get(part)  # pyright: ignore[reportPrivateUsage]
        if value is not None:
            shift = 1.0 if plus_one and part == "weight" else 0.0
            changed = (value.float() + shift) * scale.to(value.device) - shift
            changes[f"{name}.{part}"] = changed.to(value.dtype)
    return changes


def sibling(name: str) -> tuple[str, str]:
    """Equal for the same leaf of different experts: the name without its last number, split there."""
    parts = name.split(".")
    position = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[:position]), ".".join(parts[position + 1 :])


def _rows_of(x: Tensor, rows: Tensor) -> bool:
    """Whether every row of ``x`` is one of ``rows``."""
    return bool((x[:8].unsqueeze(1) == rows.unsqueeze(0)).all(2).any(1).all())


def _set(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(path), leaf, parameter)

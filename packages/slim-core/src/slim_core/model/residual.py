"""Who reads and who writes the residual stream of a block, found by silencing parts of it.

A decoder block adds to its hidden states what its sublayers make of them. With every matrix silenced that might write
there, the block hands its hidden states on as they are. A matrix that changes them once it alone may speak is a
*writer*; a norm or matrix that is then given exactly what the block was given is a *reader*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import UnsupportedError
from slim_core.model.probing import Findings, matrices, sibling
from slim_core.model.skeleton import named_modules
from slim_core.model.subgraphs import Subgraph, is_norm
from slim_core.model.wide import widened

__all__ = ["BlockRoles", "BlockTrial", "Rank", "Seen", "find_roles", "norm_defect", "watched"]

# In float32; what is no rounding is of the size of the thing itself.
_SAME = 1e-5
_LINEAR = 1e-3


@dataclass(frozen=True, eq=False)
class Rank:
    """A norm between two matrices inside a sublayer, as in a low-rank projection.

    Args:
        norm: the norm and the matrices that read it.
        writer: the matrix that makes its input, in its rows from ``first`` on.
    """

    norm: Subgraph
    writer: str
    first: int


@dataclass(frozen=True, eq=False)
class BlockRoles:
    """What the matrices and norms of a block have to do with the residual stream.

    Args:
        norms: norms that read it, with everything that reads them.
        raw: matrices that read it without a norm.
        writers: matrices whose outputs are added to it, those together that cannot be told apart (experts).
        values: the value paths of its attentions.
        ranks: norms between two of its matrices.
    """

    norms: tuple[Subgraph, ...] = ()
    raw: tuple[str, ...] = ()
    writers: tuple[tuple[str, ...], ...] = ()
    values: tuple[Subgraph, ...] = ()
    ranks: tuple[Rank, ...] = ()

    @property
    def readers(self) -> set[str]:
        """All matrices that are given the residual stream, normalised or not."""
        return {*self.raw, *(reader for norm in self.norms for reader in norm.targets)}

    def leaders(self) -> dict[str, str]:
        """Each of the readers, with the first of those that are given the same."""
        leaders = {reader: norm.targets[0] for norm in self.norms for reader in norm.targets}
        return leaders | {reader: reader for reader in self.raw if reader not in leaders}

    def of(self, first: str, name: str) -> BlockRoles:
        """The same said of another block, whose name is put in the place of the first's."""

        def moved(module: str) -> str:
            return name + module.removeprefix(first)

        def graph(one: Subgraph) -> Subgraph:
            return replace(one, source=moved(one.source), targets=tuple(map(moved, one.targets)))

        return BlockRoles(
            tuple(map(graph, self.norms)),
            tuple(map(moved, self.raw)),
            tuple(tuple(map(moved, together)) for together in self.writers),
            tuple(map(graph, self.values)),
            tuple(Rank(graph(rank.norm), moved(rank.writer), rank.first) for rank in self.ranks),
        )


@dataclass
class Seen:
    """Inputs and outputs of modules in one run, each ``(tokens, channels)``."""

    inputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class BlockTrial:
    """One block, run in float32 on hidden states made for the purpose.

    Args:
        root: the model.
        name: dotted name of the block.
        values: its parameters as the checkpoint has them.
        run: calls the block as the model would, with these hidden states, and gives what comes out.
        shape: of the hidden states.
    """

    def __init__(
        self,
        root: nn.Module,
        name: str,
        values: Mapping[str, LazyTensor],
        run: Callable[[Tensor], Tensor],
        shape: torch.Size,
    ) -> None:
        self.root = root
        self.name = name
        self.values = values
        self.width = shape[-1]
        self._run = run
        self._shape = shape
        self.draw(0)

    def draw(self, seed: int) -> None:
        """Take other hidden states."""
        self.hidden = torch.randn(self._shape, generator=torch.Generator().manual_seed(seed))

    def added(
        self,
        hidden: Tensor | None = None,
        *,
        values: Mapping[str, LazyTensor] | None = None,
        silenced: Collection[str] = (),
        doubled: Collection[str] = (),
        seen: Seen | None = None,
    ) -> Tensor:
        """What the block adds to its hidden states, float32 ``(tokens, width)``.

        Args:
            hidden: the hidden states, if not those that were drawn.
            values: other values of its parameters.
            silenced, doubled: matrices whose output is set to zero or doubled.
            seen: takes down what its norms and matrices are given and make.
        """
        given = self.hidden if hidden is None else hidden
        factors = dict.fromkeys(silenced, 0.0) | dict.fromkeys(doubled, 2.0)
        output = self._output(given, values or self.values, factors, seen)
        return (output - given).reshape(-1, self.width)

    def _output(
        self, hidden: Tensor, values: Mapping[str, LazyTensor], factors: Mapping[str, float], seen: Seen | None
    ) -> Tensor:
        with (
            widened(self.root, values),
            _scaled(self.root, factors),
            watched(self._watchable(), seen),
        ):
            return self._run(hidden)

    def _watchable(self) -> dict[str, nn.Module]:
        block = named_modules(self.root.get_submodule(self.name))
        norms = {f"{self.name}.{name}": module for name, module in block if is_norm(module)}
        return norms | dict(matrices(self.root, self.name))


@contextmanager
def watched(modules: Mapping[str, nn.Module], seen: Seen | None) -> Generator[None]:
    """Within this context inputs and outputs of modules are taken down."""
    if seen is None:
        yield
        return

    def hook(name: str) -> Callable[..., None]:
        def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            for store, value in ((seen.inputs, x), (seen.outputs, output)):
                if isinstance(value, Tensor) and value.dim():
                    store[name] = value.detach().reshape(-1, value.shape[-1])

        return take

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _scaled(root: nn.Module, factors: Mapping[str, float]) -> Generator[None]:
    """Within this context the outputs of modules are multiplied by a number."""

    def hook(factor: float) -> Callable[..., Tensor]:
        def scale(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return torch.zeros_like(output) if not factor else output * factor

        return scale

    handles = [root.get_submodule(name).register_forward_hook(hook(factor)) for name, factor in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_roles(trial: BlockTrial, findings: Findings) -> BlockRoles:
    """The roles of a block's matrices and norms.

    Args:
        findings: its subgraphs.

    Raises:
        UnsupportedError: the block is not of the kind in which norms and matrices alone read and write; says why.
    """
    together: dict[tuple[str, str], list[str]] = {}
    for name, module in matrices(trial.root, trial.name):
        if isinstance(module, nn.Linear) and module.out_features == trial.width:
            together.setdefault(sibling(name), []).append(name)
    seen = Seen()
    left = trial.added(silenced=[name for members in together.values() for name in members], seen=seen)
    if not _close(left, torch.zeros_like(left), trial.hidden):
        raise UnsupportedError(
            "something besides its linears changes the hidden states that it hands on", where=trial.name
        )
    order = {name: position for position, name in enumerate(seen.inputs)}
    called = [members for members in together.values() if any(name in order for name in members)]
    called.sort(key=lambda members: min(order[name] for name in members if name in order))
    writers = _writers(trial, called)
    hidden = trial.hidden.reshape(-1, trial.width)
    at_stream = {name for name, x in seen.inputs.items() if x.shape == hidden.shape and _close(x, hidden, hidden)}
    graphs = {graph.source: graph for graph in findings.subgraphs if graph.type == "norm-linear"}
    norms: list[Subgraph] = []
    for name in sorted(at_stream):
        module = trial.root.get_submodule(name)
        if is_norm(module):
            norms.append(_stream_norm(trial, name, seen, graphs, findings))
    readers = {reader for norm in norms for reader in norm.targets}
    raw = tuple(name for name in seen.inputs if name in at_stream - readers and not is_norm(_module(trial, name)))
    others = [graph for name, graph in graphs.items() if name not in at_stream]
    ranks = [rank for graph in others if (rank := _rank(trial, graph, seen)) is not None]
    values = [graph for graph in findings.subgraphs if graph.type == "ov" and graph.head_dim]
    return BlockRoles(tuple(norms), raw, writers, tuple(values), tuple(ranks))


def _module(trial: BlockTrial, name: str) -> nn.Module:
    return trial.root.get_submodule(name)


def _writers(trial: BlockTrial, called: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Which of some matrices write to the residual stream.

    They get their voice back one after the other. One that is heard in what the block hands on, while all that come
    after it are silent, writes there, and is silenced again; one that is not only speaks to those after it.

    Args:
        called: the matrices that might, in the order in which they are called; experts of one kind are taken together.
    """
    silent = {name for members in called for name in members}
    writers: list[tuple[str, ...]] = []
    for members in called:
        others = silent - set(members)
        alone = trial.added(silenced=others)
        if not bool(alone.any()):
            silent = others
            continue
        _check_linear(trial, members, others, alone)
        writers.append(tuple(members))
    return tuple(writers)


def _check_linear(trial: BlockTrial, members: list[str], silenced: set[str], alone: Tensor) -> None:
    """Refuse writers whose output does not reach the hidden states as it is, or multiplied by something.

    Args:
        alone: what they add while the others are silenced.
    """
    twice = trial.added(silenced=silenced, doubled=members)
    if float((twice - 2 * alone).abs().max()) <= _LINEAR * float(alone.abs().max()):
        return
    if not _close(trial.added(silenced=silenced), alone, alone):
        raise UnsupportedError("it does not make the same of the same hidden states every time", where=trial.name)
    raise UnsupportedError(
        "its output passes a norm, or something else that is not linear, before it is added to the hidden states; "
        "a rotation cannot be taken through that",
        where=members[0],
    )


def _stream_norm(
    trial: BlockTrial, name: str, seen: Seen, graphs: Mapping[str, Subgraph], findings: Findings
) -> Subgraph:
    if name not in seen.outputs:
        raise UnsupportedError("it is no root mean square norm", where=name)
    values = {leaf: trial.values[f"{name}.{leaf}"] for leaf in ("weight", "bias") if f"{name}.{leaf}" in trial.values}
    forms = (graphs[name].plus_one,) if name in graphs else (False, True)
    defects = [norm_defect(values, seen.inputs[name], seen.outputs[name], plus_one=form) for form in forms]
    if None not in defects:
        raise UnsupportedError(defects[0] or "", where=name)
    if name not in graphs:
        raise UnsupportedError(findings.refused.get(name, "no linear was found to read its output"), where=name)
    return graphs[name]


def norm_defect(values: Mapping[str, LazyTensor], x: Tensor, output: Tensor, *, plus_one: bool) -> str | None:
    """Why a norm is not ``x / rms(x)`` times its weight (or one more) plus its bias; None if it is.

    Args:
        values: its ``weight`` and ``bias``.
        x, output: its input and output ``(tokens, channels)``.
    """
    gain = values["weight"].load().float() + plus_one
    bias = values["bias"].load().float() if "bias" in values else torch.zeros_like(gain)

    def is_it(centred: Tensor) -> bool:
        made = centred * centred.square().mean(-1, keepdim=True).rsqrt() * gain + bias
        return float((made - output).abs().max()) <= _LINEAR * float(output.abs().max())

    if is_it(x):
        return None
    if is_it(x - x.mean(-1, keepdim=True)):
        return "it subtracts the mean of the hidden states (LayerNorm), which a rotation does not leave alone"
    return "it is no root mean square norm"


def _rank(trial: BlockTrial, graph: Subgraph, seen: Seen) -> Rank | None:
    """A norm whose input is a slice of the output of some matrix."""
    x = seen.inputs.get(graph.source)
    if x is None or not bool(x.any()):
        return None
    values = {"weight": trial.values[f"{graph.source}.weight"]}
    if norm_defect(values, x, seen.outputs[graph.source], plus_one=graph.plus_one):
        return None
    for name, made in seen.outputs.items():
        if is_norm(_module(trial, name)) or made.shape[0] != x.shape[0]:
            continue
        for first in {0, made.shape[1] - x.shape[1]}:
            if first >= 0 and torch.equal(made[:, first : first + x.shape[1]], x):
                return Rank(graph, name, first)
    return None


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return float((found.reshape(-1) - expected.reshape(-1)).abs().max()) <= _SAME * float(scale.abs().max())

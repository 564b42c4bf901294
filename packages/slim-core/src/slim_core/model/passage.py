"""The way of hidden states through a model whose blocks let them pass: what comes before the blocks, and what after.

The model's own forward runs in float32 on a few tokens. Every block hands on what it was given; the last one hands on
hidden states of one's own, so that what follows the blocks is seen by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.residual import BlockTrial, Seen, watched
from slim_core.model.skeleton import named_modules
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import kind_of
from slim_core.model.subgraphs import is_norm
from slim_core.model.suspended import BlockCall, SuspendedForward
from slim_core.model.units import Unit
from slim_core.model.wide import hidden_of, widened, with_hidden

__all__ = ["Passage", "in_shell", "pass_through", "values_of"]

_HEAD_ROWS = 256
_EMBEDDING_ROWS = 64
Visit = Callable[[Unit, BlockTrial], None]


@dataclass
class Passage:
    """What was seen on the way.

    Args:
        first: the hidden states that the first block is given ``(1, tokens, width)``.
        last: those that the last block handed on.
        logits: what the model makes of them, the first of each token.
        seen: inputs and outputs of the norms, embeddings and linears outside the blocks.
        kinds: by unit, the first unit of its kind.
        shells: by the first unit of a kind, its output, in which hidden states are replaced.
    """

    first: Tensor = field(default_factory=lambda: torch.empty(0))
    last: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: Seen = field(default_factory=Seen)
    kinds: dict[str, str] = field(default_factory=dict[str, str])
    shells: dict[str, Any] = field(default_factory=dict[str, Any])


def values_of(model: StreamedModel, parameters: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Where the values of parameters are, given the names of their tensors."""
    return {name: LazyTensor(model.source, model.source.meta(stored)) for name, stored in parameters.items()}


def pass_through(
    model: StreamedModel,
    example: Mapping[str, Any],
    *,
    visit: Visit | None = None,
    known: Passage | None = None,
    last: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> Passage:
    """Run the model with blocks that let everything pass.

    Args:
        example: keyword arguments of the model for one short sample; the ids are replaced by small ones.
        visit: called for the first block of every kind, with the means to run it.
        known: an earlier passage through the same model; without it blocks are looked at, and one of every kind is run.
        last: changes the hidden states that are handed on by the last block.

    Raises:
        UnsupportedError: the model gives its blocks no hidden states.
        InvalidModelError: it returns no logits.
    """
    found = Passage() if known is None else Passage(kinds=known.kinds, shells=known.shells)
    blocks = [unit for unit in model.units if unit.block is not None]
    around = [unit for unit in model.units if unit.stop is None and not unit.mirrors]
    outside = {name: stored for unit in around for name, stored in unit.parameters.items()}
    inputs, rows = _small(model, example)
    modules = dict(_outside(model))
    with (
        torch.no_grad(),
        widened(model.module, values_of(model, outside), rows),
        watched(modules, found.seen),
        SuspendedForward(model.module, model.stops, [inputs], len(model.towers)) as forward,
    ):
        forward.start()
        firsts: dict[Any, str] = {}
        for unit in blocks:
            call = forward.call(0)
            hidden = hidden_of(call)
            if hidden is None or hidden.dim() != 3:
                given = "no tensor" if hidden is None else f"a tensor of shape {list(hidden.shape)}"
                raise UnsupportedError(
                    f"it is called with {given} where hidden states (batch, tokens, channels) were expected",
                    where=unit.name,
                )
            if unit is blocks[0]:
                found.first = hidden
            if known is None:
                first = found.kinds[unit.name] = firsts.setdefault(kind_of(model, unit), unit.name)
                if first == unit.name:
                    found.shells[first] = _look_at(model, unit, forward, call, visit)
            if unit is blocks[-1]:
                hidden = last(_random_like(hidden))
                found.last = hidden
            forward.resume(0, in_shell(found.shells[found.kinds[unit.name]], hidden))
        found.logits = _logits(model, forward.outputs[0])
    return found


def _look_at(model: StreamedModel, unit: Unit, forward: SuspendedForward, call: BlockCall, visit: Visit | None) -> Any:
    """Let the block at which the model is suspended be visited; gives its output."""
    shell: list[Any] = []

    def run(hidden: Tensor) -> Tensor:
        shell[:] = [forward.compute(with_hidden(call, lambda _: hidden))]
        return shell[0] if isinstance(shell[0], Tensor) else shell[0][0]

    hidden = hidden_of(call)
    assert hidden is not None
    trial = BlockTrial(model.module, unit.name, values_of(model, unit.parameters), run, hidden.shape)
    if visit is not None:
        visit(unit, trial)
    if not shell:
        trial.added()
    return shell[0]


def in_shell(shell: Any, hidden: Tensor) -> Any:
    """A block's output in which the hidden states are replaced."""
    return hidden if isinstance(shell, Tensor) else type(shell)((hidden, *shell[1:]))


def _random_like(hidden: Tensor) -> Tensor:
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))


def _logits(model: StreamedModel, output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InvalidModelError(f"the model returned {type(output).__name__}, which has no logits")
    return logits


def _small(model: StreamedModel, example: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The example with ids of the first rows of the embedding, and how many rows of what are needed for it."""
    ids = torch.arange(example["input_ids"].shape[-1])
    rows: dict[str, int] = {}
    for name, module in _outside(model):
        if isinstance(module, nn.Embedding):
            ids = ids % module.num_embeddings
            rows[f"{name}.weight"] = min(max(_EMBEDDING_ROWS, len(ids)), module.num_embeddings)
    epilogue = {name for unit in model.units if unit.name == "epilogue" for name in unit.parameters}
    for name, module in _outside(model):
        if isinstance(module, nn.Linear) and f"{name}.weight" in epilogue:
            count = min(_HEAD_ROWS, module.out_features)
            rows |= {f"{name}.{part}": count for part in ("weight", "bias") if f"{name}.{part}" in epilogue}
    return {**example, "input_ids": ids[None]}, rows


def _outside(model: StreamedModel) -> Iterator[tuple[str, nn.Module]]:
    """Embeddings, norms and linears that belong to neither a block nor a tower."""
    for name, module in named_modules(model.module):
        if model.owner(name) is None and (isinstance(module, (nn.Embedding, nn.Linear)) or is_norm(module)):
            yield name, module

"""Which linears of a model's towers make hidden states of its decoder: of images, beside those of the text.

The model runs once with an image, its blocks letting everything pass. Hidden states that the embedding did not make,
and what is added to them between two blocks, must be the output of a linear, row by row; then rotating that output
rotates them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.passage import Passage, in_shell
from slim_core.model.residual import Seen, watched
from slim_core.model.skeleton import named_modules
from slim_core.model.streamed import StreamedModel
from slim_core.model.suspended import SuspendedForward
from slim_core.model.wide import hidden_of

__all__ = ["find_tower_writers"]


def find_tower_writers(model: StreamedModel, passage: Passage, readers: tuple[str, ...]) -> tuple[str, ...]:
    """The linears whose outputs are rows of hidden states, or are added to them.

    Args:
        passage: through the same model, without an image.
        readers: linears that read the hidden states in the end.

    Raises:
        UnsupportedError: something else makes hidden states of an image, or might make some of another modality.
    """
    if not model.towers:
        return ()
    if model.tower_example is None:
        raise UnsupportedError("its service gives no example of what its towers are given", where=model.towers[0])
    width = passage.first.shape[-1]
    linears = {
        name: module
        for name, module in named_modules(model.module)
        if isinstance(module, nn.Linear)
        and module.out_features == width
        and name not in readers
        and (model.owner(name) is None or model.owner(name) in model.towers)
    }
    embeddings = {
        name: module
        for name, module in named_modules(model.module)
        if isinstance(module, nn.Embedding) and name in passage.seen.outputs
    }
    seen = Seen()
    parameters = [name for unit in model.units if unit.block is None and not unit.mirrors for name in unit.parameters]
    model.load(parameters, torch.device("cpu"))
    try:
        with (
            torch.no_grad(),
            watched({**linears, **embeddings}, seen),
            SuspendedForward(model.module, model.blocks, [model.tower_example()]) as forward,
        ):
            forward.start()
            return _writers(model, passage, forward, list(linears), seen)
    finally:
        model.unload(parameters)


def _writers(
    model: StreamedModel, passage: Passage, forward: SuspendedForward, linears: list[str], seen: Seen
) -> tuple[str, ...]:
    blocks = [unit for unit in model.units if unit.block is not None]
    writers: dict[str, None] = {}
    before: Tensor | None = None
    for unit in blocks:
        hidden = hidden_of(forward.call(0))
        if hidden is None:
            raise UnsupportedError("it is called with no hidden states", where=unit.name)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if before is None:
            made = [made for made in seen.outputs.values() if made.shape == rows.shape]
            changed = torch.stack([(rows != one).any(-1) for one in made]).all(0) if made else rows.new_ones(len(rows))
            if not bool(changed.any()):
                raise UnsupportedError("an image changes none of the hidden states", where=unit.name)
        else:
            changed = (rows != before).any(-1)
        if bool(changed.any()):
            writers[_maker(unit.name, rows, before, changed.bool(), linears, seen)] = None
        before = rows
        if unit is not blocks[-1]:
            forward.resume(0, in_shell(passage.shells[passage.kinds[unit.name]], hidden))
    if silent := [name for name in linears if name not in seen.outputs]:
        raise UnsupportedError(
            "it is not run for an image, so it is not known whether it makes hidden states of something else",
            where=silent[0],
        )
    return tuple(writers)


def _maker(block: str, rows: Tensor, before: Tensor | None, changed: Tensor, linears: list[str], seen: Seen) -> str:
    """The linear whose output the changed rows are, or which was added to them."""
    wanted = rows[changed]
    for name in linears:
        output = seen.outputs.get(name)
        if output is None or output.shape != wanted.shape:
            continue
        output = output.to(rows.dtype)
        if torch.equal(output if before is None else before[changed] + output, wanted):
            return name
    raise UnsupportedError(
        "what an image brings into the hidden states that it is given is not the output of a linear as it is",
        where=block,
    )

"""Running the calibration samples through the blocks, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slim_core.memory import give_back_freed_memory
from slim_core.model.portions import FeedForward, Portions
from slim_core.model.streamed import StreamedModel
from slim_core.model.suspended import BlockCall, SuspendedForward
from slim_core.model.tower_inputs import TowerInputs
from slim_core.model.units import Unit
from slim_core.runners.boundaries import Boundaries, Boundary
from slim_core.runners.spill import Spill
from slim_core.runners.witness import Witness

__all__ = ["BlockForwards", "NotAsKeptError", "moved"]


def moved(value: Any, device: torch.device) -> Any:
    """A nested structure with all its tensors on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


class NotAsKeptError(Exception):
    """What an interrupted run has kept of its samples is of no use."""


class BlockForwards:
    """The forward passes of all samples, advanced block by block.

    What lies outside the blocks stays on the host, as do activations between blocks; a block computes on ``device``.
    With two streams every sample is carried twice, so that one stream can be handed exact outputs (stream 0) and the
    other quantized ones (the last stream).

    A sample starts when its first stop is run, so that inputs which are costly to make need not all be there at once.
    One that passes a tower or a block by is left out while that is at work.

    Args:
        inputs: keyword arguments of the model for each sample, asked for when it starts; its ``close``, if it has one,
            is called at the end.
        extra: the same of extra samples, which are run apart from the others and are in one stream, the last.
        spill: keeps on disk what samples hold while they are not at work; None: that stays in memory.
        tick: called for every forward of a block.
        witness: inputs of a short sample that runs along, to see what forwards still need; None: nobody asks.
    """

    def __init__(
        self,
        model: StreamedModel,
        inputs: Sequence[Mapping[str, Any]],
        device: torch.device,
        streams: int = 1,
        extra: Sequence[Mapping[str, Any]] = (),
        spill: Spill | None = None,
        tick: Callable[[], None] = lambda: None,
        witness: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._tick = tick
        self._device = device
        self.samples = len(inputs)
        self._streams = streams
        self.extra = len(extra)
        towers = len(model.towers)
        self._spill = spill
        self._settled: dict[int, int] = {}  # by sample, the stop at which what it holds was put on disk
        self._carried = _Carried(inputs, streams, extra, spill, witness)
        self.witness = Witness() if witness is not None else None
        self.boundaries: Boundaries | None = None
        self._forward = SuspendedForward(model.module, model.stops, self._carried, towers, skips=model.skips)
        self._last: list[Any] = []
        self._stop = 0
        self._portions = Portions(model.module)
        self.count = 0

    def __enter__(self) -> BlockForwards:
        self._heads = self._heads_to_make()
        self._model.load((name for name in self._model.outside if name not in self._heads), torch.device("cpu"))
        self._forward.__enter__()
        return self

    def _heads_to_make(self) -> set[str]:
        """Weights of heads that would take memory, and that nothing needs before :meth:`finish`."""
        epilogue = {name for unit in self._model.units if unit.name == "epilogue" for name in unit.parameters}
        return {name for name in self._model.made_while_read(nn.Linear) if name in epilogue}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forward.__exit__(kind, error, trace)
        self._carried.close()
        self._model.unload(self._model.outside)

    def reach(self, unit: Unit) -> None:
        """Turn to a block or tower. At the first block, samples that met no tower start; embeddings have done their
        work then."""
        assert unit.stop is not None
        self._stop = unit.stop
        if unit.block == 0:
            self._all_started()

    def divide(self, parts: Iterable[FeedForward]) -> None:
        """Give these parts of the block at work, which is loaded and not observed yet, some tokens at a time."""
        self._portions.choose(parts)

    def _all_started(self) -> None:
        for index in range(len(self._carried)):
            self._call(index)
        self._model.unload(self._model.made_while_read(nn.Embedding))
        self._model.source.release(self._model.tensors_of(self._model.outside))

    def go_on(self, boundary: Boundary, keys: Sequence[str]) -> None:
        """Bring all samples where they were at a boundary that an interrupted run has kept, without running a block.

        Args:
            keys: the names that they have there, those of other ranks included.

        Raises:
            NotAsKeptError: what was kept cannot be read, or leads elsewhere; this object is of no use any more.
        """
        for index, key in enumerate(keys):
            try:
                self._bring(index, key, boundary)
            except Exception as error:
                raise NotAsKeptError(f"{key}: {error}") from error
        if boundary.stop > len(self._model.towers):
            self._all_started()

    def _bring(self, index: int, key: str, boundary: Boundary) -> None:
        while (call := self._forward.call(index)).block < boundary.stop:
            self._deliver(index, boundary.output(key, call.block))
        if not boundary.agrees(key, call):
            raise NotAsKeptError("the next block is given something else than it was then")
        if boundary.stop >= len(self._model.towers):
            self._carried.let_go(index)
        self._call(index)

    def _deliver(self, index: int, output: Any) -> None:
        """Run a sample to its next stop; the witness under the eyes of autograd."""
        if self.witness is None or index != self._along:
            self._forward.resume(index, output)
            return
        with torch.enable_grad():
            self._forward.resume(index, self.witness.marked(self._forward.call(index).block, output))

    @property
    def _along(self) -> int:
        """The number of the witness, if there is one."""
        return len(self._carried) - 1

    def passing(self, unit: Unit) -> AbstractContextManager[None]:
        """Within this context all samples pass a unit."""
        assert unit.stop is not None
        return nullcontext() if self.boundaries is None else self.boundaries.at(unit.stop)

    def follow(self) -> None:
        """Let the witness pass the current block; then it is known what of the other samples is to be kept."""
        if self.boundaries is None or self._is_last:
            return
        call = self._forward.call(self._along)
        if call.block != self._stop:
            self.boundaries.decide()
            return
        there = BlockCall(call.sample, call.block, moved(call.args, self._device), moved(call.kwargs, self._device))
        output = moved(self._forward.compute(there), torch.device("cpu"))
        del call, there
        self._deliver(self._along, output)
        self.boundaries.decide()
        self.boundaries.take(self._along, output)
        self.boundaries.taken(self._along, self._forward.call(self._along))

    @property
    def _is_last(self) -> bool:
        return self._stop == len(self._model.stops) - 1

    def given(self) -> tuple[int, int]:
        """How many samples, and how many extra ones, have started; several may share a forward."""
        return self._carried.given, self._carried.given_extra

    @property
    def on_disk(self) -> int:
        """Bytes of activations that wait on disk."""
        return 0 if self._spill is None else self._spill.nbytes

    def present(self, stream: int = 0) -> list[int]:
        """The samples that are run by the current block or tower, and have not been handed on in a stream."""
        return [sample for sample in range(self.samples) if self._is_here(self._index(sample, stream))]

    def _is_here(self, index: int) -> bool:
        return self._call(index).block == self._stop

    def _call(self, index: int) -> BlockCall:
        """The call at which a sample waits; what it holds is on disk if it is to be."""
        call = self._forward.call(index)
        along = self.witness is not None and index == self._along
        if self._spill is not None and not along and self._settled.get(index) != call.block:
            first = index not in self._settled
            self._settled[index] = call.block
            self._spill.hold(_hidden_of(call))
            # Tables of positions and the like are the same for many samples.
            self._spill.hold([call.args, call.kwargs], share=first)
            if first:
                self._carried.started(index)
        return call

    def compute(self, sample: int, stream: int = -1) -> Any:
        """The output of the current block for a sample, on the device."""
        return self._compute(self._index(sample, stream))

    def _compute(self, index: int) -> Any:
        self.count += 1
        self._tick()
        call = there = self._call(index)
        if self._device.type != "cpu":
            there = BlockCall(call.sample, call.block, moved(call.args, self._device), moved(call.kwargs, self._device))
        with self._portions.given():
            output = self._forward.compute(there)
        if self._spill is not None:
            self._spill.hold([call.args, call.kwargs])
            give_back_freed_memory()  # samples that wait on disk are large, and so is what a block makes of one
        return output

    def _index(self, sample: int, stream: int) -> int:
        return sample + self.samples * (stream % self._streams)

    def tokens(self) -> int:
        """How many tokens of all samples the current block is given."""
        return sum(_tokens_of(self._call(sample)) for sample in self.present())

    def attended(self) -> int:
        """At most how many tokens of all samples an attention of the current block sees."""
        return sum(_tokens_at_hand(self._call(sample)) for sample in self.present())

    def run(self, *, hand_on: bool, stream: int = -1, keep: bool = False) -> list[Any]:
        """Run the current block for every sample of a stream, and hand its outputs on to the next block if asked.

        Returns:
            The outputs, back on the host, None for a sample that passes the tower by; empty unless they are to be kept.
        """
        kept: list[Any] = []
        for sample in range(self.samples):
            output = self._on_host(self._index(sample, stream))
            if keep:
                kept.append(output)
                if self._spill is not None:
                    self._spill.hold(output)
            if hand_on:
                self._resume(self._index(sample, stream), output)
            if self._stop < len(self._model.towers):  # what images pass through is larger than what is left of them
                give_back_freed_memory()
        return kept

    def _on_host(self, index: int) -> Any:
        return moved(self._compute(index), torch.device("cpu")) if self._is_here(index) else None

    def hand_on(self, outputs: Sequence[Any], stream: int = -1) -> None:
        """Hand outputs that were kept on to the next block."""
        for sample, output in enumerate(outputs):
            self._resume(self._index(sample, stream), output)

    def compute_extra(self, sample: int) -> Any:
        """The output of the current block for an extra sample, back on the host; None if it passes the tower by."""
        return self._on_host(self.samples * self._streams + sample)

    def hand_on_extra(self, outputs: Sequence[Any]) -> None:
        """Hand the outputs of the extra samples on to the next block."""
        for sample, output in enumerate(outputs):
            self._resume(self.samples * self._streams + sample, output)

    def drop_extra(self) -> None:
        """Nobody needs the extra samples any more."""
        for sample in range(self.extra):
            self._forward.abandon(self.samples * self._streams + sample)
            if self.boundaries is not None:
                self.boundaries.forget(self.samples * self._streams + sample)
        self.extra = 0

    def _resume(self, index: int, output: Any) -> None:
        """At the last block outputs are dropped: nothing after the blocks is ever calibrated."""
        if self._is_here(index) and not self._is_last:
            if self.boundaries is not None:
                self.boundaries.take(index, output)
            self._forward.resume(index, output)
            call = self._call(index)
            if self.boundaries is not None:
                self.boundaries.taken(index, call)
                if self._spill is not None:
                    self._spill.hold([call.args, call.kwargs])  # it was looked at
            if self._stop < len(self._model.towers) <= self._call(index).block:
                self._carried.let_go(index)

    def run_model(self) -> list[Any]:
        """Run every tower and block, each loaded only while it is at work; the outputs of the model for all samples."""
        for unit in self._model.running:
            self.reach(unit)
            self._model.load(unit.parameters, self._device)
            if unit is self._model.running[-1]:
                self.run_to_end()
            else:
                self.run(hand_on=True)
            self._model.unload(unit.parameters)
        return [self.finish(sample) for sample in range(self.samples)]

    def run_to_end(self) -> None:
        """Run the last block for every sample and keep its outputs; :meth:`finish` runs what comes after."""
        self._last = self.run(hand_on=False, keep=True)
        self._model.load(self._heads, torch.device("cpu"))

    def finish(self, sample: int) -> Any:
        """The output of the whole model for one sample, after :meth:`run_to_end`."""
        self._forward.resume(sample, self._last[sample])
        output, self._forward.outputs[sample], self._last[sample] = self._forward.outputs[sample], None, None
        return output


class _Carried(Sequence[Mapping[str, Any]]):
    """The inputs of all streams, of the extra samples, and last of the witness; each is asked for when it is needed."""

    def __init__(
        self,
        inputs: Sequence[Mapping[str, Any]],
        streams: int,
        extra: Sequence[Mapping[str, Any]],
        spill: Spill | None = None,
        witness: Mapping[str, Any] | None = None,
    ) -> None:
        self._inputs, self._streams, self._extra, self._spill = inputs, streams, extra, spill
        self._witness = witness
        self.given = self.given_extra = 0
        self._for_towers: dict[int, TowerInputs] = {}
        self._starting: dict[int, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._inputs) * self._streams + len(self._extra) + (self._witness is not None)

    def __getitem__(self, index: Any) -> Any:
        at, own = int(index), len(self._inputs) * self._streams
        if self._witness is not None and at == len(self) - 1:
            return self._witness
        batch = self._extra[at - own] if at >= own else self._inputs[at % len(self._inputs)]
        if self._spill is not None:
            self._spill.hold(batch)
            self._starting[at] = batch
        if isinstance(batch, TowerInputs):
            self._for_towers[at] = batch
        if at >= own:
            self.given_extra += _samples(batch)
        elif at < len(self._inputs):
            self.given += _samples(batch)
        return batch

    def started(self, index: int) -> None:
        """A sample has got to its first stop: what it was given, and what was made of that, leaves memory."""
        if self._spill is not None:
            self._spill.hold(self._starting.pop(index, None))
            give_back_freed_memory()

    def close(self) -> None:
        """Whoever makes inputs ahead need not go on."""
        for inputs in (self._inputs, self._extra):
            if (close := getattr(inputs, "close", None)) is not None:
                close()

    def let_go(self, index: int) -> None:
        """The towers have run for this one."""
        if (batch := self._for_towers.pop(index, None)) is not None:
            batch.let_go()


def _samples(batch: Mapping[str, Any]) -> int:
    """How many samples share a forward."""
    ids = batch.get("input_ids")
    tensors = [ids] if isinstance(ids, Tensor) else [value for value in batch.values() if isinstance(value, Tensor)]
    return max((len(value) for value in tensors if value.dim()), default=1)


def _hidden_of(call: BlockCall) -> Any:
    """The hidden states, which are the first thing that a block is given."""
    return call.args[0] if call.args else call.kwargs.get("hidden_states")


def _tokens_of(call: BlockCall) -> int:
    """All but the last dimension of the hidden states."""
    hidden = _hidden_of(call)
    return hidden.shape[:-1].numel() if isinstance(hidden, Tensor) else 0


def _tokens_at_hand(call: BlockCall) -> int:
    """Those of the hidden states, and of what a block is given besides: e.g. those of a text that it joins them to."""
    given = [*call.args, *call.kwargs.values()]
    sequences = [x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3]
    return max(_tokens_of(call), sum(x.shape[:-1].numel() for x in sequences))

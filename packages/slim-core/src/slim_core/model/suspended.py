"""The model's own forward, suspended at every decoder block.

Each sample runs ``model(**inputs)`` unmodified in a coroutine of its own. When that forward calls block ``i`` the
coroutine stops and the call (arguments and all) is handed out; it goes on when the caller delivers the block's output.
Masks, rotary embeddings, per-layer inputs: whatever the model prepares between blocks arrives by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import greenlet
from torch import nn

from slim_core.errors import InvalidModelError

__all__ = ["BlockCall", "SuspendedForward"]


@dataclass
class BlockCall:
    """Block ``block`` was called with these arguments by the forward of sample ``sample``."""

    sample: int
    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SuspendedForward:
    """A context in which the forward passes of all ``inputs`` stop at every block of ``blocks``.

    Blocks keep their real ``forward`` as :meth:`compute`; only calls from inside the model are caught. Leaving the
    context restores the blocks and ends all coroutines.

    Args:
        inputs: keyword arguments of the model; each is asked for once, when its forward starts.
        optional: how many of the first blocks a forward may pass by, as one without an image does the vision tower.
        skips: whether it may pass by any of them but the last, as one does that is guided by skipping layers.

    Raises:
        InvalidModelError: the model does not call its blocks once each, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        inputs: Sequence[Mapping[str, Any]],
        optional: int = 0,
        *,
        skips: bool = False,
    ) -> None:
        self._model = model
        self._blocks = list(blocks)
        self._inputs = inputs
        self._optional = optional
        self._furthest = len(self._blocks) - 1 if skips else optional
        self._runs: dict[int, greenlet.greenlet] = {}
        self._calls: list[BlockCall | None] = [None] * len(inputs)
        self._shadowed: list[Any] = []  # what the blocks had as ``forward`` of their own
        self.outputs: list[Any] = [None] * len(inputs)

    def __enter__(self) -> SuspendedForward:
        self._shadowed = [vars(block).get("forward") for block in self._blocks]
        for index, block in enumerate(self._blocks):
            block.forward = self._stub(index)  # an instance attribute, shadowing the method of the class
        self._hub = greenlet.getcurrent()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block, forward in zip(self._blocks, self._shadowed, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
        for run in self._runs.values():
            if not run.dead:
                run.throw(greenlet.GreenletExit)
        self._runs.clear()
        self._calls.clear()

    def _stub(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._hub.switch(BlockCall(-1, index, args, kwargs))

        return forward

    def start(self) -> None:
        """Run every sample that has not started yet up to its first block."""
        for sample in range(len(self._inputs)):
            if sample not in self._runs:
                self._start(sample)

    def _start(self, sample: int) -> None:
        run = self._runs[sample] = greenlet.greenlet(self._forward, self._hub)
        self._take(sample, run.switch(self._inputs[sample]), expected=0)

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        return self._model(**inputs)

    def _take(self, sample: int, received: Any, expected: int) -> None:
        if isinstance(received, BlockCall):
            received.sample = sample
            if not expected <= received.block <= max(expected, self._furthest):
                raise InvalidModelError(
                    f"{self._called(received.block)} was called where {self._called(expected)} was expected; the model "
                    "does not run its blocks once each, in order",
                    where=type(self._model).__name__,
                    remedy="use a recipe without calibration, such as one with activations per_token; or name the list "
                    "of blocks, and what runs as a whole ahead of them, in an adapter",
                )
            self._calls[sample] = received
            return
        if expected < len(self._blocks):
            raise InvalidModelError(
                f"the forward ended before calling {self._called(expected)}", where=type(self._model).__name__
            )
        self._calls[sample] = None
        self.outputs[sample] = received

    def _called(self, position: int) -> str:
        """A block as errors call it."""
        if position < self._optional:
            return type(self._blocks[position]).__name__
        return f"block {position - self._optional}" if position < len(self._blocks) else "the end"

    def call(self, sample: int) -> BlockCall:
        """The call at which a sample is suspended; one that has not started yet is run up to there."""
        if sample not in self._runs:
            self._start(sample)
        call = self._calls[sample]
        if call is None:
            raise InvalidModelError(f"sample {sample} is not suspended", where=type(self._model).__name__)
        return call

    def resume(self, sample: int, output: Any) -> None:
        """Deliver the output of the block a sample waits for, and run it to its next block or to its end."""
        call = self.call(sample)
        self._calls[sample] = None
        expected = call.block + 1
        del call
        self._take(sample, self._runs[sample].switch(output), expected)

    def abandon(self, sample: int) -> None:
        """End the forward of a sample where it is suspended."""
        self._calls[sample] = None
        self._runs[sample].throw(greenlet.GreenletExit)

    def compute(self, call: BlockCall) -> Any:
        """The output of the real block for a call, with whatever weights the block has now."""
        block = self._blocks[call.block]
        own = self._shadowed[call.block]
        return own(*call.args, **call.kwargs) if own else type(block).forward(block, *call.args, **call.kwargs)

"""Running the calibration samples through the blocks, one block at a time."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slim_core.model.suspended import BlockCall, SuspendedForward
from slim_core.model.units import StreamedModel
from slim_core.quantization.layers import QuantizedLinear, SimulatedLinear

__all__ = ["BlockForwards", "layer_to", "moved", "simulated"]


def moved(value: Any, device: torch.device) -> Any:
    """A nested structure with all its tensors on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


class BlockForwards:
    """The forward passes of all samples, advanced block by block.

    What lies outside the blocks stays on the host, as do activations between blocks; a block computes on ``device``.

    Args:
        inputs: keyword arguments of the model for each sample.
    """

    def __init__(self, model: StreamedModel, inputs: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._model = model
        self._device = device
        self._samples = len(inputs)
        self._forward = SuspendedForward(model.module, model.blocks, inputs)
        self._last: list[Any] = []
        self.count = 0

    def __enter__(self) -> BlockForwards:
        self._model.load(self._model.outside, torch.device("cpu"))
        self._forward.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forward.__exit__(kind, error, trace)
        self._model.unload(self._model.outside)

    def start(self) -> None:
        """Run every sample up to the first block."""
        self._forward.start()
        self._model.source.release(self._model.tensors_of(self._model.outside))

    def compute(self, call: BlockCall) -> Any:
        """The output of a block for one call, back on the host."""
        self.count += 1
        if self._device.type == "cpu":
            return self._forward.compute(call)
        call = BlockCall(call.sample, call.block, moved(call.args, self._device), moved(call.kwargs, self._device))
        return moved(self._forward.compute(call), torch.device("cpu"))

    def run(self, *, hand_on: bool) -> None:
        """Run the current block for every sample, and hand its outputs on to the next block if asked.

        At the last block outputs are dropped: nothing after the blocks is ever calibrated.
        """
        last = len(self._model.blocks) - 1
        for sample in range(self._samples):
            output = self.compute(self._forward.call(sample))
            if hand_on and self._forward.call(sample).block < last:
                self._forward.resume(sample, output)

    def run_to_end(self) -> None:
        """Run the last block for every sample and keep its outputs; :meth:`finish` runs what comes after."""
        self._last = [self.compute(self._forward.call(sample)) for sample in range(self._samples)]

    def finish(self, sample: int) -> Any:
        """The output of the whole model for one sample, after :meth:`run_to_end`."""
        self._forward.resume(sample, self._last[sample])
        output, self._forward.outputs[sample], self._last[sample] = self._forward.outputs[sample], None, None
        return output


def layer_to(layer: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    """A quantized linear with its tensors on a device."""
    if device.type == "cpu":
        return layer
    data: Any = layer
    return replace(data, **moved({f.name: getattr(data, f.name) for f in fields(data)}, device))


@contextmanager
def simulated(root: nn.Module, layers: Mapping[str, QuantizedLinear], device: torch.device) -> Generator[None]:
    """Within this context the named linears compute what their quantized forms compute on the target."""
    originals: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        originals[name] = root.get_submodule(name)
        root.set_submodule(name, SimulatedLinear(layer_to(layer, device)))
    try:
        yield
    finally:
        for name, module in originals.items():
            root.set_submodule(name, module)

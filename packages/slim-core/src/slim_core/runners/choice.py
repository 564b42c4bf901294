"""Which runner works through the units, and why."""

from __future__ import annotations

from dataclasses import dataclass

from slim_core.budget import UNLIMITED, MemoryBudget
from slim_core.devices import Devices, free_device_memory, free_host_memory
from slim_core.errors import UnsupportedError
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit

__all__ = ["RunnerChoice", "choose_runner", "owned_bytes", "unit_bytes"]

# Room for activations and quantized copies beside resident weights.
_HEADROOM = 1.5


@dataclass(frozen=True)
class RunnerChoice:
    """``layer_wise`` gives every unit back when it is done; ``model_wise`` keeps the whole model on the device."""

    name: str
    reason: str

    @property
    def keeps_model(self) -> bool:
        return self.name == "model_wise"


def owned_bytes(model: StreamedModel, unit: Unit) -> int:
    """Bytes of the tensors that a unit brings; a tied one counts where it is stored."""
    return sum(model.source.meta(origin).nbytes for name, origin in unit.tensors.items() if name == origin)


def unit_bytes(model: StreamedModel, unit: Unit) -> int:
    """Bytes of the tensors that a unit owns, in the dtype they are read as."""
    return sum(model.source.meta(name).nbytes for name in set(unit.tensors.values()))


def choose_runner(
    requested: str, model: StreamedModel, devices: Devices, *, needs_data: bool, budget: MemoryBudget = UNLIMITED
) -> RunnerChoice:
    """Settle ``spec.runner``.

    ``auto`` weighs the size of the model and of its largest unit against the free memory of host and device, as far as
    the budget allows to take it.

    Raises:
        UnsupportedError: ``dp_layer_wise``, which this version does not have.
    """
    if requested == "dp_layer_wise":
        raise UnsupportedError(
            "distributed layer-wise quantization is not available in this version",
            where="spec.runner",
            remedy="use runner: layer_wise (or auto) with one device",
        )
    if requested != "auto":
        return RunnerChoice(requested, "the recipe asks for it")
    gib = 1 << 30
    blocks = [unit_bytes(model, unit) for unit in model.running]
    total, largest = sum(blocks), max(blocks, default=0)
    free, host = free_device_memory(devices.first), free_host_memory()
    sizes = (
        f"blocks {total / gib:.2f} GiB, largest {largest / gib:.3f} GiB, "
        f"free {devices.first.type} memory {free / gib:.1f} GiB, host {host / gib:.1f} GiB"
    )
    several = f"; {len(devices.indices)} devices given, the first is used" if len(devices.indices) > 1 else ""
    if not needs_data:
        return RunnerChoice(
            "layer_wise", f"no layer needs calibration data, so every weight passes once ({sizes}){several}"
        )
    if devices.kind == "cpu":
        return RunnerChoice("layer_wise", f"on the CPU weights are mapped from disk either way ({sizes}){several}")
    if total * _HEADROOM < min(free, budget.device or free) and total < min(host, budget.host or host):
        return RunnerChoice("model_wise", f"all blocks fit on the device ({sizes}){several}")
    return RunnerChoice("layer_wise", f"the blocks do not all fit on the device ({sizes}){several}")

"""Which runner works through the units, and why."""

from __future__ import annotations

from dataclasses import dataclass

from slim_core.budget import UNLIMITED, MemoryBudget
from slim_core.devices import Devices, free_device_memory, free_host_memory
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit

__all__ = ["RunnerChoice", "choose_runner", "owned_bytes", "unit_bytes"]

# Room for activations and quantized copies beside resident weights.
_HEADROOM = 1.5


@dataclass(frozen=True)
class RunnerChoice:
    """``layer_wise`` gives every unit back when it is done; ``model_wise`` keeps the whole model on the device;
    ``dp_layer_wise`` is ``layer_wise`` on several devices.

    Args:
        ranks: how many processes share the work.
        by_units: whether whole units are divided over them, instead of samples and the linears of each unit.
    """

    name: str
    reason: str
    ranks: int = 1
    by_units: bool = False

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
    requested: str,
    model: StreamedModel,
    devices: Devices,
    *,
    needs_data: bool,
    budget: MemoryBudget = UNLIMITED,
    ranks: int = 1,
    whole_units: str = "",
    distributes: bool = False,
    searches: bool = False,
) -> RunnerChoice:
    """Settle ``spec.runner``.

    ``auto`` takes ``dp_layer_wise`` where there are several devices and something for them to compute: samples to run,
    or weights to search the scales of. With one device it weighs the size of the model and of its largest unit against
    the free memory of host and device, as far as the budget allows to take it.

    Args:
        ranks: how many processes there could be.
        whole_units: why the linears of a unit cannot be divided, if they cannot.
        distributes: whether several devices are used whatever is requested.
        searches: whether quantizing the weights takes longer than reading them.
    """
    asked = requested == "dp_layer_wise"
    if ranks > 1 and (asked or ((needs_data or searches) and (requested == "auto" or distributes))):
        given = f"{ranks} devices are given" if len(devices.indices) == ranks else f"{ranks} ranks were started"
        why = "the recipe asks for it" if asked else given
        if not needs_data:
            return RunnerChoice("dp_layer_wise", f"{why}; {ranks} ranks divide the units", ranks, True)
        if whole_units:
            how = f"every rank runs all samples and works on its share of the units, because {whole_units}"
        else:
            how = f"{ranks} ranks divide samples and linears"
        return RunnerChoice("dp_layer_wise", f"{why}; {how}", ranks, bool(whole_units))
    if asked:
        return RunnerChoice("layer_wise", "the recipe asks for dp_layer_wise, but there is one device")
    if requested != "auto":
        several = f"; of {ranks} devices the first is used" if ranks > 1 else ""
        return RunnerChoice(requested, f"the recipe asks for it{several}")
    gib = 1 << 30
    blocks = [unit_bytes(model, unit) for unit in model.running]
    total, largest = sum(blocks), max(blocks, default=0)
    free, host = free_device_memory(devices.first), free_host_memory()
    sizes = (
        f"blocks {total / gib:.2f} GiB, largest {largest / gib:.3f} GiB, "
        f"free {devices.first.type} memory {free / gib:.1f} GiB, host {host / gib:.1f} GiB"
    )
    if not needs_data:
        alone = (
            f"; {ranks} devices are given, but rounding weights takes no longer than reading them, and all would read "
            "from one disk: runner: dp_layer_wise uses all of them nevertheless"
        )
        several = alone if ranks > 1 else ""
        return RunnerChoice(
            "layer_wise", f"no layer needs calibration data, so every weight passes once ({sizes}){several}"
        )
    if devices.kind == "cpu":
        return RunnerChoice("layer_wise", f"on the CPU weights are mapped from disk either way ({sizes})")
    if total * _HEADROOM < min(free, budget.device or free) and total < min(host, budget.host or host):
        return RunnerChoice("model_wise", f"all blocks fit on the device ({sizes})")
    return RunnerChoice("layer_wise", f"the blocks do not all fit on the device ({sizes})")

"""Whether a run stays within its budget, and what is said if it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from slim_core.budget import UNLIMITED, MemoryBudget
from slim_core.devices import Devices
from slim_core.model.experts import ExpertLayer
from slim_core.runners.plan_memory import PlannedMemory, plan_memory
from slim_core.runners.prediction import Share

MIB = 1 << 20
CPU, NPU = Devices("cpu"), Devices("npu")
EXPERTS = {"layers.0": (ExpertLayer("layers.0.experts", {0: {"up": "layers.0.experts.0.up"}}),)}


def shares(experts: Mapping[str, Sequence[ExpertLayer]], spills: bool) -> list[list[Share]]:
    """A stage ahead takes less in all, but more on the device."""
    weights, samples = 20 if experts else 200, 10 if spills else 100
    main = [Share("weights", weights * MIB, device=True), Share("samples", samples * MIB), Share("nothing", 0)]
    ahead = [Share("weights", weights * MIB, device=True), Share("inside", 50 * MIB, host=False, device=True)]
    return [ahead, main]


def planned(budget: MemoryBudget, devices: Devices = CPU, why_whole: str = "", experts: bool = True) -> PlannedMemory:
    return plan_memory(budget, devices, shares, EXPERTS if experts else {}, why_whole)


def test_ranks_share_what_is_to_be_allowed() -> None:
    memory = plan_memory(MemoryBudget(100 * MIB), CPU, shares, {}, "", sharers=3)
    assert memory.refusal is not None
    assert memory.refusal.what.startswith("each rank would take about 250")
    assert memory.refusal.remedy is not None
    assert "host=750MiB" in memory.refusal.remedy


@pytest.mark.parametrize("budget", [UNLIMITED, MemoryBudget(300 * MIB), MemoryBudget(device=1)])
def test_nothing_changes_where_it_fits(budget: MemoryBudget) -> None:
    """On the CPU there is no device to have a budget for."""
    memory = planned(budget)
    assert (memory.by_expert, memory.spills, memory.refusal, memory.peak) == (False, False, None, 300 * MIB)
    assert "one at a time" not in memory.summary(0)


def test_one_expert_at_a_time_where_it_does_not() -> None:
    memory = planned(MemoryBudget(300 * MIB - 1))
    assert (memory.by_expert, memory.refusal, memory.peak) == (True, None, 120 * MIB)
    assert memory.summary(80 * MIB) == (
        "about 200.0 MiB at most, 120.0 MiB of it beyond the process itself; the budget for that is 300.0 MiB for the "
        "host; so experts are in memory one at a time, read when they are called and given back afterwards"
    )


def test_activations_on_disk_where_that_does_not_help() -> None:
    memory = planned(MemoryBudget(120 * MIB - 1))
    assert (memory.by_expert, memory.spills, memory.refusal, memory.peak) == (True, True, None, 70 * MIB)
    assert memory.summary(0).endswith("; activations of samples that are not at work wait on the disk of the output")


@pytest.mark.parametrize("why", ["because", ""])
def test_activations_on_disk_with_whole_blocks(why: str) -> None:
    memory = planned(MemoryBudget(250 * MIB), why_whole=why, experts=bool(why))
    assert (memory.by_expert, memory.spills, memory.refusal, memory.peak) == (False, True, None, 250 * MIB)


@pytest.mark.parametrize(("on_disk", "spills"), [((True,), True), ((False,), False), ((False, True), False)])
def test_on_disk_in_any_case_or_never(on_disk: tuple[bool, ...], spills: bool) -> None:
    assert plan_memory(UNLIMITED, CPU, shares, EXPERTS, "", on_disk=on_disk).spills == spills


def test_refused_where_nothing_helps() -> None:
    memory = planned(MemoryBudget(70 * MIB - 1))
    assert memory.refusal is not None
    assert memory.refusal.where == "--max_memory"
    assert memory.refusal.what == (
        "the run would take about 70.0 MiB of host memory, not 70.0 MiB: 50.0 MiB inside, 20.0 MiB weights, even "
        "with one expert at a time in memory, though all samples but one wait on disk"
    )
    assert memory.refusal.remedy is not None
    assert memory.refusal.remedy.startswith("allow host=70MiB, or ")
    assert planned(MemoryBudget(70 * MIB)).refusal is None


@pytest.mark.parametrize(
    ("why", "experts", "said"),
    [
        ("because", True, "(because)"),
        ("", False, "(the model has no routed experts that could be"),
        ("so", False, "(so)"),
    ],
)
def test_refused_where_experts_cannot_help(why: str, experts: bool, said: str) -> None:
    memory = planned(MemoryBudget(200 * MIB), why_whole=why, experts=experts)
    assert not memory.by_expert
    assert memory.refusal is not None
    assert said in memory.refusal.what
    assert "about 250.0 MiB of host memory" in memory.refusal.what
    assert planned(MemoryBudget(250 * MIB), why_whole=why, experts=experts).refusal is None


def test_a_device_has_a_budget_of_its_own() -> None:
    assert not planned(MemoryBudget(300 * MIB, 250 * MIB), NPU).by_expert
    assert planned(MemoryBudget(300 * MIB, 250 * MIB - 1), NPU).by_expert
    assert planned(MemoryBudget(300 * MIB - 1, 250 * MIB), NPU).by_expert
    assert planned(MemoryBudget(30 * MIB, 70 * MIB), NPU).refusal is None
    both = planned(MemoryBudget(20 * MIB, 60 * MIB), NPU).refusal
    assert both is not None
    assert "about 30.0 MiB of host memory, not 20.0 MiB: 20.0 MiB weights" in both.what
    assert "about 70.0 MiB of device memory, not 60.0 MiB: 50.0 MiB inside, 20.0 MiB weights" in both.what
    assert both.remedy is not None
    assert both.remedy.startswith("allow host=30MiB,device=70MiB, or ")

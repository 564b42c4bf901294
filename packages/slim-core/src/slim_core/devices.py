"""Devices behind one small interface: NPU, CUDA and CPU."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, replace

import torch

from slim_core.errors import EnvError, SchemaValidateError
from slim_core.logging import get_logger

__all__ = ["Devices", "free_device_memory", "free_host_memory", "parse_device", "resolve_devices"]

_KINDS = ("npu", "cuda", "cpu")
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Devices:
    """What a run computes on. ``indices`` is never empty; ``kind`` is ``npu``, ``cuda``, or ``cpu``, where each of
    several indices is a process.

    Args:
        place: which of the indices is this process's own.
    """

    kind: str
    indices: tuple[int, ...] = (0,)
    place: int = 0

    @property
    def first(self) -> torch.device:
        """The device of this process: the first one, unless it is another rank than the first."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.indices[self.place])

    def of_rank(self, local_rank: int) -> Devices:
        """The same for another rank of those on this host; without a list of indices they are the devices in order."""
        if self.kind != "cpu" and len(self.indices) == 1 and local_rank:
            return Devices(self.kind, (self.indices[0] + local_rank,))
        return replace(self, place=local_rank % len(self.indices))

    def only(self) -> torch.device:
        """The first one, for what uses no more; a warning says so if several were asked for."""
        if len(self.indices) > 1:
            _logger.warning("--device: %d devices given, only the first, %s, is used", len(self.indices), self.first)
        return self.first

    def __str__(self) -> str:
        alone = self.kind == "cpu" and len(self.indices) == 1
        return self.kind if alone else f"{self.kind}:{','.join(map(str, self.indices))}"


def parse_device(text: str) -> tuple[str, tuple[int, ...]]:
    """Split ``npu``, ``npu:0``, ``npu:0,1`` into kind and indices (empty when none are given).

    Blanks and empty items are dropped, as the protocol has it.

    Raises:
        SchemaValidateError: unknown kind (case matters), or an index that is no number, negative or repeated.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise SchemaValidateError(
            f"unknown device {text!r}", where="--device", remedy=f"use one of {', '.join(_KINDS)}"
        )
    items = [item.strip() for item in rest.split(",") if item.strip()]
    numbers = all(item.isascii() and item.isdigit() and len(item) < 10 for item in items)
    if not numbers or (rest.strip() and not items):
        raise SchemaValidateError(
            f"device indices must be numbers, got {rest!r}", where="--device", remedy=f"write {kind}:0 or {kind}:0,1"
        )
    indices = tuple(int(item) for item in items)
    if len(set(indices)) != len(indices):
        raise SchemaValidateError(
            f"a device index is repeated in {text!r}", where="--device", remedy="name each index once"
        )
    return kind, indices


def _available(kind: str) -> int:
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            _logger.debug("torch_npu cannot be used: %s", error)
            return 0
    module = getattr(torch, kind, None)
    return module.device_count() if module is not None and module.is_available() else 0


def resolve_devices(text: str, *, explicit: bool) -> Devices:
    """The devices a run will use.

    Args:
        text: the device string.
        explicit: whether the user wrote it. An ``npu`` that is merely the default gives way to what there is, loudly.

    Raises:
        SchemaValidateError: the string is malformed or an index is too high.
        EnvError: there is no device of the kind asked for.
    """
    kind, indices = parse_device(text)
    if kind == "cpu":
        return Devices(kind, indices) if len(indices) > 1 else Devices(kind)
    count = _available(kind)
    if count == 0:
        if explicit:
            raise EnvError(
                f"there is no {kind} device on this machine",
                where="--device",
                remedy="install the slim-core[npu] extra on a machine with CANN, or pass --device cpu"
                if kind == "npu"
                else "pass --device cpu",
            )
        fallback = "cuda" if kind != "cuda" and _available("cuda") else "cpu"
        _logger.warning("no %s here: running on %s (pass --device to choose)", kind.upper(), fallback.upper())
        return Devices(fallback)
    if bad := [i for i in indices if i >= count]:
        raise SchemaValidateError(
            f"{kind}:{bad[0]} does not exist, this machine has {count}",
            where="--device",
            remedy=f"indices go from 0 to {count - 1}",
        )
    return Devices(kind, indices or (0,))


def free_host_memory() -> int:
    """Bytes of memory that a new process could take without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_device_memory(device: torch.device) -> int:
    """Free bytes on a device; for the CPU that of the host."""
    if device.type == "cpu":
        return free_host_memory()
    free, _ = getattr(torch, device.type).mem_get_info(device)
    return int(free)

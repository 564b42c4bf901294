"""The connection of the ranks: small things gathered and broadcast as objects, large sums added where they belong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from io import BytesIO
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from slim_core.errors import EnvError
from slim_core.logging import get_logger
from slim_core.ranks.watch import Fault, Watch, timeout_of_environment
from slim_core.ranks.world import World

__all__ = ["ALONE", "LostRankError", "Ranks", "connected", "packed", "unpacked"]

_T = TypeVar("_T")
dist: Any = torch.distributed  # its members have no types
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
# Who is slow is for the watch to say; a collective itself waits as long as it takes.
_PATIENCE = timedelta(days=1)
_PARTING = 60.0
_DEVICES = 64
_logger = get_logger(__name__)


class LostRankError(EnvError):
    """A rank no longer takes part."""


class Ranks:
    """This process and the others that work on the same run. One alone gathers its own, and sums are what they are.

    All of them call the same methods in the same order. ``what`` says in errors what was going on. ``waiting`` makes a
    context to be in while the others are waited for.
    """

    def __init__(
        self,
        world: World | None = None,
        watch: Watch | None = None,
        store: Any = None,
        device: torch.device | None = None,
    ) -> None:
        world = world or World()
        self.rank, self.size = world.rank, world.size
        self._device = None if device is None or device.type == "cpu" else device
        self._watch = watch
        self._store = store
        self._lock = threading.Lock()
        self.waiting: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def first(self) -> bool:
        """Whether this is the rank that talks to the user and keeps the journal."""
        return self.rank == 0

    def gather(self, value: _T, what: str) -> list[_T]:
        """What every rank gives, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        given = packed(value, self._device)
        self._collective(lambda: dist.all_gather_object(found, given), what)
        return [unpacked(other, self._device) for other in found]

    def broadcast(self, value: _T, owner: int, what: str) -> _T:
        """What the owner gives; what others give does not count."""
        if self.size == 1:
            return value
        held: list[Any] = [packed(value, self._device) if self.rank == owner else None]
        self._collective(lambda: dist.broadcast_object_list(held, src=owner), what)
        return unpacked(held[0], self._device)

    def add_up(self, tensor: Tensor, owner: int | None, what: str) -> None:
        """Add a tensor up over all ranks, in place: on the owner, or on all of them if there is none.

        On other ranks than the owner it is of no use afterwards.
        """
        if self.size == 1:
            return
        # HCCL is not known to add float64, so sums on an NPU travel through the host.
        there = tensor.cpu() if tensor.device.type == "npu" else tensor

        def add() -> None:
            if owner is None:
                dist.all_reduce(there)
            else:
                dist.reduce(there, owner)

        self._collective(add, what)
        if there is not tensor:
            tensor.copy_(there)

    def barrier(self, what: str) -> None:
        """Wait until all ranks are here."""
        self.gather(None, what)

    def part(self) -> None:
        """The work is done: the first rank goes on alone, the others end, and nobody watches anybody any more.

        The others leave only when the first one has taken in what they gathered last.
        """
        if self._watch is None:
            return
        if self.first:
            self.tell("parted", "")
        else:
            ends = time.monotonic() + _PARTING
            while not self._store.check(["parted"]) and time.monotonic() < ends:
                self.tick("the end")
                time.sleep(0.05)
        self._watch.stop()

    def tick(self, where: str | None = None) -> None:
        """This rank has come a step further.

        Raises:
            LostRankError: another one is lost.
        """
        if self._watch is not None:
            self._watch.ticks += 1
            if where is not None:
                self._watch.where = where
            if (fault := self._watch.fault) is not None:
                raise _lost(fault)

    def tell(self, key: str, text: str) -> None:
        """Leave a text for rank 0; may be called on any thread."""
        with self._lock:
            self._store.set(key, text)

    def told(self, key: str) -> str | None:
        """A text that somebody left, once; None if it is not there yet."""
        with self._lock:
            if not self._store.check([key]):
                return None
            text = self._store.get(key).decode()
            self._store.delete_key(key)
            return text

    def _collective(self, action: Callable[[], None], what: str) -> None:
        self.tick(what)
        if self._watch is not None:
            self._watch.waiting = True
        try:
            with self.waiting():
                action()
        except RuntimeError as error:
            fault = self._watch.fault if self._watch is not None else None
            if fault is not None:
                raise _lost(fault) from error
            raise LostRankError(f"the connection of the ranks broke at {what}: {_first_line(error)}") from error
        finally:
            if self._watch is not None:
                self._watch.waiting = False
        self.tick()


def _lost(fault: Fault) -> LostRankError:
    return LostRankError(
        f"rank {fault.rank} is lost: {fault.reason}", remedy="remove the cause, then run again with --resume"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def packed(value: Any, device: torch.device | None) -> Any:
    """What another rank can unpack on a device of its own; without a device the value itself."""
    if device is None:
        return value
    stream = BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def unpacked(given: Any, device: torch.device | None) -> Any:
    """What was packed; tensors of the sender's device are now on this rank's own, those of the host on the host."""
    if device is None:
        return given
    places = {f"{device.type}:{index}": str(device) for index in range(_DEVICES)}
    return torch.load(BytesIO(given), map_location=places, weights_only=False)


ALONE = Ranks()
"""A run of one process."""


@contextmanager
def connected(
    world: World,
    kind: str,
    device: torch.device,
    store: Any,
    on_fault: Callable[[Fault], bool] = lambda _: False,
    check: Callable[[], None] = lambda: None,
) -> Generator[Ranks]:
    """Within this context the ranks are connected.

    Args:
        kind: of the devices.
        device: the one of this rank.
        store: the store of all ranks, where this process already has it; None: reach it as the environment says.
        on_fault: told of a rank that is lost; returns whether that ends the run here.
        check: called while this rank waits for the others to come; raises if one of them never will.

    Raises:
        EnvError: the others do not come.
    """
    timeout = timeout_of_environment()
    try:
        if store is None:
            store = _store_of_environment(world)
        run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"slim/{run}", store)
        watching = dist.PrefixStore(f"slim/{run}", _another(store))
        own.set(f"here/{world.rank}", "")
        _await_all(own, world, timeout if world.rank == 0 else _PATIENCE.total_seconds(), check)
        if kind != "cpu":
            getattr(torch, kind).set_device(device)
        dist.init_process_group(
            _BACKENDS[kind],
            store=dist.PrefixStore("torch", own),
            rank=world.rank,
            world_size=world.size,
            timeout=_PATIENCE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise EnvError(
            f"rank {world.rank} of {world.size} cannot be connected with the others: {_first_line(error)}",
            remedy="check MASTER_ADDR and MASTER_PORT, and that all ranks were started",
        ) from error
    watch = Watch(watching, world.rank, world.size, timeout, on_fault)
    watch.start()
    _logger.info("rank %d of %d is connected (%s)", world.rank, world.size, _BACKENDS[kind])
    try:
        yield Ranks(world, watch, own, device)
    finally:
        watch.stop()
        dist.destroy_process_group()


def _await_all(store: Any, world: World, seconds: float, check: Callable[[], None]) -> None:
    """Wait until all ranks have said that they are here: whoever connects waits in code that cannot be interrupted.

    Raises:
        EnvError: one of them does not come.
    """
    ends = time.monotonic() + seconds
    for rank in range(world.size):
        while not store.check([f"here/{rank}"]):
            check()
            if time.monotonic() > ends:
                raise EnvError(
                    f"rank {rank} of {world.size} has not come for {seconds:g} s",
                    remedy="start all ranks, or allow more time with SLIM_RANK_TIMEOUT",
                )
            time.sleep(0.05)


def _store_of_environment(world: World) -> Any:
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    is_host = world.rank == 0 and not hosted
    return dist.TCPStore(address, port, world.size, is_host, timeout=_PATIENCE, wait_for_workers=False)


def _another(store: Any) -> Any:
    """A second connection to a store: on the first one a call would wait for those of other threads."""
    host = "127.0.0.1" if store.host in ("localhost", "") else store.host
    return dist.TCPStore(host, store.port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)

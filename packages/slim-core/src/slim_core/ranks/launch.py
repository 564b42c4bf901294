"""Starting the other ranks of a run on this machine, and seeing them end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from slim_core import errors
from slim_core.errors import EnvError, SlimError
from slim_core.logging import get_logger
from slim_core.ranks.group import LostRankError, Ranks, connected
from slim_core.ranks.watch import Fault
from slim_core.ranks.world import World

__all__ = ["REPORT_VARIABLE", "Again", "started_ranks"]

REPORT_VARIABLE = "SLIM_RANK_REPORT"
"""Names the file in which a rank leaves why it failed."""
_MODULE = "slim_core.rank_process"
_ENDING = 60.0
_KILLING = 3.0
_POLL = 0.2
_logger = get_logger(__name__)
_dist: Any = torch.distributed  # its members have no types


@dataclass(frozen=True)
class Again:
    """How another process makes the same job: ``module:function``, called with plain data."""

    function: str
    arguments: Mapping[str, Any]


class _Children:
    """The processes of ranks 1 and up."""

    def __init__(self, again: Again, size: int, port: int, threads: int | None, folder: Path) -> None:
        self.fault: Fault | None = None
        self._folder = folder
        self._ending = threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        given = json.dumps({"function": again.function, "arguments": again.arguments}).encode() + b"\n"
        for rank in range(1, size):
            environment = self._environment(rank, size, port, threads)
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for rank 0, which ends the others
            )
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(given)  # it stays open: its end tells a rank that this process is gone
                process.stdin.flush()
        self._thread = threading.Thread(target=self._see, name="slim-ranks", daemon=True)
        self._thread.start()

    def _report(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _environment(self, rank: int, size: int, port: int, threads: int | None) -> dict[str, str]:
        own = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            REPORT_VARIABLE: self._report(rank),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        if threads is not None:
            own["OMP_NUM_THREADS"] = threads
        return {**os.environ, **{name: str(value) for name, value in own.items()}}

    def _see(self) -> None:
        """Wait for a process that fails; then the others need not go on."""
        while not self._ending.wait(_POLL):
            for rank, process in self._processes.items():
                if status := process.poll():
                    self.give_up(Fault(rank, _reason(status)))
                    return

    def give_up(self, fault: Fault) -> bool:
        """End all of them: who waits for one that is gone gets an error then."""
        if not self._ending.is_set():
            self.fault = self.fault or fault
            self._kill()
        return True

    def _kill(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [process for process in self._processes.values() if process.poll() is None]
            for process in running:
                process.send_signal(number)
            ends = time.monotonic() + _KILLING
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, ends - time.monotonic()))

    def error(self) -> SlimError | None:
        """Why a rank failed, if one did."""
        for rank in self._processes:
            if (found := _reported(self._report(rank), rank)) is not None:
                return found
        if self.fault is None:
            return None
        return LostRankError(
            f"rank {self.fault.rank} is lost: {self.fault.reason}",
            remedy="remove the cause, then run again with --resume",
        )

    def check(self) -> None:
        """Raises if one of them is gone."""
        if self.fault is not None and (error := self.error()) is not None:
            raise error

    def await_fault(self) -> None:
        """A connection broke: give the process behind it a moment to end."""
        ends = time.monotonic() + 2 * _KILLING
        while self.fault is None and time.monotonic() < ends:
            time.sleep(_POLL)

    def end(self, *, well: bool) -> None:
        """See all of them end."""
        self._ending.set()
        self._thread.join()
        if well:
            ends = time.monotonic() + _ENDING
            for process in self._processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, ends - time.monotonic()))
        self._kill()
        for process in self._processes.values():
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()


def _reason(status: int) -> str:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended early, with status {status}"


def _reported(path: Path, rank: int) -> SlimError | None:
    try:
        given = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    kind = getattr(errors, str(given["type"]), EnvError)
    return kind(f"{given['what']} (found by rank {rank})", where=given["where"], remedy=given["remedy"])


@contextmanager
def started_ranks(again: Again, size: int, kind: str, device: torch.device) -> Generator[Ranks]:
    """Within this context ``size - 1`` processes on this machine carry out the same job, and this one is rank 0.

    On the CPU they share the threads that torch may use here.

    Raises:
        SlimError: what a rank raised, or which rank was lost, and why.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // size) if kind == "cpu" else None
    world = World(0, size, 0, size)
    with tempfile.TemporaryDirectory(prefix="slim-ranks-") as folder, _on_loopback(kind):
        store = _dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
        if share is not None:
            torch.set_num_threads(share)
        children = _Children(again, size, store.port, share, Path(folder))
        _logger.info("%d ranks: this process, and %d that it has started", size, size - 1)
        well = False
        try:
            with connected(world, kind, device, store, children.give_up, children.check) as ranks:
                yield ranks
            well = True
        except LostRankError as error:
            children.await_fault()
            raise (children.error() or error) from error
        except EnvError as error:
            raise (children.error() or error) from error
        finally:
            children.end(well=well)
            torch.set_num_threads(threads)


@contextmanager
def _on_loopback(kind: str) -> Generator[None]:
    """Have gloo talk over the loopback device, whatever the name of this host resolves to."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ or kind != "cpu" or sys.platform not in ("linux", "darwin"):
        yield
        return
    os.environ[name] = "lo" if sys.platform == "linux" else "lo0"
    try:
        yield
    finally:
        del os.environ[name]

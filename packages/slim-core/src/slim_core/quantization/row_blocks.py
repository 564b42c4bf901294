"""Working on a weight a few rows at a time, side by side on the threads that torch may use."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from slim_core.memory import recycled

__all__ = ["decibels", "energy", "for_each_block", "on_one_thread", "rows_per_block", "scratch", "side_by_side"]

_T = TypeVar("_T")
_linalg: Any = torch.linalg  # its members have no types
_CACHE_BYTES = 1 << 21
_DEVICE_BYTES = 1 << 26
_RECYCLED_BYTES = 1 << 17


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for row blocks, kept for the life of the process; each computes alone, so blocks run side by side."""
    return ThreadPoolExecutor(threads, "slim-rows", initializer=torch.set_num_threads, initargs=(1,))


def rows_per_block(width: int, device: torch.device | None) -> int:
    """How many rows of float32 to work on at once: what fits the cache of the CPU, or what keeps a device busy."""
    size = _CACHE_BYTES if device is None or device.type == "cpu" else _DEVICE_BYTES
    return max(1, size // max(width * 4, 1))


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An empty tensor; a large one on the CPU in memory that is used again when it is gone."""
    size = math.prod(shape) * dtype.itemsize
    if size < _RECYCLED_BYTES or (device is not None and device.type != "cpu"):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(recycled(size), dtype=dtype).view(shape)


def for_each_block(work: Callable[[int], _T], starts: range) -> list[_T]:
    """What ``work`` gives for the first row of every block, in their order.

    A single block is computed by one thread too: where it is shared out, threads wait for each other longer than they
    compute, and many times longer where something else keeps the machine busy.
    """
    threads = torch.get_num_threads()
    if threads <= 1:
        return [work(start) for start in starts]
    return list(_pool(threads).map(work, starts))


def on_one_thread(work: Callable[[], _T]) -> _T:
    """What ``work`` gives, computed by one thread: its many small operations would only wait for each other's ends."""
    threads = torch.get_num_threads()
    return work() if threads <= 1 else _pool(threads).submit(work).result()


def side_by_side(jobs: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """What the jobs give, in their order; as many run at a time as torch may use threads, each on one of them."""
    threads = torch.get_num_threads()
    if threads <= 1:
        yield from (job() for job in jobs)
        return
    running: deque[Future[_T]] = deque()
    try:
        for job in jobs:
            running.append(_pool(threads).submit(job))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for left in running:
            left.cancel()


def energy(values: Tensor) -> float:
    """The sum of the squares of a matrix; of its rows in float32, unless that cannot hold them."""
    rows: Tensor = _linalg.vector_norm(values, dim=1).double()
    total = float(rows.square().sum())
    return total if 1e-20 < total < float("inf") else float(values.double().square_().sum())


def decibels(energies: list[tuple[float, float]]) -> float:
    """``10 log10(signal / noise)`` of summed energies; infinite without noise, 0 with nothing but noise."""
    signal, noise = (sum(pair) for pair in zip(*energies, strict=True))
    if not noise > 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else 0.0

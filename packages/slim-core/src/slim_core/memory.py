"""How much memory this process has, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["KEPT_BY_THE_HEAP", "give_back_freed_memory", "peak_memory", "recycled", "resident_memory", "steady_heap"]

# On a CPU, oneDNN compiles kernels for every shape it meets and keeps those of the last 1024 primitives. Beside it
# torch keeps descriptions of the last 1024 products of every thread, 250 KiB of code each. Experts are given another
# number of tokens every time, so these take hundreds of MiB and are of no use. Both limits are read once, at the first
# use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

KEPT_BY_THE_HEAP = 48 << 20
"""What a method that makes and drops many blocks of up to 32 MiB takes beyond those it needs at once.

The C library (glibc) does not return such blocks at once. On a block with matrices of 1024 x 4096, AutoRound took
69 MiB less when it was told to; 48 MiB of that are not in what is predicted besides.
"""

_MMAP_THRESHOLD = -3  # what mallopt calls M_MMAP_THRESHOLD
# Blocks from this size on, and the size that the C library comes to by itself once it has seen large ones.
_LARGE_BLOCK, _LARGEST_THRESHOLD = 4 << 20, 32 << 20

# By the logarithm of their size, mappings that nobody uses; of every size so many bytes, but two at least.
_spares: dict[int, list[mmap.mmap]] = {}
_SPARE_BYTES = 32 << 20


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory()


def peak_memory() -> int:
    """The most bytes of this process that were ever in memory at once.

    From ``VmHWM``: ``ru_maxrss`` would also count the process that started this one.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def recycled(size: int) -> memoryview:
    """Memory of so many bytes, not cleared, that is used again once nobody holds the view any more.

    For large blocks that come and go all the time: on the heap they would lie in one free place after the other, all of
    which stay in memory; and memory fresh from the system is slow.
    """
    level = (size - 1).bit_length()
    try:
        mapping = _spares[level].pop()
    except (KeyError, IndexError):
        mapping = mmap.mmap(-1, 1 << level, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # takes no more than is used
    view = memoryview(mapping)[:size]
    weakref.finalize(view, _keep, level, mapping).atexit = False
    return view


def _keep(level: int, mapping: mmap.mmap) -> None:
    spares = _spares.setdefault(level, [])
    if len(spares) < max(2, _SPARE_BYTES >> level):
        spares.append(mapping)


def give_back_freed_memory() -> None:
    """Return freed heap pages to the system. The C library keeps them otherwise, and resident memory creeps up."""
    _spares.clear()
    if (trim := _of_the_c_library("malloc_trim")) is not None:
        trim(0)


@contextmanager
def steady_heap() -> Generator[None]:
    """Within this context large blocks are returned to the system as soon as they are free, where the C library can be
    told (glibc).

    It keeps them for the next one of their size otherwise; but torch asks for aligned blocks, for which the place of
    the last one is a little too short, so that the heap grows to several times of what is in use. Memory that is always
    fresh costs time: 6 % of the processor time of a calibrated run over blocks of Wan2.1-1.3B.
    """
    if (tell := _of_the_c_library("mallopt")) is not None:
        tell(_MMAP_THRESHOLD, _LARGE_BLOCK)
    try:
        yield
    finally:
        if tell is not None:
            tell(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


@cache
def _of_the_c_library(name: str) -> Any:
    """A function that glibc has; None where the C library has no such function."""
    return getattr(ctypes.CDLL(None), name, None)

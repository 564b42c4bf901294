"""What compiled kernels may take of the memory, each time in a process of its own: limits are read once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from slim_core.memory import give_back_freed_memory, recycled, resident_memory

LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_LIMITS = "import os, slim_core.memory; print(*(os.environ[name] for name in {names}))"
# Weights of 1 MiB times inputs of 1 to 500 rows, as experts are given: outputs are freed at once.
_SHAPES = """
import torch
from slim_core.memory import resident_memory
torch.set_num_threads(1)
weight = torch.ones(512, 1024, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.ones(600, 1024, dtype=torch.bfloat16), weight)
before = resident_memory()
for rows in range(1, 501):
    torch.nn.functional.linear(torch.ones(rows, 1024, dtype=torch.bfloat16), weight)
print(resident_memory() - before)
"""


def _told(code: str, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if name not in LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**own, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_kernels_of_many_shapes_are_not_all_kept() -> None:
    """Without the limits it is 240 MiB and more where the CPU has instructions for bfloat16."""
    assert int(_told(_SHAPES)) < 120 << 20


@pytest.mark.parametrize("name", LIMITS)
def test_a_users_own_limit_stands(name: str) -> None:
    told = _told(_LIMITS.format(names=LIMITS), **{name: "7"}).split()
    assert told == ["7" if limit == name else "64" for limit in LIMITS]


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    give_back_freed_memory()
    first, second = recycled(1 << 20), recycled(1 << 20)
    places = {address(first), address(second)}
    assert len(places) == 2
    del first
    third = recycled(600 << 10)
    assert len(third) == 600 << 10
    assert address(third) in places - {address(second)}
    del third
    small = recycled(1 << 10)  # would leave most of it idle
    assert address(small) not in places


def test_what_is_kept_to_be_used_again_can_be_given_back() -> None:
    view = recycled(64 << 20)
    view[:: 4 << 10] = bytes(len(range(0, 64 << 20, 4 << 10)))
    full = resident_memory()
    del view
    assert resident_memory() > full - (8 << 20)
    give_back_freed_memory()
    assert resident_memory() < full - (56 << 20)


def test_what_is_kept_to_be_used_again_is_bounded() -> None:
    give_back_freed_memory()
    before = resident_memory()
    views = [recycled(8 << 20) for _ in range(10)]
    touched = bytes(len(range(0, 8 << 20, 4 << 10)))
    for number in range(len(views)):
        views[number][:: 4 << 10] = touched
    views.clear()
    recycled(1 << 10)
    assert resident_memory() - before < 60 << 20
    give_back_freed_memory()

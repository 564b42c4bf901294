"""Tensors on disk: the same for whoever holds them, out of memory, gone with the last holder."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.errors import EnvError
from slim_core.runners.spill import AT_LEAST, Spill

LARGE = AT_LEAST // 4


def on_disk(tensor: Tensor) -> bool:
    """Whether its bytes are those of a mapped file without a name."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, rest = line.partition("-")
        if int(begin, 16) <= address < int(rest.partition(" ")[0], 16):
            return ".activations-" in line and "(deleted)" in line
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_stays_what_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(8 * LARGE) % 3).to(dtype).view(8, LARGE)
    before, same = tensor.clone(), tensor
    Spill(tmp_path).hold({"of": [tensor]})
    assert on_disk(same)
    assert torch.equal(same, before)
    assert same.dtype == dtype
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, 3:-2],
        lambda x: x[1:2].expand(5, -1),
        lambda x: x[:, ::2],
    ],
)
def test_shape_and_strides_stay(tmp_path: Path, view: Any) -> None:
    base = torch.randn(16, LARGE)
    tensor, other = view(base), base[2:]
    before, whole, strides = tensor.clone(), base.clone(), tensor.stride()
    spill = Spill(tmp_path)
    spill.hold((tensor,))
    assert on_disk(tensor)
    assert torch.equal(tensor, before)
    assert tensor.stride() == strides
    assert not on_disk(other)
    spill.hold((other,))
    assert torch.equal(other, whole[2:])
    assert base.data_ptr() == other.data_ptr() - 2 * base.stride(0) * base.element_size()


def test_what_a_view_is_a_view_of_goes_along(tmp_path: Path) -> None:
    """A view keeps it, even if nobody else does any more."""
    base = torch.randn(16, LARGE)
    tensor, whole = base.view(4, 4, LARGE), base.clone()
    Spill(tmp_path).hold((tensor,))
    assert on_disk(base)
    assert base.data_ptr() == tensor.data_ptr()
    assert torch.equal(base, whole)


def test_a_view_that_reaches_beyond_its_base_moves_alone(tmp_path: Path) -> None:
    base = torch.randn(20 * LARGE)[4 * LARGE :].detach()  # begins within its storage
    tensor = base.view(16, LARGE)
    before = tensor.clone()
    Spill(tmp_path).hold((tensor,))
    assert on_disk(tensor)
    assert torch.equal(tensor, before)
    assert not on_disk(base)


def test_small_ones_and_others_stay_where_they_are(tmp_path: Path) -> None:
    small, none = torch.randn(4), torch.empty(0)
    Spill(tmp_path).hold([small, none, 3, None, "text", torch.randn(2, device="meta")])
    assert not on_disk(small)


def test_equal_ones_share_if_they_may(tmp_path: Path) -> None:
    first = torch.randn(LARGE * 2)
    second, third, other = first.clone(), first.clone(), first + 1
    spill = Spill(tmp_path)
    spill.hold([first, second, other], share=True)
    spill.hold(third)
    addresses = [tensor.data_ptr() for tensor in (first, second, third, other)]
    assert addresses[0] == addresses[1]
    assert len(set(addresses)) == 3
    assert torch.equal(first, third)


def test_what_is_held_again_is_not_written_again(tmp_path: Path) -> None:
    tensor = torch.randn(LARGE * 2)
    spill = Spill(tmp_path)
    spill.hold(tensor)
    address = tensor.data_ptr()
    tensor += 1  # written through, though its pages may be gone from memory
    before = tensor.clone()
    spill.hold(tensor)
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, before)


def test_space_is_free_when_the_last_holder_is_gone(tmp_path: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    tensor = torch.randn(LARGE * 64)
    spill = Spill(tmp_path)
    spill.hold(tensor)
    assert maps() == 1
    del tensor
    gc.collect()
    assert maps() == 0


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = torch.randn(LARGE * 2)
    with pytest.raises(EnvError, match="activations cannot be kept on disk: No space left on device") as told:
        Spill(tmp_path).hold(tensor)
    assert told.value.where == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_follow_what_is_held(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from slim_core.memory import peak_memory
from slim_core.runners.spill import Spill
spill, held = Spill(Path(sys.argv[1])), []
held.append(torch.ones(8, 1 << 20)); spill.hold(held)
before = peak_memory()
for number in range(12):
    held.append(torch.full((8, 1 << 20), float(number))); spill.hold(held[-1])
print(peak_memory() - before, [float(t[3, 7]) for t in held])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    grown, _, values = run.stdout.partition(" ")
    assert int(grown) < 3 * (32 << 20)
    assert values.strip() == str([1.0, *map(float, range(12))])

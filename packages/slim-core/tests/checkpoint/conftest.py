"""Tensors and a plan of the files they go to, for the writer; runs that write to a target, for staging."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.staging import Staging
from slim_core.checkpoint.writer import Shard, lay_out


@pytest.fixture(scope="session")
def tensors() -> dict[str, Tensor]:
    """Eight of them, one without dimensions, one without elements, one whose memory does not follow its order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 3, generator=generator),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "nothing": torch.empty(0, 4),
        "codes": torch.randint(-128, 128, (7, 3), dtype=torch.int8, generator=generator),
        "b": torch.randn(4, 2, 3, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False]),
        "f8": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "turned": torch.randn(3, 4, generator=generator).T,
    }


@pytest.fixture(scope="session")
def shards(tensors: dict[str, Tensor]) -> list[Shard]:
    """Files of about 60 bytes."""
    return lay_out([TensorMeta(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()], "w", 60)


@pytest.fixture
def origin(tensors: dict[str, Tensor], tmp_path: Path) -> Checkpoint:
    """The tensors as a model has them."""
    folder = tmp_path / "origin"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.fixture
def no_hang() -> Iterator[None]:
    """A deadlock ends the test run instead of stopping it for good, and no background thread outlives its test."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    for thread in threading.enumerate():
        if thread.name == "slim-writer":
            thread.join(10)
            assert not thread.is_alive()


class Runs:
    """What runs do to their target, and what is found there."""

    OLD, NEW = {"old.bin": "old"}, {"0.bin": "new 0", "1.bin": "new 1"}

    @staticmethod
    def hidden(target: Path, suffix: str) -> Path:
        return target.parent / f".{target.name}.slim-{suffix}"

    @staticmethod
    def begin(target: Path, units: int = 2, fingerprint: str = "f", **options: bool) -> Staging:
        staging = Staging(target, fingerprint, **options)
        for number in range(len(staging.finished), units):
            (staging.folder / f"{number}.bin").write_text(f"new {number}")
            staging.record(f"unit {number}", {"seconds": 1.5})
        return staging

    @staticmethod
    def die(staging: Staging) -> None:
        """What the end of the process does: locks go, files stay."""
        staging._unlock()

    @staticmethod
    def listing(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    @staticmethod
    def fill(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "old.bin").write_text("old")
        return folder

    @staticmethod
    def content(folder: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir()}

    @staticmethod
    def refuse(number: int) -> Callable[..., Any]:
        def fail(*_args: Any, **_options: Any) -> Any:
            raise OSError(number, os.strerror(number))

        return fail


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


@pytest.fixture
def logs_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("slim"), "propagate", True)

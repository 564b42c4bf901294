"""What the tests of all packages share."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # test workers share the cores, so each computes on one thread


@pytest.fixture(scope="session")
def content() -> Callable[..., dict[str, bytes]]:
    """``content(folder, *skipped)``: all files of an output but those that tell of time, and those named."""

    def read(folder: Path, *skipped: str) -> dict[str, bytes]:
        skipped = (*skipped, "report.json", "report.html")
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skipped)
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return read


@pytest.fixture
def all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are kept at every boundary of units, whatever that costs."""
    monkeypatch.setattr("slim_core.runners.boundaries._SHARE", float("inf"))


@pytest.fixture(scope="session")
def ending_at() -> Callable[[str], AbstractContextManager[None]]:
    """``with ending_at("model.layers.1"):``: a run that dies when that unit is done and not noted yet, but all
    units ahead of it are."""
    from slim_core.runners.ledger import Ledger

    @contextmanager
    def dying(unit: str) -> Generator[None]:
        note, noted = Ledger.note, list[str]()

        def failing(self: Ledger, name: str, given: Any) -> None:
            if name != unit:
                noted.append(name)
                note(self, name, given)
                return
            ends = time.monotonic() + 20
            while not set(noted) <= set(self._staging.finished) and time.monotonic() < ends:
                time.sleep(0.01)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "note", failing)
            with pytest.raises(KeyboardInterrupt):
                yield

    return dying


@pytest.fixture
def check_resuming(
    content: Callable[..., dict[str, bytes]],
    ending_at: Callable[[str], AbstractContextManager[None]],
    all_kept: None,
    tmp_path: Path,
) -> Callable[[Callable[..., Any]], None]:
    """``check_resuming(run)``: runs ``run(save_path, resume=...)`` that die in any unit but the first that samples run
    through end like one that does not, and none of them runs a finished unit again."""

    def check(run: Callable[..., Any]) -> None:
        whole = run(tmp_path / "whole", resume=False)
        units = [unit.name for unit in whole.units]
        running = [name for name in units if name not in ("prologue", "epilogue")]
        for left, unit in enumerate(reversed(running[1:]), 1):
            with ending_at(unit):
                run(tmp_path / unit, resume=False)
            result = run(tmp_path / unit, resume=True)
            assert result.block_forwards * len(running) == whole.block_forwards * left, unit
            assert content(tmp_path / unit) == content(tmp_path / "whole"), unit
            assert [record.name for record in result.units] == units, unit

    return check

"""A disk that is too small is refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slim_core.checkpoint.staging import partial_folder
from slim_core.commands import quantize as quantize_command
from slim_core.errors import EnvError
from slim_core.processors.linear_quant import LinearQuant
from slim_core.runners import boundaries
from slim_core.runners.disk import DiskNeed, disk_problem, has_room_to_keep
from slim_core.service import QuantRequest

ModelFolder = Any
Quantize = Any


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=nbytes, f_frsize=1))


def test_too_small(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(EnvError, match=r"needs about .* of disk space, and 1000 B are free.*--force"):
        quantize(model_folder("llama"), tmp_path / "deep" / "out", "static", force=False)
    assert list(tmp_path.iterdir()) == []
    quantize(model_folder("llama"), tmp_path / "out", "dynamic", force=True)


def test_what_an_interrupted_run_has_written_counts(
    killed: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed(LinearQuant, "model.layers.2"):
        quantize(model_folder("llama"), tmp_path / "out", "dynamic")
    partial = partial_folder(tmp_path / "out")
    taken = sum(path.stat().st_blocks * 512 for path in partial.iterdir())
    assert taken > 0
    free(monkeypatch, 1000)
    assert disk_problem(DiskNeed(taken, 600, 400), tmp_path / "out", partial) is None
    assert disk_problem(DiskNeed(taken, 600, 401), tmp_path / "out", partial) is not None


def test_what_is_kept_for_resuming_is_no_condition(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = DiskNeed(1000, 100, 10, kept=500)
    for nbytes, runs, keeps in ((1109, False, False), (1110, True, False), (1609, True, False), (1610, True, True)):
        free(monkeypatch, nbytes)
        assert (disk_problem(need, tmp_path / "out", tmp_path / "no") is None) == runs
        assert has_room_to_keep(need, tmp_path / "out", tmp_path / "no") == keeps
    free(monkeypatch, 1000)
    begun: list[Any] = []
    monkeypatch.setattr(boundaries.Boundaries, "decide", begun.append)
    quantize(model_folder("llama"), tmp_path / "out", "static", force=True)
    assert begun == []


def test_a_dry_run_says_it(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 1000)
    recipe = Path(__file__).parents[3] / "examples" / "w8a8-dynamic.yaml"
    quantize_command(
        QuantRequest(
            model_path=model_folder("llama"),
            save_path=tmp_path / "out",
            model_type="m",
            device="cpu",
            config_path=recipe,
            dry_run=True,
        )
    )
    shown = capsys.readouterr().out
    assert "disk       about 1." in shown
    assert "The run itself would be refused" in shown
    assert "1000 B are free" in shown
    assert list(tmp_path.iterdir()) == []

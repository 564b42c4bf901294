"""Runs that go on from the activations that an interrupted one has kept, pictures' among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.evaluation.report import write
from slim_core.runners import boundaries
from slim_core.runners.ledger import Ledger

OTHERS = ("qwen2_5_vl", "internvl", "gemma3", "mistral3")


@pytest.mark.parametrize("family", ["qwen3_vl_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_towers_and_blocks_that_are_finished_are_not_run_again(
    family: str,
    vlm_folder: Callable[..., Path],
    quantize: Callable[..., Any],
    rules: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever unit the run dies in. What a tower makes may be added to the hidden states of several blocks."""
    monkeypatch.setattr(write, "draw_plots", lambda _data: {})
    monkeypatch.setattr(boundaries, "_SHARE", float("inf"))
    model, process = vlm_folder(family), [rules["static"]]
    whole = quantize(model, tmp_path / "whole", process=process)
    units = [unit.name for unit in whole.units]
    running = [name for name in units if name not in ("prologue", "epilogue")]
    note = Ledger.note
    for left, unit in enumerate(reversed(running[1:]), 1):

        def failing(self: Ledger, name: str, given: Any, dies: str = unit) -> None:
            if name == dies:
                raise KeyboardInterrupt
            note(self, name, given)

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "note", failing)
            with pytest.raises(KeyboardInterrupt):
                quantize(model, tmp_path / unit, process=process)
        result = quantize(model, tmp_path / unit, process=process, options={"resume": True})
        assert result.block_forwards * len(running) == whole.block_forwards * left, unit
        assert contents(tmp_path / unit) == contents(tmp_path / "whole"), unit
        assert [record.name for record in result.units] == units


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

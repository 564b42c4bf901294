"""Runs that go on from the activations that an interrupted one has kept, pictures' among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.evaluation.report import write

OTHERS = ("qwen2_5_vl", "internvl", "gemma3", "mistral3")


@pytest.mark.parametrize("family", ["qwen3_vl_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_towers_and_blocks_that_are_finished_are_not_run_again(
    family: str,
    vlm_folder: Callable[..., Path],
    quantize: Callable[..., Any],
    rules: dict[str, Any],
    check_resuming: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a tower makes may be added to the hidden states of several blocks."""
    monkeypatch.setattr(write, "draw_plots", lambda _data: {})
    model = vlm_folder(family)
    check_resuming(lambda out, **options: quantize(model, out, process=[rules["static"]], options=options))

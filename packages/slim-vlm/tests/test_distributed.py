"""A vision-language model on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.evaluation.report import write


def test_two_ranks_write_what_one_writes(
    vlm_folder: Callable[..., Path],
    quantize: Callable[..., Any],
    rules: dict[str, Any],
    tmp_path: Path,
    content: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tower and the decoder, whatever the recipe says of the runner; each rank prepares its own pictures."""
    monkeypatch.setattr(write, "draw_plots", lambda _data: {})
    process = [{"type": "flex_smooth_quant"}, rules["static"]]
    model = vlm_folder("qwen2_5_vl")
    one = quantize(model, tmp_path / "1", process=process)
    two = quantize(model, tmp_path / "2", process=process, options={"device": "cpu:0,1"})
    assert (len(one.rank_peak_bytes), len(two.rank_peak_bytes)) == (0, 2)
    assert one.samples == two.samples
    assert one.block_forwards == two.block_forwards
    assert content(tmp_path / "1") == content(tmp_path / "2")

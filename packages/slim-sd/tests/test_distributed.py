"""A diffusion transformer on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.evaluation.report import write
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import QuantRequest
from slim_sd.service import DiffusionService

WEIGHT: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
SETTINGS = {"prompt": "a red fox", "size": "64*64", "frame_num": 5, "sample_steps": 3}


@pytest.mark.parametrize("name", ["wan2_1_t2v", "wan2_2_t2v"])
def test_two_ranks_write_what_one_writes(
    name: str, pipeline_folder: Callable[..., Path], content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transformer, and two in one folder; their calls are captured by the first rank alone."""
    monkeypatch.setattr(write, "draw_plots", lambda _data: {})
    spec = {
        "process": [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": WEIGHT}}],
        "multimodal_sd_config": {"dump_config": {}, "model_config": SETTINGS},
    }
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})
    results = [
        DiffusionService().quantize(
            QuantRequest(
                model_path=pipeline_folder(name), save_path=tmp_path / device, model_type="tiny", device=device
            ),
            recipe,
            SilentProgress(),
        )
        for device in ("cpu", "cpu:0,1")
    ]
    one, two = results
    assert (len(one.rank_peak_bytes), len(two.rank_peak_bytes)) == (0, 2)
    assert one.samples == two.samples > 1
    assert content(tmp_path / "cpu") == content(tmp_path / "cpu:0,1")

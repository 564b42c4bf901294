"""Runs that go on from the activations that an interrupted one has kept; those of diffusion models wait on disk."""

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
WAN = {"prompt": "a red fox", "size": "64*64", "frame_num": 5, "sample_steps": 3}
OTHER = {"prompt": "a red fox", "height": 32, "width": 32, "num_inference_steps": 2}
OTHERS = ("qwen_image", "sd3", "hunyuan_video")


@pytest.mark.parametrize(
    "name", ["wan2_1_t2v", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_blocks_that_are_finished_are_not_run_again(
    name: str,
    pipeline_folder: Callable[..., Path],
    check_resuming: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some have a second list of blocks, which begins with what the first has made."""
    monkeypatch.setattr(write, "draw_plots", lambda _data: {})
    model, settings = pipeline_folder(name), WAN if name.startswith("wan") else OTHER
    settings = settings | ({"num_frames": 5} if name == "hunyuan_video" else {})
    dump = {"dump_data_dir": str(tmp_path / "calls")}
    spec = {
        "process": [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": WEIGHT}}],
        "multimodal_sd_config": {"dump_config": dump, "model_config": settings},
    }
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})

    def run(out: Path, **options: Any) -> Any:
        request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True, **options)
        return DiffusionService().quantize(request, recipe, SilentProgress())

    check_resuming(run)

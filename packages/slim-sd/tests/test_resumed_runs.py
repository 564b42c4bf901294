"""Runs that go on from the activations that an interrupted one has kept; those of diffusion models wait on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.evaluation.report import write
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners import boundaries
from slim_core.runners.ledger import Ledger
from slim_core.service import QuantRequest
from slim_sd.service import DiffusionService

WEIGHT: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
WAN = {"prompt": "a red fox", "size": "64*64", "frame_num": 5, "sample_steps": 3}
OTHERS = ("qwen_image", "sd3", "hunyuan_video")
OTHER = {"prompt": "a red fox", "height": 32, "width": 32, "num_inference_steps": 2}


@pytest.mark.parametrize(
    "name", ["wan2_1_t2v", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_blocks_that_are_finished_are_not_run_again(
    name: str, pipeline_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever block the run dies in; some have a second list of blocks, which begins with what the first has made."""
    monkeypatch.setattr(write, "draw_plots", lambda _data: {})
    monkeypatch.setattr(boundaries, "_SHARE", float("inf"))
    model, settings = pipeline_folder(name), WAN if name.startswith("wan") else OTHER
    settings = settings | ({"num_frames": 5} if name == "hunyuan_video" else {})

    def run(out: Path, **options: Any) -> Any:
        spec = {
            "process": [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": WEIGHT}}],
            "multimodal_sd_config": {
                "dump_config": {"dump_data_dir": str(tmp_path / "calls")},
                "model_config": settings,
            },
        }
        recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})
        request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True, **options)
        return DiffusionService().quantize(request, recipe, SilentProgress())

    whole = run(tmp_path / "whole")
    running = [unit.name for unit in whole.units if unit.name not in ("prologue", "epilogue")]
    note = Ledger.note
    for left, unit in enumerate(reversed(running[1:]), 1):

        def failing(self: Ledger, name: str, given: Any, dies: str = unit) -> None:
            if name == dies:
                raise KeyboardInterrupt
            note(self, name, given)

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "note", failing)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / unit)
        result = run(tmp_path / unit, resume=True)
        assert result.block_forwards * len(running) == whole.block_forwards * left, unit
        assert contents(tmp_path / unit) == contents(tmp_path / "whole"), unit


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell of time."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

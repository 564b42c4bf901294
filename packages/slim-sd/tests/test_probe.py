"""``--probe`` of diffusion models: time is known once calls were captured, of each transformer by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.phases import Phase
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners import probe as probing
from slim_core.runners.plan import Plan
from slim_core.service import QuantRequest
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]
WEIGHT: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
SETTINGS: dict[str, dict[str, Any]] = {
    "wan2_1_t2v": {"size": "64*64", "frame_num": 5, "sample_steps": 3},
    "wan2_2_t2v": {"size": "64*64", "frame_num": 5, "sample_steps": 3},
    "flux": {"height": 32, "width": 32, "num_inference_steps": 2},
}


def plans_of(model: Path, out: Path, name: str, *, only_plan: bool = False, **options: Any) -> list[Plan]:
    spec = {
        "process": [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": WEIGHT}, "include": ["*"]}],
        "multimodal_sd_config": {"model_config": {"prompt": "a red fox", **SETTINGS[name]}},
    }
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})
    request = QuantRequest(
        model_path=model, save_path=out, model_type="tiny", device="cpu", overwrite=True, probe=True, **options
    )
    plans: list[Plan] = []
    if only_plan:
        plans.append(DiffusionService().plan(request, recipe))
    else:
        DiffusionService().quantize(request, recipe, SilentProgress(), plans.append)
    return [plans[0], *plans[0].others]


@pytest.mark.parametrize("name", SETTINGS)
def test_known_once_calls_were_captured(
    name: str, pipeline_folder: PipelineFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> None:
    monkeypatch.setattr(probing, "_WRITTEN", 1 << 20)
    model, out = pipeline_folder(name), tmp_path / "out"

    def weights() -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}

    before = plans_of(model, out, name)
    assert {plan.time.unknown for plan in before if plan.time} == {"its calibration inputs were not captured yet"}
    written = weights()
    planned = plans_of(model, out, name, only_plan=True)
    after = plans_of(model, out, name)
    assert weights() == written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(after) == len(planned) == (2 if name == "wan2_2_t2v" else 1)
    for plan in (*planned, *after):
        assert plan.time is not None
        assert not plan.time.unknown
        assert plan.time.parts[Phase.FORWARDS] > 0
    told = [json.loads(path.read_text("utf-8"))["predicted_seconds"] for path in out.rglob("report.json")]
    assert sorted(told) == sorted(plan.time.seconds for plan in after if plan.time is not None)

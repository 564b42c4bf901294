"""Scoring: both runs begin with the same noise, and what is compared is what the files compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from slim_core.errors import InvalidModelError, SchemaValidateError, SecurityError
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import EvalRequest, QuantRequest, load_service
from slim_sd.pipeline.generation import planned_generation
from slim_sd.pipeline.sampling import Sampler
from slim_sd.recipe import SpecSd
from slim_sd.score import DiffusionScores, StepScore
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]
INT8: dict[str, Any] = {"dtype": "int8", "symmetric": True, "method": "minmax"}
SETTINGS: dict[str, Any] = {"prompt": "a red fox", "size": "64*64", "frame_num": 5, "sample_steps": 3}


def recipe(settings: dict[str, Any]) -> Any:
    qconfig = {"act": INT8 | {"scope": "per_token"}, "weight": INT8 | {"scope": "per_channel"}}
    spec = {
        "process": [{"type": "linear_quant", "qconfig": qconfig, "exclude": ["*ffn.2*"]}],
        "multimodal_sd_config": {"model_config": settings},
    }
    return recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})


def quantize(model: Path, out: Path, settings: dict[str, Any]) -> Path:
    request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu")
    DiffusionService().quantize(request, recipe(settings), SilentProgress())
    return out


def score(model: Path, quantized: Path | None, **options: Any) -> DiffusionScores:
    request = EvalRequest(model_path=model, quantized=quantized, device="cpu", **options)
    return DiffusionService().evaluate(request, SilentProgress())  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def quantized(pipeline_folder: PipelineFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(pipeline_folder("wan2_1_t2v"), tmp_path_factory.mktemp("quantized") / "out", SETTINGS)


class NaiveLinear(nn.Module):
    """Integer arithmetic, one token after the other."""

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.codes = tensors[f"{name}.weight"].double()
        self.scale = tensors[f"{name}.weight_scale"].double()
        self.bias = tensors[f"{name}.bias"].double()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.double().abs().amax(-1, keepdim=True) / 127
        codes = (x.double() / scale).round().clamp(-128, 127)
        return (codes @ self.codes.T * scale * self.scale.T + self.bias).to(x.dtype)


def test_scores_are_those_of_a_naive_simulation(pipeline_folder: PipelineFolder, quantized: Path) -> None:
    model = pipeline_folder("wan2_1_t2v")
    found = score(model, quantized)
    asked = recipe(SETTINGS)
    generation = planned_generation(model, asked, asked.spec(SpecSd))
    (path,) = quantized.glob("*.safetensors")
    tensors = load_file(path)
    with Sampler(model, generation, torch.device("cpu")) as sampler:
        original = sampler.generate()
        streamed = sampler.models["transformer"]
        for unit in streamed.units:
            for info in unit.linears:
                if f"{info.prefix}.weight_scale" in tensors:
                    streamed.module.set_submodule(info.name, NaiveLinear(tensors, info.prefix))
        other = sampler.generate()
    signal, noise = original.double().square().mean(), (original - other).double().square().mean()
    assert found.steps[-1].sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.5)
    span = float(original.max() - original.min())
    assert found.steps[-1].psnr_db == pytest.approx(10 * math.log10(span**2 / noise), abs=0.5)
    assert found.layers == 18


def test_steps_frames_and_the_report(pipeline_folder: PipelineFolder, quantized: Path, tmp_path: Path) -> None:
    found = score(pipeline_folder("wan2_1_t2v"), quantized, report=tmp_path / "report")
    assert len(found.steps) == 3
    assert found.steps[0].sqnr_db > found.steps[-1].sqnr_db > 10  # errors add up
    assert found.frames == 5
    assert found.psnr_db is not None
    assert found.psnr_db > 15
    with Image.open(tmp_path / "report" / "first_frames.png") as picture:
        assert picture.size == (2 * 64 + 8, 64)
    told = json.loads((tmp_path / "report" / "eval.json").read_text())
    assert told["steps"] == found.as_json()["steps"]
    assert told["generation"]["prompt"] == "a red fox"
    page = (tmp_path / "report" / "eval.html").read_text()
    assert "first_frames.png" in page
    assert f"{found.psnr_db:.1f}" in page
    with pytest.raises(SecurityError, match="not empty"):
        score(pipeline_folder("wan2_1_t2v"), quantized, report=tmp_path / "report")


def test_another_prompt_and_another_recipe(pipeline_folder: PipelineFolder, quantized: Path, tmp_path: Path) -> None:
    model = pipeline_folder("wan2_1_t2v")
    one = score(model, quantized)
    assert score(model, quantized) == one
    assert score(model, quantized, prompt="a grey wolf in the rain") != one
    path = tmp_path / "short.yaml"
    path.write_text(
        "apiversion: multimodal_sd_modelslim_v1\nspec: {multimodal_sd_config: {model_config: {prompt: a red fox, "
        'size: "64*64", frame_num: 1, sample_steps: 2}}}\n'
    )
    other = score(model, quantized, config_path=path)
    assert (len(other.steps), other.frames) == (2, 1)


@pytest.mark.parametrize("name", ["wan2_2_t2v", "flux", "sd3", "hunyuan_video", "qwen_image"])
def test_other_pipelines(
    pipeline_folder: PipelineFolder, tmp_path: Path, name: str, tiny_pipelines: ModuleType
) -> None:
    wan = name.startswith("wan")
    settings = SETTINGS if wan else {"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 2}
    if name == "hunyuan_video":
        settings = settings | {"num_frames": 5}
    model = pipeline_folder(name)
    found = score(model, quantize(model, tmp_path / "out", settings), report=tmp_path / "report")
    assert len(found.steps) == (3 if wan else 2)
    assert all(step.sqnr_db > 5 for step in found.steps)
    assert found.psnr_db is not None
    assert (tmp_path / "report" / "first_frames.png").exists()


def test_what_is_missing_or_does_not_fit(pipeline_folder: PipelineFolder, quantized: Path, tmp_path: Path) -> None:
    model = pipeline_folder("wan2_1_t2v")
    with pytest.raises(SchemaValidateError, match="comparing what its quantized files generate"):
        score(model, None)
    with pytest.raises(SchemaValidateError, match="not scored on text"):
        score(model, quantized, text=tmp_path / "text")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(SchemaValidateError, match="nothing says what to generate"):
        score(model, bare)
    with pytest.raises(InvalidModelError, match="linears that the model does not have"):
        score(pipeline_folder("wan2_1_t2v", num_layers=1), quantized)


def test_equal_runs_are_infinitely_near() -> None:
    scores = DiffusionScores((StepScore(math.inf, math.inf),), math.inf, 1, 0)
    assert scores.table()[1][0] == ["1", "equal", "equal"]
    assert scores.as_json()["steps"] == [{"sqnr_db": None, "psnr_db": None}]


def test_the_service_is_that_of_the_entry_point() -> None:
    from importlib.metadata import entry_points

    (point,) = entry_points(group="slim.services", name="multimodal_sd_modelslim_v1")
    assert isinstance(load_service(point), DiffusionService)

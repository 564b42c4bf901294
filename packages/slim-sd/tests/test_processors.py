"""Every processor of the protocol on diffusion transformers: runs, files, and what they gain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan import Plan
from slim_core.runners.simulated import simulated
from slim_core.savers.mindie_folder import open_quantized
from slim_core.service import QuantRequest
from slim_sd.captured.recorder import forward_parameters
from slim_sd.captured.records import open_records
from slim_sd.loading import open_transformer
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]
CPU = torch.device("cpu")
TOKEN: dict[str, Any] = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
TENSOR: dict[str, Any] = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
CHANNEL: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
MXFP8: dict[str, Any] = {"scope": "per_block", "dtype": "mxfp8", "symmetric": True, "method": "minmax"}
MXFP4: dict[str, Any] = {"scope": "per_block", "dtype": "mxfp4", "symmetric": True, "method": "minmax"}


def linear(act: dict[str, Any], weight: dict[str, Any] = CHANNEL, **more: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, **more}


PROCESSES: dict[str, list[dict[str, Any]]] = {
    "dynamic": [linear(TOKEN)],
    "static": [linear(TENSOR)],
    "histogram": [linear(TENSOR | {"method": "histogram"})],
    "ssz": [linear(TOKEN, CHANNEL | {"method": "ssz"})],
    "gptq": [linear(TOKEN, CHANNEL | {"method": "gptq"})],
    "autoround": [
        {
            "type": "autoround_quant",
            "iters": 2,
            "strategies": [{"qconfig": {"act": TOKEN, "weight": CHANNEL | {"method": "autoround"}}}],
        }
    ],
    "iter_smooth": [{"type": "iter_smooth"}, linear(TENSOR)],
    "smooth_quant": [{"type": "smooth_quant"}, linear(TENSOR)],
    "flex_smooth_quant": [{"type": "flex_smooth_quant"}, linear(TOKEN)],
    "mxfp8": [linear(MXFP8, MXFP8)],
    "mxfp4": [linear(MXFP4, MXFP4)],
    "group": [
        {
            "type": "group",
            "configs": [
                linear(TENSOR, include=["*attn*"]),
                linear(TOKEN, include=["*ff*"]),
            ],
        }
    ],
}
SETTINGS: dict[str, Any] = {"prompt": "a red fox"}
WAN = SETTINGS | {"size": "64*64", "frame_num": 5, "sample_steps": 2}
FLUX = SETTINGS | {"height": 32, "width": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where captures of this module lie."""
    return tmp_path_factory.mktemp("kept")


def quantize(
    model: Path, out: Path, kept: Path, settings: dict[str, Any], process: list[dict[str, Any]], **spec: Any
) -> Plan:
    request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True)
    config = {"dump_config": {"dump_data_dir": str(kept)}, "model_config": settings}
    content = {"process": process, "multimodal_sd_config": config, **spec}
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": content})
    plans: list[Plan] = []
    DiffusionService().quantize(request, recipe, SilentProgress(), plans.append)
    return plans[0]


def output_sqnr(folder: Path, out: Path, capture: Path) -> float:
    """Of the whole transformer with the written layers in it, over all captured calls, in decibels."""
    model = open_transformer(folder, "transformer")
    quantized = open_quantized(out)
    names = [name for unit in model.units for name in unit.parameters]
    linears = [info for unit in model.units for info in unit.linears]
    layers = {info.name: layer for info in linears if (layer := quantized.layer(info.prefix)) is not None}
    assert layers
    records = open_records(
        capture, parameters=forward_parameters(model.module), fingerprint=None, settings=None, config=model.config
    )
    calls = [{key: value for key, value in call.items() if value is not None} for call in records]
    model.load(names, CPU)
    signal = noise = 0.0
    with torch.no_grad():
        for call in calls:
            plain = model.module(**call)[0].double()
            with simulated(model.module, layers, CPU):
                other = model.module(**call)[0].double()
            signal += float(plain.square().sum())
            noise += float((plain - other).square().sum())
    return 10 * math.log10(signal / noise)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("name", "settings"), [("wan2_1_t2v", WAN), ("flux", FLUX)], ids=["wan", "flux"])
def test_every_processor(
    pipeline_folder: PipelineFolder, tmp_path: Path, kept: Path, name: str, settings: dict[str, Any], process: str
) -> None:
    sizes = {"ffn_dim": 128} if name.startswith("wan") else {}
    model, captures = pipeline_folder(name, **sizes), kept / name
    if not (captures / "calib_data.pth").exists():
        quantize(model, tmp_path / "first", captures, settings, PROCESSES["static"])
    plan = quantize(model, tmp_path / "out", captures, settings, PROCESSES[process])
    (path,) = (tmp_path / "out").glob("quant_model_description*.json")
    types = set(json.loads(path.read_text()).values())
    assert plan.assignments
    assert types - {"FLOAT"}
    at_least = 8 if process == "mxfp4" else 20
    assert output_sqnr(model, tmp_path / "out", captures / "calib_data.pth") > at_least

"""NaN in the middle of a run, dead channels and zeros: every method, through a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

ModelFolder = Callable[..., Path]
State = dict[str, Tensor]


def side(dtype: str, scope: str, method: str = "minmax", symmetric: bool = True, **ext: Any) -> dict[str, Any]:
    return {"dtype": dtype, "scope": scope, "method": method, "symmetric": symmetric, "ext": ext}


def linear_quant(weight: dict[str, Any], act: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"weight": weight} | ({} if act is None else {"act": act})}


def autoround(weight: dict[str, Any], act: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "autoround_quant", "iters": 1, "strategies": [{"qconfig": linear_quant(weight, act)["qconfig"]}]}


STATIC, TOKEN, TOKEN_4 = (
    side("int8", "per_tensor", symmetric=False),
    side("int8", "per_token"),
    side("int4", "per_token"),
)
CHANNEL, CHANNEL_4 = side("int8", "per_channel"), side("int4", "per_channel")
W8A8 = linear_quant(CHANNEL, STATIC)
OBSERVING: dict[str, list[dict[str, Any]]] = {
    "static": [W8A8],
    "mean": [linear_quant(CHANNEL, side("int8", "per_tensor", symmetric=False, aggregation_type="mean"))],
    "histogram": [linear_quant(CHANNEL, side("int8", "per_tensor", "histogram", symmetric=False))],
    "pd_mix": [linear_quant(CHANNEL, side("int8", "pd_mix", symmetric=False))],
    "w8a8s": [linear_quant(side("int8", "per_channel", "sparse"), STATIC)],
    "ssz weighted": [linear_quant(side("int8", "per_channel", "ssz", weighted=True), STATIC)],
    "ssz weighted w4a8": [linear_quant(side("int4", "per_channel", "ssz", weighted=True), TOKEN)],
    "gptq": [linear_quant(side("int4", "per_channel", "gptq"), TOKEN)],
    "gptq groups": [linear_quant(side("int4", "per_group", "gptq", False, group_size=16), TOKEN_4)],
    "float_sparse": [{"type": "float_sparse"}],
    "autoround static": [autoround(side("int8", "per_channel", "autoround"), STATIC)],
    "autoround w4a8": [autoround(side("int4", "per_group", "autoround", group_size=16), TOKEN)],
    "autoround w4a4": [autoround(side("int4", "per_channel", "autoround", False), TOKEN_4)],
    "dynamic_cache": [{"type": "dynamic_cache"}],
    "fa3_quant": [{"type": "fa3_quant"}],
    "flex_smooth_quant": [{"type": "flex_smooth_quant"}, W8A8],
    "smooth_quant": [{"type": "smooth_quant"}, W8A8],
    "iter_smooth": [{"type": "iter_smooth"}, W8A8],
}
BLIND: dict[str, list[dict[str, Any]]] = {
    "dynamic": [linear_quant(CHANNEL, TOKEN)],
    "ssz": [linear_quant(side("int4", "per_channel", "ssz"), TOKEN)],
    "w4a16 groups": [linear_quant(side("int4", "per_group", "ssz", group_size=16))],
    "w4a4": [linear_quant(side("int4", "per_channel", symmetric=False), TOKEN_4)],
    "fp8": [linear_quant(side("fp8_e4m3", "per_channel"), side("fp8_e4m3", "per_token"))],
    "mxfp8": [linear_quant(side("mxfp8", "per_block", "mse_round"), side("mxfp8", "per_block"))],
    "mxfp4": [linear_quant(side("mxfp4", "per_block", "ceil_x", enable_search=True), side("mxfp4", "per_block"))],
    "fouroversix": [linear_quant(side("mxfp4", "per_block", "fouroversix"), side("mxfp8", "per_block"))],
    "dualscale": [
        linear_quant(
            side("mxfp4", "dual_scale", "dualscale", dual_block_size=32), side("mxfp4", "dual_scale", "dualscale")
        )
        | {"exclude": ["*.down_proj"]}
    ],
}


def quantize(model: Path, out: Path, process: list[dict[str, Any]], dataset: Path) -> None:
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": str(dataset)}
    LlmService().quantize(
        QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True),  # pyright: ignore
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
        SilentProgress(),
    )


def edited(model: Path, folder: Path, edit: Callable[[State], None]) -> Path:
    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def nan_inside(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second block computes NaN, though no linear of it holds any."""

    def edit(state: State) -> None:
        state["model.layers.1.input_layernorm.weight"][3] = float("nan")

    return edited(model_folder("qwen3"), tmp_path_factory.mktemp("nan") / "model", edit)


@pytest.fixture(scope="module")
def zeros_inside(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model with dead rows, dead columns, a linear of zeros, and one that is only given zeros."""

    def edit(state: State) -> None:
        for name, tensor in state.items():
            if name.endswith("proj.weight") and ".layers.1." in name:
                tensor[2], tensor[:, 3] = 0, 0
        state["model.layers.2.mlp.down_proj.weight"].zero_()
        state["model.layers.0.input_layernorm.weight"].zero_()

    return edited(model_folder("qwen3", torch.float16), tmp_path_factory.mktemp("zeros") / "model", edit)


@pytest.fixture(scope="module")
def unseen_inputs(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose largest weights stand where the calibration set shows nothing."""

    def edit(state: State) -> None:
        for name, tensor in state.items():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                tensor[5] = 0
            elif name.endswith(tuple(f"{leaf}_proj.weight" for leaf in ("q", "k", "v", "gate", "up"))):
                tensor[:, 5] *= 20

    return edited(model_folder("qwen3"), tmp_path_factory.mktemp("unseen") / "model", edit)


@pytest.mark.parametrize("method", OBSERVING)
def test_nan_in_the_middle_of_a_run(nan_inside: Path, dataset: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(InvalidModelError, match="NaN or infinity") as raised:
        quantize(nan_inside, tmp_path / "out", OBSERVING[method], dataset)
    assert str(raised.value.where).startswith("model.layers.1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "float_sparse", "autoround w4a8", *BLIND])
def test_nan_in_a_bias(model_folder: ModelFolder, dataset: Path, tmp_path: Path, method: str) -> None:
    """A bias is written as it is, and shows in no activation before the linear that has it: it is looked at itself."""

    def edit(state: State) -> None:
        state["model.layers.2.self_attn.q_proj.bias"][3] = float("nan")

    model = edited(model_folder("qwen2"), tmp_path / "model", edit)
    process = (OBSERVING | BLIND)[method]
    with pytest.raises(InvalidModelError, match="NaN or infinity") as raised:
        quantize(model, tmp_path / "out", process, dataset)
    if method in BLIND:
        assert raised.value.where == "model.layers.2.self_attn.q_proj.bias"
        assert "the bias holds NaN or infinity in row 3" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [*OBSERVING, *BLIND])
def test_zeros_in_weights_and_activations(zeros_inside: Path, dataset: Path, tmp_path: Path, method: str) -> None:
    quantize(zeros_inside, tmp_path / "out", (OBSERVING | BLIND)[method], dataset)
    assert verify_folder(tmp_path / "out", zeros_inside).problems == []
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point():
                assert bool(tensor.float().isfinite().all()), name


@pytest.mark.parametrize("method", ["ssz weighted", "ssz weighted w4a8", "gptq", "gptq groups", "autoround w4a8"])
def test_weights_of_unseen_inputs_are_not_given_up(
    unseen_inputs: Path, dataset: Path, tmp_path: Path, method: str
) -> None:
    """What calibration does not see may come in service; `slim verify` tells weights that were cut off."""
    quantize(unseen_inputs, tmp_path / "out", OBSERVING[method], dataset)
    assert verify_folder(tmp_path / "out", unseen_inputs).problems == []

"""The ascendv1 format: its description, its parameters, and folders that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta
from slim_core.errors import InvalidModelError, SchemaValidateError, UnsupportedError, VerificationError
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import DynamicInt, StaticInt8, WeightOnlyInt
from slim_core.recipe import recipe_from_dict
from slim_core.savers.ascendv1 import AscendV1Saver, AscendV1SaverConfig, deq_scale_dtype, describe
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.base import Output, PlannedTensor
from slim_core.savers.layer_parts import layer_parts

INFO = LinearInfo("m.proj", "m.proj", 4, 3, has_bias=True, in_block=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleList([nn.Linear(4, 3)])


def streamed(folder: Path, dtype: str | None, **extra: torch.Tensor) -> StreamedModel:
    tensors = {"m.0.weight": torch.randn(3, 4), "m.0.bias": torch.randn(3), **extra}
    save_file(tensors, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    return StreamedModel(net, Checkpoint(folder), folder, {"dtype": dtype} if dtype else {})


def declared(
    model: StreamedModel, kind: LayerKind, part: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...], str]]:
    saver = AscendV1Saver(AscendV1SaverConfig(part_file_size=part))
    output = saver.declare(model, {"m.0": Assignment(LayerForm(kind), "process[0]", "")})
    return {tensor.meta.name: (tensor.meta.dtype, tensor.meta.shape, tensor.kind) for tensor in output.tensors}


@pytest.mark.parametrize(
    ("dtype", "deq"),
    [("bfloat16", torch.float32), ("float16", torch.int64), ("float32", torch.int64), (None, torch.int64)],
)
def test_static_tensors(tmp_path: Path, dtype: str | None, deq: torch.dtype) -> None:
    assert declared(streamed(tmp_path, dtype), LayerKind.W8A8) == {
        "m.0.weight": (torch.int8, (3, 4), "W8A8"),
        "m.0.quant_bias": (torch.int32, (3,), "W8A8"),
        "m.0.input_scale": (torch.float32, (1,), "W8A8"),
        "m.0.input_offset": (torch.float32, (1,), "W8A8"),
        "m.0.deq_scale": (deq, (3,), "W8A8"),
        "m.0.bias": (torch.float32, (3,), "FLOAT"),
    }
    assert deq_scale_dtype(None) == torch.int64


@pytest.mark.parametrize("kind", [LayerKind.W8A8_DYNAMIC, LayerKind.W8A16])
def test_tensors_with_weight_scales(tmp_path: Path, kind: LayerKind) -> None:
    assert declared(streamed(tmp_path, "bfloat16"), kind) == {
        "m.0.weight": (torch.int8, (3, 4), kind),
        "m.0.weight_scale": (torch.float32, (3, 1), kind),
        "m.0.weight_offset": (torch.float32, (3, 1), kind),
        "m.0.bias": (torch.float32, (3,), "FLOAT"),
    }


def test_a_name_that_the_checkpoint_has_taken(tmp_path: Path) -> None:
    model = streamed(tmp_path, "bfloat16", **{"m.0.weight_scale": torch.ones(3, 1)})
    with pytest.raises(InvalidModelError, match=r"holds 'm\.0\.weight_scale', a name that a quantized layer needs"):
        declared(model, LayerKind.W8A16)
    assert declared(model, LayerKind.W8A8)["m.0.weight_scale"] == (torch.float32, (3, 1), "FLOAT")


@pytest.mark.parametrize(
    "layer",
    [
        StaticInt8.build(
            torch.ones(3, 4, dtype=torch.int8), torch.ones(3), torch.ones(1), torch.zeros(1), torch.ones(3).bfloat16()
        ),
        DynamicInt(torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1), torch.zeros(3, 1), torch.ones(3).bfloat16()),
        WeightOnlyInt(torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1), torch.ones(3, 1), torch.ones(3).bfloat16()),
    ],
)
def test_parameters_are_those_that_were_declared(
    tmp_path: Path, layer: StaticInt8 | DynamicInt | WeightOnlyInt
) -> None:
    saver = AscendV1Saver(AscendV1SaverConfig())
    output = saver.declare(streamed(tmp_path, "float16"), {"m.0": Assignment(LayerForm(layer.kind), "", "")})
    info = LinearInfo("m.0", "m.0", 4, 3, has_bias=True, in_block=True)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in saver.parameters(info, layer).items()}
    assert found == {tensor.meta.name: (tensor.meta.dtype, tensor.meta.shape) for tensor in output.tensors}


def test_a_layer_of_another_format_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="the format cannot hold str"):
        AscendV1Saver(AscendV1SaverConfig()).parameters(INFO, "layer")  # pyright: ignore


@pytest.mark.parametrize(
    ("kinds", "model_type"),
    [
        (["FLOAT"], "FLOAT"),
        (["FLOAT", "W8A16"], "W8A16"),
        (["W8A8_DYNAMIC", "W8A16", "FLOAT"], "W8A8_DYNAMIC"),
        (["W8A8_DYNAMIC", "W8A8", "W8A16"], "W8A8"),
        ([], "Unknown"),
        (["W9A9"], "Unknown"),
    ],
)
def test_type_of_the_model(kinds: list[str], model_type: str) -> None:
    tensors = [PlannedTensor(TensorMeta(f"t{i}", torch.int8, (1,)), kind, "u") for i, kind in enumerate(kinds)]
    description = describe(Output(tuple(tensors), ()))
    assert description["model_quant_type"] == model_type
    assert list(description)[len(kinds) :] == ["version", "model_quant_type", "metadata", "group_size", "optional"]
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("size", [-1, "big", 1.5])
def test_part_file_size(size: object) -> None:
    spec = {"save": [{"type": "ascendv1_saver", "part_file_size": size}]}
    with pytest.raises(SchemaValidateError, match=r"spec\.save\[0\]\.part_file_size"):
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}).spec()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no quant_model_description.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "no safetensors weights"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "quant_model_description.json").write_text(content)
    with pytest.raises(InvalidModelError, match=message):
        AscendV1Folder(tmp_path)


def test_reading_layers(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (3, 4), dtype=torch.int8)
    save_file(
        {"a.weight": codes, "a.weight_scale": torch.ones(3, 1), "b.weight": torch.ones(2), "c.weight": codes.clone()},
        tmp_path / "quant_model_weights.safetensors",
    )
    description = {
        "a.weight": "W8A8_DYNAMIC",
        "a.weight_scale": "W8A8_DYNAMIC",
        "b.weight": "FLOAT",
        "c.weight": "W1A1",
        "x.quant_type": "FAKQuant",
        "version": "1.0.0",
        "kv_cache_type": "C8",
    }
    (tmp_path / "quant_model_description.json").write_text(json.dumps(description))
    folder = AscendV1Folder(tmp_path)
    assert set(folder.types) == {"a.weight", "a.weight_scale", "b.weight", "c.weight"}
    assert list(folder.layers()) == [("a", "W8A8_DYNAMIC"), ("c", "W1A1")]
    layer = folder.layer("a")
    assert isinstance(layer, DynamicInt)
    assert torch.equal(layer.weight, codes)
    assert layer.bias is None
    assert folder.layer("b") is folder.layer("nowhere") is None
    with pytest.raises(UnsupportedError, match=r"^c: layers of type 'W1A1' cannot be read"):
        folder.layer("c")
    folder.description["a.weight"] = "W8A8"
    with pytest.raises(VerificationError, match=r"^a\.deq_scale: the tensor is missing"):
        folder.layer("a")


@pytest.mark.parametrize("name", ["a.o_proj", "a.q_proj"])
def test_scale_bias_of_a_tall_weight(name: str) -> None:
    """It is summed up a few rows at a time."""
    codes = torch.randint(-8, 8, (1100, 1024), dtype=torch.int8)
    scale, offset = torch.rand(1100, 1) + 0.1, torch.zeros(1100, 1)
    layer = DynamicInt(codes, scale, offset, weight_bits=4)
    parts = 16 if name.endswith("o_proj") else 1
    exact = 8 * (codes.double() * scale.double()).view(1100, parts, -1).sum(2)
    found = layer_parts(name, layer, torch.float32)["scale_bias"]
    assert found.shape == exact.shape
    assert torch.allclose(found.double(), exact, atol=1e-2)

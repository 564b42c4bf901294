"""The MindIE-SD format: its names, its tensors, and folders that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from slim_core.processors.base import Assignment, Extras
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import DynamicInt, MxDynamic, StaticInt8
from slim_core.recipe import recipe_from_dict
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.base import Output, PlannedTensor
from slim_core.savers.mindie_folder import MindieFolder, is_mindie, is_quantized, open_quantized
from slim_core.savers.mindie_format import MindieSaver, MindieSaverConfig
from slim_core.savers.mindie_layout import (
    LARGEST_FILE,
    codes_of_values,
    description_file,
    mindie_form_of,
    mindie_layout,
    model_type,
    values_of_codes,
    weight_stem,
)

WIDTH, OUT = 64, 3
INFO = LinearInfo("m.0", "m.0", WIDTH, OUT, has_bias=True, in_block=True)
CODES = (torch.arange(OUT * WIDTH) % 16).to(torch.uint8).reshape(OUT, WIDTH)
NUMBERS = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleList([nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)])


def streamed(folder: Path, config: dict[str, Any] | None = None) -> StreamedModel:
    tensors = {f"m.{i}.weight": torch.randn(OUT, WIDTH) for i in range(2)}
    tensors |= {f"m.{i}.bias": torch.randn(OUT) for i in range(2)}
    save_file(tensors, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    return StreamedModel(net, Checkpoint(folder), folder, config or {})


def declared(model: StreamedModel, *kinds: LayerKind, **settings: Any) -> tuple[MindieSaver, Output]:
    saver = MindieSaver(MindieSaverConfig(**settings))
    forms = {
        f"m.{i}": LayerForm(kind, outer_block=64 * (kind == "W4A4_MXFP4_DUALSCALE")) for i, kind in enumerate(kinds)
    }
    return saver, saver.declare(model, {name: Assignment(form, "process[0]", "") for name, form in forms.items()})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_deq_scale_is_float32_whatever_the_model(tmp_path: Path, dtype: str | None) -> None:
    _, output = declared(streamed(tmp_path, {"dtype": dtype} if dtype else {}), LayerKind.W8A8)
    found = {tensor.meta.name: (tensor.meta.dtype, tensor.meta.shape, tensor.kind) for tensor in output.tensors}
    assert found == {
        "m.0.weight": (torch.int8, (OUT, WIDTH), "W8A8"),
        "m.0.quant_bias": (torch.int32, (OUT,), "W8A8"),
        "m.0.input_scale": (torch.float32, (1,), "W8A8"),
        "m.0.input_offset": (torch.float32, (1,), "W8A8"),
        "m.0.deq_scale": (torch.float32, (OUT,), "W8A8"),
        "m.0.bias": (torch.float32, (OUT,), "FLOAT"),
        "m.1.weight": (torch.float32, (OUT, WIDTH), "FLOAT"),
        "m.1.bias": (torch.float32, (OUT,), "FLOAT"),
    }
    assert [shard.file_name for shard in output.shards] == ["quant_model_weight_w8a8.safetensors"]


LAYERS = {
    LayerKind.W8A8: StaticInt8.build(
        torch.ones(OUT, WIDTH, dtype=torch.int8), torch.ones(OUT), torch.ones(1), torch.zeros(1), torch.ones(OUT)
    ),
    LayerKind.W8A8_DYNAMIC: DynamicInt(
        torch.ones(OUT, WIDTH, dtype=torch.int8), torch.rand(OUT, 1), torch.zeros(OUT, 1), torch.ones(OUT).bfloat16()
    ),
    LayerKind.W8A8_MXFP8: MxDynamic(
        *(LayerKind.W8A8_MXFP8, torch.randn(OUT, WIDTH).to(torch.float8_e4m3fn)),
        *(torch.full((OUT, 2), 120, dtype=torch.uint8), torch.ones(OUT)),
    ),
    LayerKind.W4A4_MXFP4: MxDynamic(
        LayerKind.W4A4_MXFP4, CODES, torch.full((OUT, 2), 120, dtype=torch.uint8), torch.ones(OUT)
    ),
    LayerKind.W4A4_MXFP4_DUALSCALE: MxDynamic(
        *(LayerKind.W4A4_MXFP4_DUALSCALE, CODES, torch.full((OUT, 2), 120, dtype=torch.uint8), torch.ones(OUT)),
        torch.rand(OUT, 1, 1),
    ),
}


@pytest.mark.parametrize("form", ["values", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_written_as_declared_and_read_back(kind: LayerKind, form: str, tmp_path: Path) -> None:
    layer = LAYERS[kind]
    saver, output = declared(streamed(tmp_path), kind, mxfp4_weight=form)
    parts = dict(saver.parameters(INFO, layer))
    planned = {t.meta.name: (t.meta.dtype, t.meta.shape) for t in output.tensors if t.owner}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == planned
    folder = tmp_path / "out"
    folder.mkdir()
    save_file(parts, folder / output.shards[0].file_name)
    saver.complete(folder, streamed(tmp_path), output)
    opened = open_quantized(folder)
    assert isinstance(opened, MindieFolder)
    assert list(opened.layers()) == [("m.0", kind)]
    back = opened.layer("m.0")
    assert type(back) is type(layer)
    assert back is not None
    x = torch.randn(5, WIDTH)
    assert torch.equal(back.simulate(x), layer.simulate(x))
    assert torch.equal(back.dequantized(), layer.dequantized())
    assert opened.layer("m.1") is None


def test_values_of_four_bits_are_exact() -> None:
    values = values_of_codes(torch.arange(16, dtype=torch.uint8).reshape(2, 8))
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(values.float().flatten(), NUMBERS)
    assert torch.equal(values.float().flatten().signbit(), NUMBERS.signbit())
    assert torch.equal(codes_of_values(values, "w"), torch.arange(16, dtype=torch.uint8).reshape(2, 8))


@pytest.mark.parametrize("value", [0.25, 5.0, 448.0, float("nan")])
def test_values_that_are_no_numbers_of_four_bits(value: float) -> None:
    with pytest.raises(VerificationError, match="holds values that are no numbers of four bits"):
        codes_of_values(torch.tensor([[1.0, value]]).to(torch.float8_e4m3fn), "m.0.weight")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"])
def test_the_form_follows_from_the_shapes(kind: str, packed: bool) -> None:
    form = LayerForm(LayerKind(kind), outer_block=64 if kind.endswith("DUALSCALE") else 0)
    parts = mindie_layout(form, "m.0", OUT, 128, packed=packed)
    shapes = {suffix: part.shape for suffix, part in parts.items()}
    assert mindie_form_of(form.kind, shapes, packed=packed) == (form, OUT, 128)
    assert mindie_form_of(form.kind, {}, packed=packed) is None


@pytest.mark.parametrize(
    ("kinds", "name"),
    [([], None), (["W8A8"], "W8A8"), (["W8A8_MXFP8", "W8A8", "W8A8_MXFP8"], "W8A8_MXFP8"), (["W8A8", "A"], "A")],
)
def test_type_of_the_model(kinds: list[str], name: str | None) -> None:
    assert model_type(kinds) == name


def test_names_of_files() -> None:
    assert description_file("W8A8_DYNAMIC") == "quant_model_description_w8a8_dynamic.json"
    assert description_file(None) == "quant_model_description.json"
    assert weight_stem("W8A8", in_parts=False) == "quant_model_weight_w8a8"
    assert weight_stem("W8A8", in_parts=True) == weight_stem(None, in_parts=False) == "quant_model_weight"


def test_notes() -> None:
    def notes(nbytes: int, **settings: Any) -> list[str]:
        meta = TensorMeta("m.0.weight", torch.int8, (nbytes,))
        output = Output((PlannedTensor(meta, "W8A8", "u", owner="m.0"),), ())
        object.__setattr__(output, "shards", (type("Shard", (), {"nbytes": nbytes})(),))
        return MindieSaver(MindieSaverConfig(**settings)).notes(output)

    assert notes(LARGEST_FILE) == []
    (note,) = notes(LARGEST_FILE + (1 << 30))
    assert "will have 101 GiB; MindIE-SD refuses files above 100 GiB" in note
    (note,) = notes(LARGEST_FILE + (1 << 30), part_file_size=4)
    assert "does NOT load weights in parts" in note


def test_what_processors_leave_beside_the_weights_has_no_place(tmp_path: Path) -> None:
    saver, output = declared(streamed(tmp_path), LayerKind.W8A8)
    with pytest.raises(UnsupportedError, match="no place for files beside the weights"):
        saver.complete(tmp_path, streamed(tmp_path), output, [Extras({"more.safetensors": {}})])


@pytest.mark.parametrize(
    ("config", "kept"),
    [({"dim": 1}, {"dim": 8}), ({"architectures": ["A"], "dim": 1}, {"architectures": ["A"], "dim": 1})],
)
def test_config(config: dict[str, Any], kept: dict[str, Any], tmp_path: Path) -> None:
    """That of a transformer of diffusers is left as it lies in its folder, whatever the model was built from."""
    (tmp_path / "config.json").write_text(json.dumps({"dim": 8}))
    (tmp_path / "tokenizer.model").write_text("")
    model = streamed(tmp_path, config)
    saver, output = declared(model, LayerKind.W8A8)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / output.shards[0].file_name).write_bytes(b"")
    saver.complete(folder, model, output)
    assert json.loads((folder / "config.json").read_text()) == kept
    assert not (folder / "tokenizer.model").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("part_file_size", -1), ("part_file_size", 1.5), ("mxfp4_weight", "bytes")]
)
def test_settings(field: str, value: object) -> None:
    spec = {"save": [{"type": "mindie_format_saver", field: value}]}
    with pytest.raises(SchemaValidateError, match=rf"spec\.save\[0\]\.{field}"):
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}).spec()
    assert MindieSaverConfig().part_file_size == 0


@pytest.mark.parametrize(
    ("files", "quantized", "mindie"),
    [
        ([], False, False),
        (["quant_model_description.json", "quant_model_weights.safetensors"], True, False),
        (["quant_model_description.json", "quant_model_weights-00001-of-00001.safetensors"], True, False),
        (["quant_model_description.json"], True, False),
        (["quant_model_description.json", "quant_model_weight.safetensors"], True, True),
        (["quant_model_description_w8a8.json", "quant_model_weight_w8a8.safetensors"], True, True),
        (["quant_model_description_w8a8.json", "quant_model_weight-00001-of-00001.safetensors"], True, True),
        (["quant_model_description_w8a8.json"], True, True),
        (["quant_model_weight_w8a8.safetensors"], False, True),
    ],
)
def test_formats_are_told_apart_by_names(files: list[str], quantized: bool, mindie: bool, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    assert (is_quantized(tmp_path), is_mindie(tmp_path)) == (quantized, mindie)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no quant_model_description.json"),
        ({"quant_model_description_w8a8.json": "{"}, "cannot be read as JSON"),
        ({"quant_model_description_w8a8.json": "[]"}, "is not a JSON object"),
        ({"quant_model_description_w8a8.json": "{}"}, "no safetensors weights"),
        (
            {"quant_model_description_w8a8.json": "{}", "quant_model_description_w8a8_dynamic.json": "{}"},
            "holds several descriptions: quant_model_description_w8a8.json, quant_model_description_w8a8_dynamic.json",
        ),
    ],
)
def test_folders_that_cannot_be_read(files: dict[str, str], message: str, tmp_path: Path) -> None:
    opened: list[Callable[[Path], Any]] = [MindieFolder, open_quantized] if files else [MindieFolder, AscendV1Folder]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for open_folder in opened:
        with pytest.raises(InvalidModelError, match=message):
            open_folder(tmp_path)

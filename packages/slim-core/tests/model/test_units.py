"""Matching a model with its checkpoint, and cutting it into units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.joined import JoinedSource
from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    """``tie``: whether the head shares its weight with the embedding, and how."""

    def __init__(self, tie: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.register_buffer("steps", torch.arange(3.0))
        self.register_buffer("cache", torch.arange(5.0), persistent=False)
        if tie:
            self.head.weight = self.embed.weight
        if tie == "three":
            self.third = nn.Linear(4, 6, bias=False)
            self.third.weight = self.embed.weight
        if tie == "module":
            self.head = nn.Linear(4, 6, bias=False)
            self.again = self.head


def weights(tie: str = "") -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in Net(tie).state_dict().items()}


def opened(folder: Path, tensors: dict[str, Tensor], tie: str = "", **options: Any) -> StreamedModel:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net(tie)
    return StreamedModel(net, Checkpoint(folder), folder, {}, **options)


def unit(model: StreamedModel, name: str) -> Unit:
    return next(unit for unit in model.units if unit.name == name)


def written(model: StreamedModel) -> dict[str, str]:
    """Output name to its origin; no name may be written twice."""
    pairs = [pair for unit in model.units for pair in unit.tensors.items()]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_units_of_a_model(tmp_path: Path) -> None:
    tensors = weights()
    model = opened(tmp_path, tensors)
    assert [(unit.name, unit.block) for unit in model.units] == [
        ("prologue", None),
        ("layers.0", 0),
        ("layers.1", 1),
        ("epilogue", None),
    ]
    assert written(model) == {name: name for name in tensors}
    assert set(unit(model, "prologue").tensors) == {"embed.weight", "steps"}
    assert set(unit(model, "epilogue").tensors) == {"norm.weight", "norm.bias", "head.weight"}
    linears = {info.name: info for unit in model.units for info in unit.linears}
    assert list(linears) == ["layers.0.proj", "layers.0.out", "layers.1.proj", "layers.1.out", "head"]
    assert [info.has_bias for info in linears.values()] == [True, False, True, False, False]
    assert [info.in_block for info in linears.values()] == [True] * 4 + [False]
    assert (linears["head"].in_features, linears["head"].out_features) == (4, 6)
    assert not model.tied_head


def test_loading_and_unloading(tmp_path: Path) -> None:
    tensors = weights()
    model = opened(tmp_path, tensors)
    block = unit(model, "layers.1")
    model.load([*block.parameters, "not.there"], CPU)
    assert torch.equal(model.module.get_parameter("layers.1.proj.weight"), tensors["layers.1.proj.weight"])
    assert model.module.get_parameter("layers.0.proj.weight").device.type == "meta"
    model.unload(block.parameters)
    assert {p.device.type for p in model.module.parameters()} == {"meta"}
    model.load(model.outside, CPU)
    assert torch.equal(model.module.get_buffer("steps"), tensors["steps"])
    assert model.module.get_buffer("cache").tolist() == [0, 1, 2, 3, 4]
    assert model.tensors_of(["head.weight", "cache"]) == ["head.weight"]


def test_values_are_loaded_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in weights().items()}
    model = opened(tmp_path, tensors)
    model.load(model.outside, CPU)
    assert model.module.get_parameter("head.weight").dtype == torch.float32


@pytest.mark.parametrize(("stored", "absent"), [("embed.weight", "head.weight"), ("head.weight", "embed.weight")])
def test_tied_weights_are_found_under_either_name(tmp_path: Path, stored: str, absent: str) -> None:
    tensors = weights("yes")
    del tensors[absent]
    model = opened(tmp_path, tensors, "yes")
    assert model.tied_head
    assert written(model) == {**{name: name for name in tensors}, absent: stored}
    assert absent in unit(model, "prologue" if absent.startswith("embed") else "epilogue").tensors
    model.load(model.outside, CPU)
    for name in (stored, absent):
        assert torch.equal(model.module.get_parameter(name), tensors[stored])


def test_tied_weights_that_are_both_stored_are_kept_apart(tmp_path: Path) -> None:
    tensors = weights("yes")
    model = opened(tmp_path, tensors, "yes")
    assert not model.tied_head
    assert written(model) == {name: name for name in tensors}
    model.load(model.outside, CPU)
    assert torch.equal(model.module.get_parameter("head.weight"), tensors["head.weight"])


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight", "third.weight"])
def test_three_tied_weights(tmp_path: Path, stored: str) -> None:
    tensors = weights("three")
    names = {"embed.weight", "head.weight", "third.weight"}
    for name in names - {stored}:
        del tensors[name]
    model = opened(tmp_path, tensors, "three")
    assert {name: origin for name, origin in written(model).items() if name in names} == dict.fromkeys(names, stored)


@pytest.mark.parametrize("stored", ["head.weight", "again.weight"])
def test_a_module_under_two_names(tmp_path: Path, stored: str) -> None:
    tensors = weights("module")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("head.weight", "again.weight")}
    tensors[stored] = torch.randn(6, 4)
    model = opened(tmp_path, tensors, "module")
    found = written(model)
    assert found["head.weight"] == found["again.weight"] == stored


def test_persistent_buffers_may_be_missing_and_then_keep_their_value(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["steps"]
    model = opened(tmp_path, tensors)
    assert "steps" not in written(model)
    model.load(model.outside, CPU)
    assert model.module.get_buffer("steps").tolist() == [0, 1, 2]


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = weights()
    tensors["layers.1.proj.wieght"] = tensors.pop("layers.1.proj.weight")
    del tensors["norm.bias"]
    with pytest.raises(InvalidModelError) as caught:
        opened(tmp_path, tensors)
    assert "2 tensors of the model are not in the checkpoint, among them 'layers.1.proj.weight'" in str(caught.value)
    assert "(there is 'layers.1.proj.wieght')" in str(caught.value)
    assert caught.value.where == str(tmp_path)


def test_a_missing_tied_tensor(tmp_path: Path) -> None:
    tensors = weights("yes")
    del tensors["head.weight"], tensors["embed.weight"]
    with pytest.raises(InvalidModelError, match="2 tensors of the model are not in the checkpoint"):
        opened(tmp_path, tensors, "yes")


@pytest.mark.parametrize("name", ["layers.0.out.weight", "steps"])
def test_a_tensor_of_another_shape(tmp_path: Path, name: str) -> None:
    tensors = weights()
    tensors[name] = torch.zeros(7, 4)
    with pytest.raises(
        InvalidModelError, match=rf"tensor '{name}' has shape \[7, 4\], config.json asks for \[[0-9, ]+\]"
    ):
        opened(tmp_path, tensors)


def test_tensors_that_the_model_does_not_know_are_carried_over(tmp_path: Path) -> None:
    tensors = weights() | {"mtp.weight": torch.zeros(3), "layers.0.proj.scale": torch.zeros(1)}
    model = opened(tmp_path, tensors)
    assert model.units[-1].name == "extra"
    assert set(model.units[-1].tensors) == {"mtp.weight", "layers.0.proj.scale"}
    assert written(model) == {name: name for name in tensors}


def test_names_of_the_checkpoint(tmp_path: Path) -> None:
    tensors = {f"base.{name}": tensor for name, tensor in weights("yes").items() if name != "head.weight"}
    model = opened(tmp_path, tensors, "yes", tensor_name=lambda name: f"base.{name}")
    assert written(model) == {**{name: name for name in tensors}, "base.head.weight": "base.embed.weight"}
    assert {info.prefix for info in unit(model, "layers.0").linears} == {"base.layers.0.proj", "base.layers.0.out"}


def test_skipped_tensors_are_not_asked_for(tmp_path: Path) -> None:
    tensors = weights()
    model = opened(tmp_path, tensors, skip=frozenset({"layers.0.proj.weight", "layers.0.proj.bias"}))
    assert "layers.0.proj.weight" not in unit(model, "layers.0").parameters
    assert [info.name for info in unit(model, "layers.0").linears] == ["layers.0.out"]
    missing = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.0.proj.")}
    opened(tmp_path, missing, skip=frozenset({"layers.0.proj.weight", "layers.0.proj.bias"}))


def test_skipping_one_of_two_tied_tensors(tmp_path: Path) -> None:
    tensors = weights("yes")
    model = opened(tmp_path, tensors, "yes", skip=frozenset({"embed.weight"}))
    assert "embed.weight" not in unit(model, "prologue").parameters
    assert unit(model, "epilogue").parameters["head.weight"] == "head.weight"


def test_a_skipped_tensor_stands_in_for_no_other(tmp_path: Path) -> None:
    tensors = weights("yes")
    del tensors["head.weight"]
    with pytest.raises(InvalidModelError, match=r"1 tensors of the model are not in the checkpoint.*'head\.weight'"):
        opened(tmp_path, tensors, "yes", skip=frozenset({"embed.weight"}))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "torch.float32"}, torch.float32),
        ({"text_config": {"torch_dtype": "bfloat16"}}, torch.bfloat16),
        ({"vision_config": {"dtype": "float16"}, "text_config": {}}, torch.float16),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float16"}}, torch.bfloat16),
        ({"dtype": "auto"}, None),
        ({"dtype": "nn"}, None),
        ({}, None),
    ],
)
def test_dtype_of_the_configuration(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype | None) -> None:
    model = opened(tmp_path, weights())
    model.config = config
    assert model.dtype is dtype


@pytest.mark.parametrize(
    "change", [lambda blocks: blocks, lambda blocks: nn.ModuleDict({"0": blocks[0], "1": blocks[1]})]
)
def test_naming_the_blocks(tmp_path: Path, change: Callable[[nn.ModuleList], nn.Module]) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    net.layers = change(net.layers)  # pyright: ignore
    model = StreamedModel(net, Checkpoint(tmp_path), tmp_path, {}, block_lists=("layers",))
    assert [unit.block for unit in model.units] == [None, 0, 1, None]
    assert len(model.blocks) == 2


def test_a_parameter_that_is_stored_in_parts_is_read_whole_and_written_in_parts(tmp_path: Path) -> None:
    tensors = weights()
    whole = tensors.pop("layers.0.norm.weight")
    tensors |= {"layers.0.a": whole[:1], "layers.0.b": whole[1:]}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    joined = {"layers.0.norm.weight": ("layers.0.a", "layers.0.b")}
    source = JoinedSource(Checkpoint(tmp_path), joined)
    model = StreamedModel(net, source, tmp_path, {}, joined=joined)
    assert written(model) == {name: name for name in tensors}
    block = unit(model, "layers.0")
    assert {"layers.0.a", "layers.0.b"} <= set(block.tensors)
    model.load(block.parameters, CPU)
    assert torch.equal(model.module.get_parameter("layers.0.norm.weight"), whole)
    model.unload(block.parameters)


def test_a_linear_whose_weight_has_no_name_that_the_format_knows_is_passed_on(tmp_path: Path) -> None:
    tensors = weights()
    tensors["layers.0.projection"] = tensors.pop("layers.0.out.weight")
    names = {"layers.0.out.weight": "layers.0.projection"}
    model = opened(tmp_path, tensors, tensor_name=lambda name: names.get(name, name))
    assert [info.name for info in unit(model, "layers.0").linears] == ["layers.0.proj"]
    assert written(model) == {name: name for name in tensors}


def test_linears_that_blocks_share_stay_float_and_are_written_for_each(tmp_path: Path) -> None:
    tensors = weights()
    shared = {name: name.replace("layers.0", "layers.1") for name in ("layers.0.proj.weight", "layers.0.proj.bias")}
    save_file({n: t.clone() for n, t in tensors.items() if n not in shared.values()}, tmp_path / "model.safetensors")
    with parameters_on_meta():
        net = Net()
        net.layers[1].proj = net.layers[0].proj
    model = StreamedModel(net, Checkpoint(tmp_path), tmp_path, {})
    linears = [info.name for unit in model.units for info in unit.linears]
    assert linears == ["layers.0.out", "layers.1.out", "head"]
    assert written(model) == {name: name for name in tensors} | {there: here for here, there in shared.items()}

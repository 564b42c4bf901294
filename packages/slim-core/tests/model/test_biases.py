"""Biases of modules whose class has none are added, whoever gives them, and can be taken away again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import UnsupportedError
from slim_core.model.biases import drop_bias, expect_bias, take_stored_biases
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Addition
from slim_core.model.weights import Edit, UnitWeights

CPU = torch.device("cpu")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Pair(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        return x, x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


X = torch.arange(8.0).view(2, 4)


def test_a_norm_adds_the_bias_it_is_given_once() -> None:
    norm = Norm()
    for _ in range(2):
        expect_bias(norm, "norm")
    assert torch.equal(norm(X), 2 * X)
    norm.bias = nn.Parameter(torch.arange(4.0))
    assert torch.equal(norm(X), 2 * X + torch.arange(4.0))
    drop_bias(norm)
    assert torch.equal(norm(X), 2 * X)
    drop_bias(Norm())  # there is nothing to take away


def test_the_output_keeps_its_dtype() -> None:
    norm = Norm().bfloat16()
    expect_bias(norm, "norm")
    norm.bias = nn.Parameter(torch.full((4,), 0.1))
    assert norm(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(norm(X.bfloat16()), (2 * X).bfloat16() + torch.tensor(0.1).bfloat16())


@pytest.mark.parametrize("module", [nn.Linear(4, 4, bias=False), nn.LayerNorm(4, bias=False)])
def test_classes_that_know_of_a_bias_add_it_themselves(module: nn.Module) -> None:
    expect_bias(module, "module")
    with torch.no_grad():
        before = module(X)
        module.bias = nn.Parameter(torch.arange(4.0))  # pyright: ignore
        assert torch.allclose(module(X), before + torch.arange(4.0))


def test_what_cannot_be_added_to_is_refused() -> None:
    pair = Pair()
    expect_bias(pair, "layers.0.pair")
    pair.bias = nn.Parameter(torch.ones(4))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.pair: it has a bias, which cannot be added to what Pair"):
        pair(X)


def streamed(folder: Path, extra: dict[str, Tensor], names: dict[str, str] | None = None) -> tuple[Net, Checkpoint]:
    names = names or {}
    state = {names.get(name, name): value.contiguous() for name, value in Net().state_dict().items()}
    save_file(state | extra, folder / "model.safetensors")
    with parameters_on_meta():
        return Net(), Checkpoint(folder)


def test_stored_biases_are_loaded_and_unloaded_with_their_unit(tmp_path: Path) -> None:
    stored = {"layers.0.norm.bias": torch.arange(4.0), "layers.0.linear.bias": torch.arange(3.0)}
    net, source = streamed(tmp_path, stored)
    take_stored_biases(net, source, str)
    model = StreamedModel(net, source, tmp_path, {})
    (unit,) = (unit for unit in model.units if unit.block == 0)
    assert set(stored) <= set(unit.parameters)
    assert not [unit for unit in model.units if unit.name == "extra"]
    model.load(unit.parameters, CPU)
    with torch.no_grad():
        want = (2 * X + stored["layers.0.norm.bias"]) @ net.layers[0].linear.weight.T + torch.arange(3.0)  # pyright: ignore
        assert torch.allclose(net(X), want)
    model.unload(unit.parameters)
    assert all(parameter.is_meta for parameter in net.parameters())


def test_biases_to_be_skipped_stay_where_they_are(tmp_path: Path) -> None:
    net, source = streamed(tmp_path, {"layers.0.linear.bias": torch.ones(3)})
    take_stored_biases(net, source, str, {"layers.0.linear.bias"})
    assert [name for name, _ in net.named_parameters()] == ["layers.0.norm.weight", "layers.0.linear.weight"]


def test_a_stored_bias_that_is_another_parameter_is_none(tmp_path: Path) -> None:
    """Routers keep the correction of their scores as ``gate.bias``, which the model calls otherwise."""
    names = {"layers.0.correction": "layers.0.norm.bias"}
    net, source = streamed(tmp_path, {"layers.0.norm.bias": torch.ones(4)})
    net.layers[0].register_buffer("correction", torch.zeros(4))
    take_stored_biases(net, source, lambda name: names.get(name, name))
    assert [name for name, _ in net.named_parameters()] == ["layers.0.norm.weight", "layers.0.linear.weight"]


def test_names_of_the_checkpoint_are_those_of_the_weight(tmp_path: Path) -> None:
    """A name that the model does not have itself is in no table of names."""
    names = {"layers.0.norm.weight": "text.layers.0.norm.weight", "layers.0.linear.weight": "text.layers.0.w.weight"}
    net, source = streamed(tmp_path, {"text.layers.0.w.bias": torch.ones(3)}, names)
    take_stored_biases(net, source, lambda name: names.get(name, name))
    assert [name for name, _ in net.named_parameters()][-1] == "layers.0.linear.bias"
    model = StreamedModel(net, source, tmp_path, {}, tensor_name=lambda name: names.get(name, name))
    given = model.with_additions([Addition("layers.0.norm.bias", torch.float32, (4,))])
    (unit,) = (unit for unit in given.units if unit.block == 0)
    assert unit.added["layers.0.norm.bias"].name == "text.layers.0.norm.bias"


def test_additions_act_on_the_module_for_as_long_as_the_unit_is_loaded(tmp_path: Path) -> None:
    net, source = streamed(tmp_path, {})
    model = StreamedModel(net, source, tmp_path, {}).with_additions(
        [Addition("layers.0.norm.bias", torch.float32, (4,)), Addition("layers.0.linear.bias", torch.float32, (3,))]
    )
    (unit,) = (unit for unit in model.units if unit.block == 0)
    model.load(unit.parameters, CPU)
    weights = UnitWeights(model, unit, live=True)
    with torch.no_grad():
        before = net(X)
        weights.apply([Edit("layers.0.norm.bias", value=torch.ones(4))])
        weights.fill()  # the linear, whose bias nobody has set, has one of zeros
        linear = net.get_submodule("layers.0.linear")
        assert torch.equal(linear.get_parameter("bias"), torch.zeros(3))
        assert torch.allclose(net(X), before + linear.get_parameter("weight").sum(1))
        assert weights["layers.0.norm.bias"].load().tolist() == [1, 1, 1, 1]
        model.unload([*unit.parameters, *unit.added])
        model.load(unit.parameters, CPU)
        assert torch.equal(net(X), before)

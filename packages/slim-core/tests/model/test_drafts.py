"""Drafting layers are known by what they hold, whatever they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit


class Dense(nn.Module):
    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, inner, bias=False)
        self.down = nn.Linear(inner, 4)
        self.router = nn.Parameter(torch.empty(3, 4))


class Wide(Dense):
    """What a dense block has, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6, bias=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([Dense(), Dense(), Wide(), Wide()])
        self.head = nn.Linear(4, 6, bias=False)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in Net().state_dict().items()}


def copied(tensors: dict[str, Tensor], block: str, prefix: str) -> dict[str, Tensor]:
    return {n.replace(block, prefix, 1): t.clone() for n, t in tensors.items() if n.startswith(block)}


def opened(folder: Path, tensors: dict[str, Tensor], front: str = "") -> StreamedModel:
    save_file(tensors, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    return StreamedModel(net, Checkpoint(folder), folder, {}, tensor_name=lambda name: front + name)


def drafts(model: StreamedModel) -> dict[str, Unit]:
    return {unit.name: unit for unit in model.units if unit.mirrors}


@pytest.mark.parametrize("prefix", ["layers.4.", "mtp.layers.0.", "some.where.else."])
@pytest.mark.parametrize(("block", "like"), [("layers.0.", "layers.1"), ("layers.2.", "layers.3")])
def test_a_block_under_another_name(tmp_path: Path, prefix: str, block: str, like: str) -> None:
    tensors = weights()
    own = copied(tensors, block, prefix)
    more = {f"{prefix}join.weight": torch.zeros(4, 8), f"{prefix}norm2.weight": torch.zeros(4)}
    model = opened(tmp_path, tensors | own | more | {"mtp_fc.weight": torch.zeros(4, 8)})
    name = prefix.removesuffix(".")
    (unit,) = drafts(model).values()
    assert (unit.name, unit.block, unit.mirrors) == (name, None, like)
    assert set(unit.tensors) == {*own, *more}
    assert [unit.name for unit in model.units][-3:] == ["epilogue", name, "extra"]
    assert set(model.units[-1].tensors) == {"mtp_fc.weight"}
    want = [("up", 4, 6, False), ("down", 6, 4, True), ("gate", 4, 6, False)][: 2 + (like == "layers.3")]
    assert list(unit.linears) == [
        LinearInfo(f"{name}.{leaf}", f"{name}.{leaf}", i, o, has_bias=b, in_block=True, runs=False)
        for leaf, i, o, b in want
    ]
    names = {f"{name}.{leaf}.weight" for leaf, *_ in want} | {f"{name}.down.bias"}
    assert unit.parameters == {parameter: parameter for parameter in names}
    assert all(info.runs for one in model.units if not one.mirrors for info in one.linears)


def test_names_that_the_checkpoint_has_otherwise(tmp_path: Path) -> None:
    """Rules name a linear as they name it in a block; its tensors are called as the checkpoint has them."""
    tensors = {f"base.{name}": tensor for name, tensor in weights().items()}
    model = opened(tmp_path, tensors | copied(tensors, "base.layers.0.", "mtp.0."), "base.")
    assert [(info.name, info.prefix) for info in drafts(model)["mtp.0"].linears] == [
        ("mtp.0.up", "mtp.0.up"),
        ("mtp.0.down", "mtp.0.down"),
    ]


def test_several(tmp_path: Path) -> None:
    tensors = weights()
    own = {}
    for number, block in enumerate(("layers.0.", "layers.2.", "layers.1.")):
        own |= copied(tensors, block, f"mtp.{number}.")
    found = drafts(opened(tmp_path, tensors | own))
    assert {name: unit.mirrors for name, unit in found.items()} == {
        "mtp.0": "layers.1",
        "mtp.1": "layers.3",
        "mtp.2": "layers.1",
    }


def test_parts_of_several_blocks(tmp_path: Path) -> None:
    """As DeepSeek-V4 and MiMo-V2 have it: an attention like that of one block, experts like those of another."""
    torch.manual_seed(1)
    net = Net()
    net.layers = nn.ModuleList(
        nn.ModuleDict({"norm": nn.LayerNorm(4), "attn": Dense(inner), "mlp": kind()})
        for inner, kind in ((6, Dense), (8, Wide))
    )
    tensors = {name: torch.randn(tensor.shape) for name, tensor in net.state_dict().items()}
    own = copied(tensors, "layers.0.attn.", "mtp.attn.") | copied(tensors, "layers.1.mlp.", "mtp.mlp.")
    own |= copied(tensors, "layers.0.norm.", "mtp.norm.")
    save_file(tensors | own, tmp_path / "model.safetensors")
    with parameters_on_meta():
        empty = Net()
        empty.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "attn": Dense(inner), "mlp": kind()})
            for inner, kind in ((6, Dense), (8, Wide))
        )
    model = StreamedModel(empty, Checkpoint(tmp_path), tmp_path, {}, ("layers",))
    (unit,) = drafts(model).values()
    assert [(info.name, info.in_features, info.out_features) for info in unit.linears] == [
        ("mtp.attn.up", 4, 6),
        ("mtp.attn.down", 6, 4),
        ("mtp.mlp.up", 4, 6),
        ("mtp.mlp.down", 6, 4),
        ("mtp.mlp.gate", 4, 6),
    ]
    assert set(unit.tensors) == set(own)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "router", "more"])
def test_what_no_block_has(tmp_path: Path, change: str) -> None:
    tensors = weights()
    own = copied(tensors, "layers.0.", "mtp.")
    if change == "missing":
        del own["mtp.norm.bias"]
    elif change == "shape":
        own["mtp.up.weight"] = torch.zeros(5, 4)
    elif change == "dtype":
        own["mtp.up.weight"] = torch.zeros(6, 4, dtype=torch.int8)
    elif change == "router":
        own["mtp.router"] = torch.zeros(2, 4)
    else:
        own["mtp.up.scale"] = torch.zeros(1)
    model = opened(tmp_path, tensors | own)
    assert drafts(model) == {}
    assert model.units[-1].name == "extra"
    assert set(model.units[-1].tensors) == set(own)

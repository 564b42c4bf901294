"""Rotating the inputs of linears at run time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import VerificationError
from slim_core.model.skeleton import stand_in
from slim_core.rotation.inputs import InputRotation, install, read_input_rotations, rotating
from slim_core.rotation.online import down_rotation, heads_rotation


@pytest.mark.parametrize("rotation", [heads_rotation(4, 6, 2), down_rotation(96, 4)], ids=["heads", "down"])
def test_it_is_what_the_weight_is_turned_by(rotation: object) -> None:
    one = InputRotation.of(rotation)  # pyright: ignore
    x = torch.randn(2, 3, rotation.size, dtype=torch.float64)  # pyright: ignore
    assert torch.allclose(one.rotate(x.float()).double(), x @ rotation.dense(), atol=1e-5)  # pyright: ignore
    half = one.rotate(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.shape == x.shape
    linear = torch.randn(5, rotation.size, dtype=torch.float64)  # pyright: ignore
    turned = rotation.right(linear)  # pyright: ignore
    assert torch.allclose(one.rotate(x.float()).double() @ turned.T, x @ linear.T, atol=1e-4)


def test_gradients_flow() -> None:
    x = torch.randn(3, 24, requires_grad=True)
    InputRotation.of(heads_rotation(4, 6, 4)).rotate(x).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)  # lengths are kept


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor, by_name: bool = False) -> torch.Tensor:
        return self.linear(input=x) if by_name else self.linear(x)


@pytest.mark.parametrize("by_name", [False, True])
def test_it_goes_with_whatever_stands_in_for_the_linear(by_name: bool) -> None:
    net, one = Net(), InputRotation.of(heads_rotation(4, 6, 2))
    x = torch.randn(2, 24)
    plain, expected = net(x), net.linear(one.rotate(x))
    with rotating(net, {"linear": one}):
        assert torch.equal(net(x, by_name), expected)
        seen: list[torch.Tensor] = []
        handle = net.linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        net(x)
        assert torch.equal(seen[0], one.rotate(x))  # who watches the input sees it rotated
        handle.remove()
        other = nn.Linear(24, 3)
        original = stand_in(net, "linear", other)
        assert torch.equal(net(x, by_name), other(x))
        assert not torch.equal(net(x), other.forward(x))
        net.set_submodule("linear", original)
        assert torch.equal(net(x), expected)
    assert torch.equal(net(x), plain)
    install(net, {"linear": one})
    assert torch.equal(net(x), expected)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    heads, down = InputRotation.of(heads_rotation(4, 6, 2)), InputRotation.of(down_rotation(96, 4))
    tensors = heads.tensors("a.o_proj") | down.tensors("a.down_proj") | {"a.o_proj.weight": torch.zeros(2)}
    assert set(tensors) - {"a.o_proj.weight"} == {
        *("a.o_proj.heads_rotation", "a.down_proj.kronecker_rotation_m", "a.down_proj.kronecker_rotation_n")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_input_rotations(Checkpoint(tmp_path))
    x = torch.randn(2, 96)
    assert set(found) == {"a.o_proj", "a.down_proj"}
    assert torch.equal(found["a.down_proj"].rotate(x), down.rotate(x))
    assert torch.equal(found["a.o_proj"].rotate(x[:, :24]), heads.rotate(x[:, :24]))
    del tensors["a.down_proj.kronecker_rotation_n"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(VerificationError, match=r"a\.down_proj\.kronecker_rotation_n: the tensor is missing"):
        read_input_rotations(Checkpoint(tmp_path))

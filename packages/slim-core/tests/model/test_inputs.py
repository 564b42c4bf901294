"""Inputs of linears that are scaled while the model runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim_core.model.inputs import change_inputs, drop_input_scales, is_changed, mul_scale_of, scale_input, scaled
from slim_core.model.skeleton import stand_in


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor, by_name: bool = False) -> Tensor:
        return self.linear(input=x) if by_name else self.linear(x)


FACTOR = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0, 1.0])
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_scale_goes_with_whatever_stands_in_for_the_linear(by_name: bool) -> None:
    net = Net()
    plain, want = net(X), net.linear(X * FACTOR)
    scale_input(net.linear, FACTOR)
    assert torch.equal(net(X, by_name), want)
    assert is_changed(net.linear)
    seen: list[Tensor] = []
    handle = net.linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    net(X)
    assert torch.equal(seen[0], X * FACTOR)  # who watches the input sees it scaled
    handle.remove()
    other = nn.Linear(6, 3)
    original = stand_in(net, "linear", other)
    assert torch.equal(net(X, by_name), other.forward(X * FACTOR))
    net.set_submodule("linear", original)
    scale_input(net.linear, FACTOR * 2)  # in the place of the first
    assert torch.allclose(net(X, by_name), net.linear.forward(X * FACTOR * 2))
    drop_input_scales(net, ["linear.bias", mul_scale_of("linear")])
    assert torch.equal(net(X, by_name), plain)
    assert not is_changed(net.linear)


def test_the_product_is_rounded_to_the_dtype_of_the_input() -> None:
    x = X.bfloat16()
    assert scaled(x, FACTOR).dtype == torch.bfloat16
    assert torch.equal(scaled(x, FACTOR), (x.float() * FACTOR.bfloat16().float()).bfloat16())


def test_a_rotation_and_a_scale_are_told_from_hooks_of_others() -> None:
    net = Net()
    net.linear.register_forward_pre_hook(lambda _m, _args: None)
    assert not is_changed(net.linear)
    (handle,) = change_inputs(net, {"linear": lambda x: x.flip(-1)})
    assert is_changed(net.linear)
    assert torch.equal(net(X), net.linear.forward(X.flip(-1)))
    handle.remove()
    assert not is_changed(net.linear)

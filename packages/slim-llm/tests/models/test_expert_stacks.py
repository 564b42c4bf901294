"""What is taken apart and what is not, and what a forward may do with what stands in the place of a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.linears import is_linear
from slim_llm.models.experts import find_experts, take_experts_apart


def no_spelling(parameter: str, count: int) -> None:
    return None


class SharedExperts(nn.Module):
    """Every token goes through all of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.randn(count, 6, 8))
        self.up_proj = nn.Parameter(torch.randn(count, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(count, 8, 6))

    def forward(self, x: Tensor, gammas: Tensor) -> Tensor:
        x = x.expand(len(gammas), -1, -1)
        gate = torch.bmm(x, self.gate_proj.transpose(1, 2))
        up = torch.bmm(x, self.up_proj.transpose(-1, 1))
        return torch.bmm(gate * up * gammas, self.down_proj.transpose(2, 1)).sum(0)


@pytest.mark.parametrize("count", [1, 3])
def test_experts_that_all_tokens_go_through(count: int) -> None:
    experts = SharedExperts(count)
    tensors = {name: tensor.clone() for name, tensor in experts.named_parameters()}
    x, gammas = torch.randn(5, 8), torch.randn(count, 1, 1)
    with torch.no_grad():
        want = experts(x, gammas)
    model = nn.ModuleDict({"shared_experts": experts})
    take_experts_apart(model, no_spelling)
    names = [f"{e}.{linear}" for e in range(count) for linear in ("gate_proj", "up_proj", "down_proj")]
    assert [name for name, module in experts.named_modules() if is_linear(module)] == names
    for name in names:
        expert, linear = name.split(".")
        experts.get_submodule(name).weight = nn.Parameter(tensors[linear][int(expert)])
    with torch.no_grad():
        torch.testing.assert_close(experts(x, gammas), want)


def test_uses_of_a_turned_stack_that_are_not_known() -> None:
    experts = SharedExperts(2)
    take_experts_apart(nn.ModuleDict({"shared_experts": experts}), no_spelling)
    turned = experts.gate_proj.transpose(1, 2)
    assert turned.shape == (2, 8, 6)
    assert turned.transpose(1, 2).shape == (2, 6, 8)
    with pytest.raises(UnsupportedError, match=r"transpose\(0, 1\)"):
        experts.gate_proj.transpose(0, 1)
    with pytest.raises(UnsupportedError, match="one matrix of the transposed stack"):
        turned[0]
    with pytest.raises(UnsupportedError, match="uses 'gate_proj' in a way that is not known here"):
        torch.bmm(torch.zeros(3, 4, 8), turned)


class OtherExperts(nn.Module):
    """Experts whose parameters are named and shaped as given."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


@pytest.mark.parametrize(
    ("shapes", "parameter"),
    [
        ({"wi": (4, 8, 6), "wo": (4, 6, 8)}, "wi"),
        ({"gate_up_proj": (4, 12, 8), "down_proj": (4, 8, 5)}, "down_proj"),
        ({"gate_up_proj": (4, 12, 8), "down_proj": (3, 8, 6)}, "down_proj"),
        ({"up_proj": (4, 6, 8), "down_proj": (4, 8, 5)}, "down_proj"),
        ({"gate_up_proj": (4, 12, 8), "down_proj": (4, 8, 6), "down_proj_bias": (4, 6)}, "down_proj_bias"),
        ({"weight": (4, 12, 8)}, "weight"),
    ],
)
def test_experts_of_unknown_structure_are_refused(shapes: dict[str, tuple[int, ...]], parameter: str) -> None:
    model = nn.Module()
    model.experts = OtherExperts(**shapes)
    with pytest.raises(
        UnsupportedError, match=rf"OtherExperts stacks its experts .*see parameter '{parameter}'"
    ) as seen:
        take_experts_apart(model, no_spelling)
    assert seen.value.where == "experts"


def test_a_class_that_says_otherwise_than_its_shapes_is_refused() -> None:
    experts = OtherExperts(gate_up_proj=(4, 12, 8), down_proj=(4, 8, 6))
    assert find_experts("m.experts", experts, no_spelling) is not None
    experts.is_transposed = True
    with pytest.raises(UnsupportedError, match="OtherExperts"):
        find_experts("m.experts", experts, no_spelling)


def test_other_parameters_with_three_dimensions_stay() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8, 8))

    model = nn.Module()
    model.gates = Gates()
    model.conv = nn.Conv1d(4, 4, 2)
    take_experts_apart(model, no_spelling)
    assert [name for name, _ in model.named_parameters()] == ["gates.weight", "conv.weight", "conv.bias"]


class Odd(nn.Module):
    """Experts whose forward does ``use`` with the stack."""

    def __init__(self, use: Callable[[Any, Tensor], Any], bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, 12, 8))
        self.down_proj = nn.Parameter(torch.empty(2, 8, 6))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(2, 12))
        self.use = use

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Any:
        return self.use(self, hidden_states)


@pytest.mark.parametrize(
    ("use", "bias"),
    [
        (lambda m, x: x @ m.gate_up_proj[0], False),  # a product with the transpose
        (lambda m, x: m.gate_up_proj[0] * 2, False),
        (lambda m, x: m.gate_up_proj.sum(), False),
        (lambda m, x: torch.einsum("th,eoh->eto", x, m.gate_up_proj), False),
        (lambda m, x: torch.bmm(x[None], m.gate_up_proj), False),
        (lambda m, x: m.gate_up_proj[0].t(), False),
        (lambda m, x: nn.functional.linear(x, m.gate_up_proj[0], torch.ones(12)), False),
        (lambda m, x: nn.functional.linear(m.gate_up_proj[0], x), False),
        (lambda m, x: x[:, :1] * m.gate_up_proj_bias[0], True),
    ],
)
def test_a_forward_that_does_something_else_with_the_stack_is_refused(
    use: Callable[[Any, Tensor], Any], bias: bool
) -> None:
    model = nn.Module()
    model.experts = Odd(use, bias)
    take_experts_apart(model, no_spelling)
    with pytest.raises(UnsupportedError, match=r"Odd uses 'gate_up_proj' in a way that is not known"):
        model.experts(torch.ones(3, 8), torch.zeros(3, 1), torch.ones(3, 1))


def test_biases_may_be_given_to_the_product() -> None:
    def use(module: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, module.gate_up_proj[1], module.gate_up_proj_bias[1])

    model = nn.Module()
    model.experts = Odd(use, bias=True)
    take_experts_apart(model, no_spelling)
    model.experts.to_empty(device="cpu")
    for parameter in model.experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    expert = model.experts.get_submodule("1")
    want = torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1)
    assert torch.equal(model.experts(x, torch.zeros(3, 1), torch.ones(3, 1)), want)
    assert model.experts(x[:0], None, None).shape == (0, 12)

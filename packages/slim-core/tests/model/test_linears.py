"""Which modules count as linears: those that compute one, whoever wrote their forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim_core.model.linears import is_linear, keep_float


class Rewritten(nn.Linear):
    """As Falcon has it."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        logits = super().forward(input)
        return logits, logits.softmax(-1)


class Summed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum(-1)


class Needy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.no_such_thing  # pyright: ignore


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("cls", "want"),
    [(nn.Linear, True), (Rewritten, True), (Scaled, False), (Router, False), (Summed, False), (Needy, False)],
)
def test_a_linear_is_what_computes_one(cls: type[nn.Linear], want: bool, device: str, bias: bool) -> None:
    module = cls(6, 4, bias=bias, device=device)
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    state = torch.random.get_rng_state()
    assert is_linear(module) is want
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
    assert (module.in_features, module.out_features) == (6, 4)


def test_what_looks_like_one_is_none() -> None:
    assert not is_linear(nn.Embedding(3, 4))
    assert not is_linear(nn.Conv1d(3, 4, 1))


@pytest.mark.parametrize("cls", [nn.Linear, Rewritten])
def test_a_linear_that_is_to_stay_float_is_none(cls: type[nn.Linear]) -> None:
    module = cls(6, 4)
    x = torch.randn(2, 6)
    want = module(x)
    keep_float(module)
    assert not is_linear(module)
    assert torch.equal(module(x), want)
    assert type(module) is cls


def test_the_projection_of_a_ready_made_attention_is_none() -> None:
    """It is never called: the attention uses its weight by hand."""
    attention = nn.MultiheadAttention(8, 2)
    seen: list[Tensor] = []
    attention.out_proj.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    attention(torch.ones(3, 1, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8))
    assert not seen
    assert not is_linear(attention.out_proj)

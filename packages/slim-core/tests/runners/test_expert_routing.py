"""Tokens are kept and shown to experts, however a layer of experts is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.errors import InvalidModelError
from slim_core.model.experts import ExpertLayer
from slim_core.runners.expert_routing import RoutedTokens

EXPERTS, WIDTH, TOKENS = 4, 3, 20


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.up(x)


class TwoArguments(Expert):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * weights


class Listed(nn.Module):
    """Experts in a list, the last of which gets nothing."""

    def __init__(self, expert: type[Expert] = Expert) -> None:
        super().__init__()
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(len(x)) % (EXPERTS - 1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if bool((hit := index == i).any()):
                given = (x[hit], torch.ones(1)) if isinstance(expert, TwoArguments) else (x[hit],)
                out[hit] = expert(*given)
        return out


class Together(nn.Module):
    """A module that takes tokens, experts and weights, or weights of all experts, or by name; or refuses them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(i): Expert() for i in range(EXPERTS)})
        self.how = how
        self.calls: list[Any] = []

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, flag: bool = True) -> Tensor:
        assert flag
        if self.how == "strict" and index.shape[1] != 2:
            raise ValueError("two experts for every token")
        if self.how == "nan" and len(x) != TOKENS:
            raise InvalidModelError("its activations hold NaN or infinity")
        self.calls.append((x, index, weights))
        out = torch.zeros_like(x)
        for i in range(EXPERTS):
            rows, place = (index == i).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += self.experts[str(i)](x[rows]) * weights[
                    rows, i if self.how == "whole" else place
                ].unsqueeze(1)
        return out


def layer(name: str) -> ExpertLayer:
    return ExpertLayer(name, {i: {"up": f"{name}.{i}.up"} for i in range(EXPERTS)})


def test_a_list_of_experts() -> None:
    model = Listed()
    kept = RoutedTokens(model, layer("experts"), 2, TOKENS)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(x[:13])
        model(x[13:])
        kept.stop()
        model(x)
        experts: list[Any] = list(model.experts)
        before = [len(expert.seen) for expert in experts]
        kept.route(EXPERTS - 1, 2)
    assert [len(expert.seen) for expert in experts] == [*before[:-1], 1]
    (shown,) = experts[-1].seen
    assert len(shown) == 2
    assert all(any(torch.equal(row, one) for one in x) for row in shown)


def test_experts_that_need_more_than_tokens_are_left_alone() -> None:
    model = Listed(TwoArguments)
    kept = RoutedTokens(model, layer("experts"), 2, TOKENS)
    with torch.no_grad():
        model(torch.ones(TOKENS, WIDTH))
        kept.stop()
        kept.route(EXPERTS - 1, 2)
    experts: list[Any] = list(model.experts)
    assert experts[-1].seen == []


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("how", ["each", "whole"])
def test_a_module_that_is_told_which_experts(how: str, by_name: bool) -> None:
    model = nn.Module()
    model.experts = inner = Together(how)
    inner.add_module("0", nn.Identity())
    kept = RoutedTokens(model, layer("experts"), 3, TOKENS)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, EXPERTS if how == "whole" else 2, generator=generator)
    with torch.no_grad():
        inner(x, index=index, weights=weights) if by_name else inner(x, index, weights)
        kept.stop()
        kept.route(1, 3)
    shown, chosen, given = inner.calls[-1]
    # Of every third token (20 // 6) those that did not go to the expert, evenly.
    others = [i for i in range(0, TOKENS, 3) if 1 not in index[i]]
    assert torch.equal(shown, x[[others[i * len(others) // 3] for i in range(3)]])
    assert chosen.tolist() == 3 * [[1]]
    assert given.tolist() == 3 * ([[0.0, 1.0, 0.0, 0.0]] if how == "whole" else [[1.0]])


def test_a_refusal_is_told_and_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Module()
    model.experts = inner = Together("strict")
    kept = RoutedTokens(model, layer("experts"), 3, TOKENS)
    with torch.no_grad():
        inner(torch.ones(TOKENS, WIDTH), torch.zeros(TOKENS, 2, dtype=torch.long), torch.ones(TOKENS, 2))
        for expert in (1, 2):
            kept.route(expert, 3)
    assert caplog.messages == ["experts cannot be asked to compute one expert alone: two experts for every token"]


def test_errors_of_our_own_are_no_refusals() -> None:
    model = nn.Module()
    model.experts = inner = Together("nan")
    kept = RoutedTokens(model, layer("experts"), 3, TOKENS)
    with torch.no_grad():
        inner(torch.ones(TOKENS, WIDTH), torch.zeros(TOKENS, 2, dtype=torch.long), torch.ones(TOKENS, 2))
        with pytest.raises(InvalidModelError, match="NaN"):
            kept.route(1, 3)


def test_fewer_tokens_than_are_wanted() -> None:
    model = nn.Module()
    model.experts = inner = Together("each")
    kept = RoutedTokens(model, layer("experts"), 50, TOKENS)
    index = torch.tensor([[0, 1]] * 7 + [[2, 3]] * 13)
    with torch.no_grad():
        inner(torch.ones(TOKENS, WIDTH), index, torch.ones(TOKENS, 2))
        kept.route(0, 50)
        assert len(inner.calls[-1][0]) == 13
        inner.calls.clear()
        RoutedTokens(model, layer("experts"), 50, TOKENS).route(0, 50)  # nothing has passed
    assert inner.calls == []

"""Feed-forward parts are found, tried, and given some tokens at a time; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.model import portions
from slim_core.model.portions import FeedForward, Portions, feed_forwards, portion_tokens
from slim_core.model.units import LinearInfo

WIDTH, INNER, PORTION = 8, 32, 5


class FeedForwardModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.net:
            x = part(x)
        return x


class Shifting(FeedForwardModule):
    """Looks at the token before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.roll(1, dims=-2))


class Averaging(FeedForwardModule):
    """Looks at all tokens, whatever their order."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


class Counting(FeedForwardModule):
    """Another result for another number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.shape[-2]


class Several(FeedForwardModule):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.ffn = inner

    def forward(self, x: Tensor) -> Tensor:
        given = self.ffn(x)
        return x + (given[0] if isinstance(given, tuple) else given)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions of five tokens."""
    monkeypatch.setattr(portions, "_BYTES", PORTION * INNER * 2)


def model(inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([Block(inner)])}).requires_grad_(False)


def linears(root: nn.Module) -> list[LinearInfo]:
    return [
        LinearInfo(name, name, module.in_features, module.out_features, True, True)
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear)
    ]


def lengths(root: nn.Module, x: Tensor, parts: list[FeedForward]) -> tuple[list[int], Tensor]:
    """How many tokens the first wide linear is given at a time, and what the block makes of them."""
    seen: list[int] = []
    block = root.get_submodule("blocks.0")
    handle = root.get_submodule("blocks.0.ffn.net.0").register_forward_pre_hook(
        lambda _, x: seen.append(x[0].shape[-2])
    )
    chosen = Portions(root)
    chosen.choose(parts)
    seen.clear()
    with torch.no_grad(), chosen.given():
        output = block(x)
    handle.remove()
    return seen, output


@pytest.mark.parametrize("shape", [(13,), (1, 13), (2, 13)])
def test_some_tokens_at_a_time(shape: tuple[int, ...]) -> None:
    root = model(FeedForwardModule())
    parts = feed_forwards(root, "blocks.0", linears(root), ())
    assert parts == [FeedForward("blocks.0.ffn", WIDTH, INNER, frozenset({"blocks.0.ffn.net.0", "blocks.0.ffn.net.2"}))]
    x = torch.randn(*shape, WIDTH)
    step = PORTION if shape[0] != 2 else PORTION // 2
    seen, output = lengths(root, x, parts)
    assert seen == [step] * (13 // step) + [13 % step]
    with torch.no_grad():
        assert torch.allclose(output, root.get_submodule("blocks.0")(x), atol=1e-6)
    assert "forward" not in vars(root.get_submodule("blocks.0.ffn"))


@pytest.mark.parametrize("kind", [Shifting, Averaging, Counting, Several])
def test_what_sees_more_than_single_tokens_stays_whole(kind: type[nn.Module]) -> None:
    root = model(kind())
    parts = feed_forwards(root, "blocks.0", linears(root), ())
    assert len(parts) == 1
    x = torch.randn(1, 13, WIDTH)
    seen, output = lengths(root, x, parts)
    assert seen == [13]
    with torch.no_grad():
        assert torch.equal(output, root.get_submodule("blocks.0")(x))


def test_parts_of_a_kind_are_tried_once() -> None:
    """With two and with three dimensions, all tokens and some."""
    root = model(FeedForwardModule())
    parts = feed_forwards(root, "blocks.0", linears(root), ())
    calls: list[int] = []
    root.get_submodule("blocks.0.ffn").register_forward_pre_hook(lambda _, x: calls.append(x[0].dim()))
    chosen = Portions(root)
    chosen.choose(parts)
    assert calls == [2, 2, 3, 3]
    chosen.choose(parts)
    assert calls == [2, 2, 3, 3]


def test_only_dimensions_that_were_proved() -> None:
    class Three(FeedForwardModule):
        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, width = x.shape
            return super().forward(x.reshape(batch * tokens, width)).reshape(batch, tokens, -1)

    root = model(Three())
    parts = feed_forwards(root, "blocks.0", linears(root), ())
    seen, _ = lengths(root, torch.randn(1, 13, WIDTH), parts)
    assert seen == [5, 5, 3]


def test_gradients_flow_through_all_tokens_at_once() -> None:
    root = model(FeedForwardModule())
    parts = feed_forwards(root, "blocks.0", linears(root), ())
    x = torch.randn(1, 13, WIDTH)
    chosen = Portions(root)
    chosen.choose(parts)
    seen: list[int] = []
    root.get_submodule("blocks.0.ffn.net.0").register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-2]))
    with torch.enable_grad(), chosen.given():
        root.get_submodule("blocks.0")(x)
    assert seen == [13]


def test_experts_and_what_widens_nothing_are_left_alone() -> None:
    root = model(FeedForwardModule())
    found = linears(root)
    assert feed_forwards(root, "blocks.0", found, {"blocks.0.ffn.net.2"}) == []
    narrow = [LinearInfo(info.name, info.prefix, WIDTH, WIDTH, True, True) for info in found]
    assert feed_forwards(root, "blocks.0", narrow, ()) == []


def test_what_asks_for_more_than_one_tensor_is_left_alone() -> None:
    class Conditioned(FeedForwardModule):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + shift)

    root = model(Conditioned())
    assert feed_forwards(root, "blocks.0", linears(root), ()) == []


def test_other_devices_take_larger_portions() -> None:
    assert portion_tokens(INNER, "cpu") == PORTION
    assert portion_tokens(INNER, "npu") > PORTION
    assert portion_tokens(1 << 40, "cpu") == 1

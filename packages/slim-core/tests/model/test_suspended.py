"""The suspended forward on toy models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.errors import InvalidModelError
from slim_core.model.suspended import SuspendedForward


class Block(nn.Module):
    """Positional and keyword arguments, a tuple as output, a count of its calls."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = scale
        self.calls = 0

    def forward(self, x: Tensor, mask: Tensor, *, shift: float = 0.0, **extra: Any) -> tuple[Tensor, dict[str, Any]]:
        self.calls += 1
        return torch.tanh(self.linear(x) * mask) * self.scale + shift, {"extra": extra}


class Plain(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


class Model(nn.Module):
    """Gives every block another mask, keeps state between them and feeds an early output in again."""

    def __init__(self, blocks: int = 3, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width, 1.0 + i) for i in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor, shift: float = 0.0) -> dict[str, Tensor]:
        x = first = self.embed(ids)
        seen: list[int] = []
        for i, block in enumerate(self.blocks):
            mask = (torch.arange(x.shape[1])[:, None] >= i).to(x.dtype)
            x, extra = block(x, mask, shift=shift * i, index=i)
            seen.append(extra["extra"]["index"])
            if i == 1:
                x = x + first
        assert seen == list(range(len(self.blocks)))
        return {"logits": self.head(x), "hidden": x}


class Chain(nn.Module):
    """Calls its blocks in the order given."""

    def __init__(self, order: tuple[int, ...], blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain(4) for _ in range(blocks))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            x = self.blocks[i](hidden_states=x) if i % 2 else self.blocks[i](x)
        return x


def run(model: Any, inputs: list[dict[str, Any]]) -> list[Any]:
    with SuspendedForward(model, list(model.blocks), inputs) as forward:
        forward.start()
        for _ in model.blocks:
            for sample in range(len(inputs)):
                forward.resume(sample, forward.compute(forward.call(sample)))
        return list(forward.outputs)


def samples() -> list[dict[str, Any]]:
    return [{"ids": torch.randint(0, 10, (1, n)), "shift": 0.1 * n} for n in (1, 5, 3)]


@torch.no_grad()
def test_outputs_are_those_of_the_plain_forward() -> None:
    torch.manual_seed(0)
    model, inputs = Model(), samples()
    want = [model(**given) for given in inputs]
    for found, expected in zip(run(model, inputs), want, strict=True):
        assert torch.equal(found["logits"], expected["logits"])
        assert torch.equal(found["hidden"], expected["hidden"])


@torch.no_grad()
def test_every_block_runs_once_for_every_sample() -> None:
    model, inputs = Model(), samples()
    run(model, inputs)
    assert [block.calls for block in model.blocks] == [3, 3, 3]


@torch.no_grad()
def test_calls_carry_the_models_own_arguments() -> None:
    model, inputs = Model(), samples()
    with SuspendedForward(model, list(model.blocks), inputs) as forward:
        forward.start()
        for block in range(3):
            for sample, given in enumerate(inputs):
                call = forward.call(sample)
                assert (call.sample, call.block) == (sample, block)
                assert call.kwargs == {"shift": given["shift"] * block, "index": block}
                assert int(call.args[1].sum()) == max(given["ids"].shape[1] - block, 0)
                forward.resume(sample, forward.compute(call))


@torch.no_grad()
def test_what_is_handed_back_is_what_the_model_goes_on_with() -> None:
    model = Chain((0, 1, 2))
    with SuspendedForward(model, list(model.blocks), [{"x": torch.ones(1, 4)}]) as forward:
        forward.start()
        for value in (5.0, 6.0, 7.0):
            forward.resume(0, torch.full((1, 4), value))
        assert torch.equal(forward.outputs[0], torch.full((1, 4), 7.0))


@torch.no_grad()
def test_blocks_take_weights_while_they_are_suspended() -> None:
    model = Chain((0, 1, 2))
    x = torch.randn(1, 4)
    with SuspendedForward(model, list(model.blocks), [{"x": x}]) as forward:
        forward.start()
        for block in model.blocks:
            block.linear.weight.data = torch.eye(4) * 2
            block.linear.bias.data.zero_()
            forward.resume(0, forward.compute(forward.call(0)))
        assert torch.equal(forward.outputs[0], x * 8)


@torch.no_grad()
def test_hooks_of_a_block_fire_once() -> None:
    model, fired = Chain((0, 1, 2)), []
    model.blocks[1].register_forward_hook(lambda *_: fired.append(1))
    run(model, [{"x": torch.ones(1, 4)}])
    assert fired == [1]


def state(model: Any) -> list[bool]:
    return ["forward" in vars(block) for block in model.blocks]


@torch.no_grad()
def test_leaving_restores_the_blocks() -> None:
    model, x = Chain((0, 1, 2)), torch.randn(2, 4)
    want = model(x)
    with SuspendedForward(model, list(model.blocks), [{"x": x}]) as forward:
        assert state(model) == [True] * 3
        forward.start()  # and never resumed
    assert state(model) == [False] * 3
    assert torch.equal(model(x), want)


@torch.no_grad()
def test_a_forward_that_a_block_had_of_its_own_is_used_and_restored() -> None:
    model, x = Chain((0, 1, 2)), torch.randn(2, 4)

    def doubled(hidden_states: Tensor) -> Tensor:
        return hidden_states * 2

    model.blocks[1].forward = doubled
    want = model(x)
    assert torch.equal(run(model, [{"x": x}])[0], want)
    assert state(model) == [False, True, False]
    assert model.blocks[1].forward is doubled


@torch.no_grad()
def test_an_error_inside_a_block_propagates_and_the_model_is_whole_again() -> None:
    model, x = Chain((0, 1, 2)), torch.randn(2, 4)
    want = model(x)

    def hook(*_: Any) -> None:
        raise ZeroDivisionError("inside")

    handle = model.blocks[1].linear.register_forward_hook(hook)
    with pytest.raises(ZeroDivisionError, match="inside"):
        run(model, [{"x": x}, {"x": x}])
    handle.remove()
    assert state(model) == [False] * 3
    assert torch.equal(model(x), want)


class Fails(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](x)
        if y.sum() > 0:
            raise ValueError("between blocks")
        return super().forward(x)


@torch.no_grad()
def test_an_error_between_blocks_propagates() -> None:
    model = Fails((1, 2))
    with SuspendedForward(model, list(model.blocks), [{"x": torch.ones(1, 4)}]) as forward:
        forward.start()
        with pytest.raises(ValueError, match="between blocks"):
            forward.resume(0, torch.ones(1, 4))
    assert state(model) == [False] * 3


@torch.no_grad()
def test_a_context_manager_around_the_blocks_is_left() -> None:
    left: list[bool] = []

    class Careful(Chain):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            finally:
                left.append(True)

    model = Careful((0, 1, 2))
    with SuspendedForward(model, list(model.blocks), [{"x": torch.ones(1, 4)}] * 2) as forward:
        forward.start()
    assert left == [True, True]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 0, 1, 2), "block 0 was called where block 1 was expected"),
        ((0, 2, 1), "block 2 was called where block 1 was expected"),
        ((1, 2), "block 1 was called where block 0 was expected"),
        ((0, 1, 2, 2), "block 2 was called where the end was expected"),
        ((0, 1), "the forward ended before calling block 2"),
        ((), "the forward ended before calling block 0"),
    ],
)
@torch.no_grad()
def test_blocks_that_are_not_called_once_each_in_order(order: tuple[int, ...], message: str) -> None:
    model = Chain(order)
    with pytest.raises(InvalidModelError, match=f"^Chain: {message}"):
        run(model, [{"x": torch.ones(1, 4)}])
    assert state(model) == [False] * 3


@torch.no_grad()
def test_a_sample_that_is_abandoned_leaves_the_others_alone() -> None:
    left: list[int] = []

    class Careful(Chain):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            finally:
                left.append(int(x[0, 0]))

    model = Careful((0, 1))
    inputs = [{"x": torch.full((1, 4), float(i))} for i in range(3)]
    with SuspendedForward(model, list(model.blocks)[:2], inputs) as forward:
        forward.start()
        forward.abandon(1)
        assert left == [1]
        with pytest.raises(InvalidModelError, match="sample 1 is not suspended"):
            forward.call(1)
        for sample in (0, 2):
            for _ in range(2):
                forward.resume(sample, forward.compute(forward.call(sample)))
    assert left == [1, 0, 2]


@torch.no_grad()
def test_a_finished_sample_is_not_suspended() -> None:
    model = Chain((0,), blocks=1)
    with SuspendedForward(model, list(model.blocks), [{"x": torch.ones(1, 4)}]) as forward:
        forward.start()
        forward.resume(0, torch.ones(1, 4))
        with pytest.raises(InvalidModelError, match="sample 0 is not suspended"):
            forward.call(0)

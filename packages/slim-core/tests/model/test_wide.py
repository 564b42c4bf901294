"""Running parts of a model in float32, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import LazyTensor
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.suspended import BlockCall
from slim_core.model.wide import OnDemand, hidden_of, widened, with_hidden


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4, padding_idx=49)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("steps", torch.tensor(5))
        self.seen: list[type[Tensor]] = []

    def forward(self, ids: Tensor) -> Tensor:
        h = self.first(self.embed(ids))
        self.seen = [type(linear.weight) for linear in (self.first, self.second)]
        return self.second(h) * self.scale + self.steps


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, LazyTensor]:
    torch.manual_seed(0)
    tensors = {n: t.bfloat16() if t.is_floating_point() else t for n, t in Part().state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    return {name: LazyTensor(source, source.meta(name)) for name in source}


def skeleton() -> Part:
    with parameters_on_meta():
        return Part().bfloat16()


def test_what_it_computes(stored: dict[str, LazyTensor]) -> None:
    part, exact = skeleton(), Part()
    exact.load_state_dict({name: value.load() for name, value in stored.items()})
    before = dict(part.named_parameters()) | dict(part.named_buffers())
    ids = torch.arange(7)
    with widened(part, stored), torch.no_grad():
        assert torch.equal(part(ids), exact(ids))
        assert part.seen == [OnDemand, OnDemand]  # no linear has its weight while another part of the model computes
    after = dict(part.named_parameters()) | dict(part.named_buffers())
    assert all(after[name] is value for name, value in before.items())


def test_weights_that_are_used_without_a_call(stored: dict[str, LazyTensor]) -> None:
    """As Mamba does. A matrix on meta would give numbers, but no product."""
    part, exact = skeleton(), Part()
    exact.load_state_dict({name: value.load() for name, value in stored.items()})
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda w: x @ w.T,
        lambda w: nn.functional.linear(x, w),
        lambda w: torch.einsum("bi,oi->bo", x, w),
        lambda w: x.to(w.device, w.dtype) @ w.float().transpose(0, 1),
        lambda w: x @ w.detach().data.view(3, 6).t(),
        lambda w: nn.functional.normalize(w),
    ]
    with widened(part, stored), torch.no_grad():
        weight = part.second.weight
        assert (weight.shape, weight.dtype, weight.ndim, weight.requires_grad) == ((3, 6), torch.float32, 2, False)
        assert weight.device == torch.device("cpu")
        for use in uses:
            assert torch.equal(use(weight), use(exact.second.weight))


def test_only_the_first_rows(stored: dict[str, LazyTensor]) -> None:
    """Enough for ids that are small; the padding id may lie beyond them."""
    part, exact = skeleton(), Part()
    exact.load_state_dict({name: value.load() for name, value in stored.items()})
    rows = {"embed.weight": 8, "second.weight": 2, "scale": 2}
    with widened(part, stored, rows), torch.no_grad():
        assert torch.equal(part(torch.arange(8)), exact(torch.arange(8))[:, :2])
        with pytest.raises(IndexError):
            part(torch.tensor([8]))
    assert part.embed.padding_idx == 49
    with widened(part, stored, {"embed.weight": 50}):
        assert part.embed.padding_idx == 49


def test_everything_is_put_back_after_a_failure(stored: dict[str, LazyTensor]) -> None:
    part = skeleton()
    before = dict(part.named_parameters())
    with pytest.raises(IndexError), widened(part, stored, {"embed.weight": 8}):
        part(torch.tensor([30]))
    assert all(value is before[name] for name, value in part.named_parameters())
    assert not part.first._forward_pre_hooks
    assert not part.first._forward_hooks


def test_hidden_states_of_a_call() -> None:
    half, mask = torch.ones(1, 2, 3).bfloat16(), torch.ones(2, 2, dtype=torch.bool)
    other = torch.zeros(1, 2, 3)
    call = with_hidden(BlockCall(0, 1, (half, (half,)), {"mask": mask}), lambda _: other)
    assert call.args[0] is other
    assert call.args[1][0].dtype == torch.float32
    assert call.kwargs["mask"] is mask
    assert hidden_of(call) is other
    named = with_hidden(BlockCall(0, 1, (), {"hidden_states": half, "x": half}), lambda x: x + 1)
    assert torch.equal(named.kwargs["hidden_states"], torch.full((1, 2, 3), 2.0))
    assert named.kwargs["x"].dtype == torch.float32
    assert hidden_of(named) is named.kwargs["hidden_states"]
    assert hidden_of(BlockCall(0, 1, (3,), {})) is None
    assert hidden_of(BlockCall(0, 1, (), {})) is None

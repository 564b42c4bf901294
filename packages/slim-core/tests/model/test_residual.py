"""Who reads and writes the residual stream of a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import UnsupportedError
from slim_core.model.probing import Findings
from slim_core.model.residual import BlockRoles, BlockTrial, Rank, Seen, find_roles, norm_defect
from slim_core.model.subgraphs import Subgraph

WIDTH = 8


class RootNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


class Block(nn.Module):
    """All square, so that shapes say nothing; experts of which one is never used; and a low rank with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.rank_norm, self.inner_norm = RootNorm(WIDTH), RootNorm(4), RootNorm(WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 6, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.between, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.router = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        x = self.input_norm(h)
        x = self.up(self.rank_norm(self.down(x)[..., 2:]))
        h = h + self.out(torch.relu(self.between(x)))
        y = self.inner_norm(h)
        chosen = (self.router(h)[..., :1] > 0).float()
        return h + chosen * self.experts[0](y) + (1 - chosen) * self.experts[2](y)


def norm_linear(source: str, *targets: str, width: int = WIDTH) -> Subgraph:
    return Subgraph("norm-linear", source, targets, torch.arange(width))


FOUND = Findings(
    [
        norm_linear("b.input_norm", "b.down"),
        norm_linear("b.rank_norm", "b.up", width=4),
        norm_linear("b.inner_norm", "b.experts.0", "b.experts.2", "b.experts.1"),
    ]
)


@pytest.fixture
def trial(tmp_path: Path) -> BlockTrial:
    torch.manual_seed(0)
    root = nn.Module()
    root.add_module("b", Block())
    save_file({name: tensor.clone() for name, tensor in root.state_dict().items()}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    values = {name: LazyTensor(source, source.meta(name)) for name in source}
    return BlockTrial(root, "b", values, lambda hidden: root.b(hidden).detach(), torch.Size((1, 12, WIDTH)))


def test_roles(trial: BlockTrial) -> None:
    roles = find_roles(trial, FOUND)
    assert roles.writers == (("b.out",), ("b.experts.0", "b.experts.1", "b.experts.2"))
    assert [graph.source for graph in roles.norms] == ["b.inner_norm", "b.input_norm"]
    assert roles.raw == ("b.router",)
    assert roles.readers == {"b.down", "b.router", *(f"b.experts.{i}" for i in range(3))}
    (rank,) = roles.ranks
    assert (rank.norm.source, rank.writer, rank.first) == ("b.rank_norm", "b.down", 2)
    assert roles.leaders() == (
        {"b.down": "b.down", "b.router": "b.router"} | {f"b.experts.{i}": "b.experts.0" for i in range(3)}
    )


def test_roles_of_another_block() -> None:
    graph = norm_linear("m.0.n", "m.0.a")
    roles = BlockRoles((graph,), ("m.0.r",), (("m.0.w",),), (graph,), (Rank(graph, "m.0.a", 3),))
    moved = roles.of("m.0", "m.17")
    assert moved.readers == {"m.17.a", "m.17.r"}
    assert moved.writers == (("m.17.w",),)
    assert (moved.ranks[0].writer, moved.ranks[0].first) == ("m.17.a", 3)
    assert moved.values[0].source == moved.ranks[0].norm.source == "m.17.n"


def test_silencing_and_doubling(trial: BlockTrial) -> None:
    everything = ["b.out", "b.experts.0", "b.experts.2"]
    assert not trial.added(silenced=everything).any()
    alone = trial.added(silenced=everything[1:])
    assert torch.allclose(trial.added(silenced=everything[1:], doubled=["b.out"]), 2 * alone, atol=1e-6)
    assert alone.any()
    seen = Seen()
    trial.added(silenced=everything, seen=seen)
    assert torch.equal(seen.inputs["b.inner_norm"], trial.hidden[0])
    assert "b.experts.1" not in seen.inputs
    first = trial.hidden
    trial.draw(1)
    assert not torch.equal(trial.hidden, first)
    trial.draw(0)
    assert torch.equal(trial.hidden, first)


def test_a_stream_norm_whose_readers_are_not_known(trial: BlockTrial) -> None:
    some = Findings(FOUND.subgraphs[1:], {"b.input_norm": "something besides b.down reads its output"})
    with pytest.raises(UnsupportedError, match=r"b\.input_norm: something besides b\.down reads its output"):
        find_roles(trial, some)
    with pytest.raises(UnsupportedError, match=r"b\.input_norm: no linear was found to read its output"):
        find_roles(trial, Findings(FOUND.subgraphs[1:]))


def test_kinds_of_norms(tmp_path: Path) -> None:
    weight, bias, x = torch.randn(5), torch.randn(5), torch.randn(7, 5) + 1
    save_file({"weight": weight, "bias": bias}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    both = {name: LazyTensor(source, source.meta(name)) for name in source}
    only = {"weight": both["weight"]}
    unit = x * x.square().mean(-1, keepdim=True).rsqrt()
    assert norm_defect(only, x, unit * weight, plus_one=False) is None
    assert norm_defect(only, x, unit * (1 + weight), plus_one=True) is None
    assert norm_defect(both, x, unit * weight + bias, plus_one=False) is None
    assert norm_defect(only, x, unit * weight, plus_one=True) == "it is no root mean square norm"
    assert norm_defect(only, x, x * weight, plus_one=False) == "it is no root mean square norm"
    layer = nn.functional.layer_norm(x, (5,), weight, bias)
    assert "subtracts the mean" in (norm_defect(both, x, layer, plus_one=False) or "")

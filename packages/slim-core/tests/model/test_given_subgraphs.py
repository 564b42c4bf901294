"""Subgraphs that an adapter gives: used where names tell nothing, proved like any other, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.adapter import ModelAdapter
from slim_core.model.probing import BlockProbe, Findings
from slim_core.model.structure import Structure
from slim_core.model.subgraphs import GivenSubgraph, candidates

HEADS, DIM, INNER = 4, 4, 12


class Mixer(nn.Module):
    """Attention over values of two heads that four query heads share, with names that nobody else has."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(16, 24)  # sixteen rows of something else, then eight of values
        self.merge = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed(x)
        other, values = packed[..., :16], packed[..., 16:]
        heads = values.unflatten(-1, (2, DIM)).repeat_interleave(2, dim=-2)
        weights = torch.softmax(other @ other.mT, -1)
        return self.merge((weights.unsqueeze(1) @ heads.transpose(1, 2)).transpose(1, 2).flatten(-2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.opened = nn.Linear(16, INNER)
        self.lifted = nn.Linear(16, INNER)
        self.closed = nn.Linear(INNER, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.closed(torch.sigmoid(self.opened(x)) * self.lifted(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.feed = Mixer(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.feed(x)


VALUES = GivenSubgraph("ov", "packed", "merge", first_row=16, head_dim=DIM)
LIFTED = GivenSubgraph("up-down", "lifted", "closed")


@pytest.fixture
def root() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"layers": nn.ModuleList([Block()])})


def probed(root: nn.Module, *given: GivenSubgraph) -> Findings:
    block = root.get_submodule("layers.0")
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
    return BlockProbe(root, "layers.0", lambda: block(x), given).findings()


def test_names_alone_tell_nothing(root: nn.Module) -> None:
    assert candidates(root, "layers.0") == []
    assert probed(root).subgraphs == []


def test_what_is_given_is_proved_and_used(root: nn.Module) -> None:
    up_down, ov = probed(root, VALUES, LIFTED).subgraphs
    assert (up_down.type, up_down.source, up_down.targets) == (
        "up-down",
        "layers.0.feed.lifted",
        ("layers.0.feed.closed",),
    )
    assert (ov.type, ov.source, ov.targets) == ("ov", "layers.0.mixer.packed", ("layers.0.mixer.merge",))
    assert ov.rows is not None
    assert ov.rows.tolist() == list(range(16, 24))
    assert ov.columns.tolist() == [*range(4), *range(4), *range(4, 8), *range(4, 8)]


@pytest.mark.parametrize(
    "wrong",
    [
        GivenSubgraph("up-down", "opened", "closed"),  # a sigmoid lies between
        GivenSubgraph("ov", "packed", "merge", first_row=8, channels=8, head_dim=DIM),  # these rows are no values
        GivenSubgraph("ov", "packed", "merge", first_row=16),  # one head of eight, which lies otherwise
    ],
)
def test_what_does_not_hold_is_refused(root: nn.Module, wrong: GivenSubgraph) -> None:
    found = probed(root, wrong)
    assert found.subgraphs == []
    (reason,) = found.refused.values()
    assert "changes what the block computes" in reason


@pytest.mark.parametrize(
    "wrong",
    [
        GivenSubgraph("ov", "packed", "merge", first_row=17, head_dim=DIM),
        GivenSubgraph("ov", "packed", "merge", first_row=16, head_dim=3),
        GivenSubgraph("ov", "packed", "merge", first_row=16, channels=9, head_dim=3),
        GivenSubgraph("up-down", "packed", "merge"),
        GivenSubgraph("norm-linear", "lifted", "closed"),
        GivenSubgraph("sideways", "lifted", "closed"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_an_error(root: nn.Module, wrong: GivenSubgraph) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0\.(mixer\.packed|feed\.lifted): .*adapter"):
        probed(root, wrong)


def test_it_takes_the_place_of_what_the_name_suggests(root: nn.Module) -> None:
    feed: Any = root.get_submodule("layers.0.feed")
    feed.up_proj, feed.down_proj = feed.lifted, feed.closed
    del feed.lifted, feed.closed
    (by_name,) = candidates(root, "layers.0")
    (options,) = candidates(root, "layers.0", [GivenSubgraph("linear-linear", "up_proj", "down_proj")])
    assert by_name[0].source == options[0].source
    assert (by_name[0].type, options[0].type) == ("up-down", "linear-linear")


def test_what_the_adapter_leaves_alone_is_not_smoothed(root: nn.Module) -> None:
    structure = Structure({"layers.0": probed(root, VALUES, LIFTED)})
    names = {name: "float32" for name, _ in root.named_parameters()}
    model: Any = _Model(root, names)
    assert len(structure.smoothable(model).subgraphs()) == 2
    model.unsmoothed = ("*.mixer.packed",)
    left = structure.smoothable(model)
    assert [graph.source for graph in left.subgraphs()] == ["layers.0.feed.lifted"]
    assert left.refused() == {"layers.0.mixer.packed": "the model's adapter says to leave it alone"}


class _Model:
    """As much of a streamed model as is asked for."""

    def __init__(self, root: nn.Module, names: dict[str, str]) -> None:
        self.module, self.unsmoothed = root, ModelAdapter().unsmoothed
        self.units = [_Unit(names)]


class _Unit:
    name = "layers.0"

    def __init__(self, names: dict[str, str]) -> None:
        self.parameters = {name: name for name in names}

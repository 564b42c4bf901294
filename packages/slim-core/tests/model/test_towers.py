"""Towers: parts that run as a whole ahead of the decoder blocks, and that a sample may pass by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.suspended import SuspendedForward
from slim_core.model.tower_inputs import TowerInputs
from slim_core.runners.calibration import BlockForwards

CPU = torch.device("cpu")


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(6, 8)
        self.deep = nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"seen": self.patches(pixels), "later": self.deep(pixels)}


class Looking(nn.Module):
    """Embeds ids; what a picture makes, if there is one, comes in front, and again between the blocks."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.eye = Eye()
        self.bridge = nn.Linear(8, 4)
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 10)
        self.calls = calls

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        later = None
        if pixel_values is not None:
            for _ in range(self.calls):
                seen = self.eye(pixel_values)
            x, later = torch.cat([self.bridge(seen["seen"]), x], 1), seen["later"]
        for block in self.blocks:
            x = block(x)
            if later is not None:
                x[:, : later.shape[1]] += later
        return self.head(x)


@pytest.fixture
def plain() -> Looking:
    torch.manual_seed(0)
    return Looking().eval()


@pytest.fixture
def model(plain: Looking, tmp_path: Path) -> StreamedModel:
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, tmp_path / "model.safetensors")
    with parameters_on_meta():
        module = Looking()
    return StreamedModel(module, Checkpoint(tmp_path), tmp_path, {}, ("blocks",), towers=("eye", "bridge"))


def inputs(*pictures: int) -> list[dict[str, Any]]:
    """A sample for each number: of the patches of its picture; 0: there is none."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, 2, 3]])
    return [{"input_ids": ids, "pixel_values": torch.randn(1, n, 6)} if n else {"input_ids": ids} for n in pictures]


def stream(model: StreamedModel, given: Sequence[Any], streams: int = 1) -> Iterator[Any]:
    with torch.no_grad(), BlockForwards(model, given, CPU, streams) as forwards:
        for unit in model.running:
            forwards.reach(unit)
            model.load(unit.parameters, CPU)
            for at in range(streams - 1):
                forwards.run(hand_on=True, stream=at)
            if unit is model.running[-1]:
                forwards.run_to_end()
            else:
                forwards.run(hand_on=True)
            model.unload(unit.parameters)
        for sample in range(len(given)):
            yield forwards.finish(sample)
        assert forwards.given() == (len(given), 0)


def test_towers_are_units_ahead_of_the_blocks(model: StreamedModel) -> None:
    units = {unit.name: (unit.stop, unit.block) for unit in model.units}
    assert units == {
        "prologue": (None, None),
        "eye": (0, None),
        "bridge": (1, None),
        "blocks.0": (2, 0),
        "blocks.1": (3, 1),
        "blocks.2": (4, 2),
        "epilogue": (None, None),
    }
    places = {info.name: (info.in_block, info.in_decoder) for unit in model.units for info in unit.linears}
    assert places == {
        "eye.patches": (True, False),
        "eye.deep": (True, False),
        "bridge": (True, False),
        **{f"blocks.{i}": (True, True) for i in range(3)},
        "head": (False, False),
    }
    assert model.outside == ["embed.weight", "head.weight", "head.bias"]
    assert sorted(name for unit in model.units for name in unit.tensors) == sorted(model.source)


@torch.no_grad()
@pytest.mark.parametrize("pictures", [(2, 1), (0, 0), (2, 0, 3), (0, 1)])
def test_samples_with_and_without_a_picture(model: StreamedModel, plain: Looking, pictures: tuple[int, ...]) -> None:
    expected = [plain(**given) for given in inputs(*pictures)]
    for found, wanted in zip(stream(model, inputs(*pictures)), expected, strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_only_those_with_a_picture_are_run_by_a_tower(model: StreamedModel) -> None:
    given = inputs(2, 0, 1)
    with BlockForwards(model, given, CPU) as forwards:
        eye = model.running[0]
        forwards.reach(eye)
        model.load(eye.parameters, CPU)
        assert forwards.present() == [0, 2]
        outputs = forwards.run(hand_on=False, keep=True)
        assert [None if output is None else output["seen"].shape[1] for output in outputs] == [2, None, 1]
        assert forwards.count == 2
        forwards.hand_on(outputs)
        forwards.reach(model.running[1])
        assert forwards.present() == [0, 2]


@torch.no_grad()
@pytest.mark.parametrize("streams", [1, 2])
def test_a_sample_is_asked_for_when_it_starts_and_its_pixels_go_when_the_towers_are_done(
    model: StreamedModel, plain: Looking, streams: int
) -> None:
    made: list[TowerInputs] = []
    alive: list[int] = []

    class Late(Sequence[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, at: Any) -> Any:
            made.append(TowerInputs(inputs(2, 1, 3)[at], ["pixel_values"]))
            alive.append(sum(not bool(one["pixel_values"].isnan().any()) for one in made))
            return made[-1]

    found = list(stream(model, Late(), streams))
    expected = [plain(**given) for given in inputs(2, 1, 3)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(made) == 3 * streams
    assert alive == list(range(1, 3 * streams + 1))  # all wait for the second tower; only then they go
    assert all(bool(one["pixel_values"].isnan().all()) for one in made)
    assert [one["pixel_values"].shape[1] for one in made[:3]] == [2, 1, 3]


def test_what_is_let_go_takes_no_memory_and_cannot_be_used_unnoticed() -> None:
    pixels, grid, ids = torch.ones(4, 6), torch.tensor([[1, 2, 2]]), torch.tensor([[1]])
    given = TowerInputs({"pixel_values": pixels, "grid": grid, "input_ids": ids}, ["pixel_values", "grid", "absent"])
    view = pixels
    assert given.for_towers() == [pixels]
    given.let_go()
    assert view.shape == (4, 6)
    assert view.untyped_storage().nbytes() == 4
    assert bool((view * 2).isnan().all())
    assert grid.tolist() == [[1, 2, 2]]


@torch.no_grad()
def test_a_tower_that_runs_twice() -> None:
    module = Looking(calls=2)
    stops = [module.eye, module.bridge, *module.blocks]
    with SuspendedForward(module, stops, inputs(2), optional=2) as forward:
        forward.start()
        with pytest.raises(InvalidModelError, match=r"Eye was called where Linear was expected.*in an adapter"):
            forward.resume(0, forward.compute(forward.call(0)))


@torch.no_grad()
def test_blocks_must_still_come_in_order() -> None:
    module = Looking()
    stops = [module.eye, module.bridge, module.blocks[1], module.blocks[0], module.blocks[2]]
    with (
        pytest.raises(InvalidModelError, match="block 1 was called where Eye was expected"),
        SuspendedForward(module, stops, inputs(0), optional=2) as forward,
    ):
        forward.start()

"""Models with several lists of blocks: double-stream blocks whose outputs are joined for single-stream ones."""

from __future__ import annotations

from dataclasses import replace
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
from slim_core.runners.calibration import BlockForwards

CPU = torch.device("cpu")
LISTS = ("both", "joint")


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 4)
        self.image = nn.Linear(4, 4)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(text) + image.mean(1, keepdim=True), self.image(image)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.joint = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))  # registered first, run last
        self.both = nn.ModuleList(Double() for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image = self.embed(image)
        for double in self.both:
            text, image = double(image, text=text)
        joined = torch.cat([text, image], 1)
        for single in self.joint:
            joined = joined + single(joined)
        return self.norm(joined[:, text.shape[1] :])


@pytest.fixture
def plain() -> TwoStreams:
    torch.manual_seed(0)
    return TwoStreams().eval()


def opened(plain: TwoStreams, folder: Path, lists: tuple[str, ...] = LISTS) -> StreamedModel:
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, folder / "model.safetensors")
    with parameters_on_meta():
        module = TwoStreams()
    return StreamedModel(module, Checkpoint(folder), folder, {}, lists)


def test_units_are_in_the_order_of_the_lists(plain: TwoStreams, tmp_path: Path) -> None:
    model = opened(plain, tmp_path)
    running = ["both.0", "both.1", "joint.0", "joint.1", "joint.2"]
    assert [unit.name for unit in model.running] == running
    assert [unit.block for unit in model.running] == list(range(5))
    assert [unit.name for unit in model.units] == ["prologue", *running, "epilogue"]
    assert model.owner("joint.1.weight") == "joint.1"
    assert {info.name: info.in_block for unit in model.units for info in unit.linears} == {
        "embed": False,
        **{f"joint.{i}": True for i in range(3)},
        **{f"both.{i}.{part}": True for i in range(2) for part in ("text", "image")},
    }


def test_outputs_are_those_of_the_plain_forward(plain: TwoStreams, tmp_path: Path) -> None:
    torch.manual_seed(1)
    samples = [{"image": torch.randn(1, n, 3), "text": torch.randn(1, 2, 4)} for n in (3, 5)]
    model = opened(plain, tmp_path)
    with torch.no_grad(), BlockForwards(model, samples, CPU) as forwards:
        outputs = forwards.run_model()
        wanted = [plain(**sample) for sample in samples]
    assert all(torch.equal(*pair) for pair in zip(outputs, wanted, strict=True))


def test_another_order_is_refused(plain: TwoStreams, tmp_path: Path) -> None:
    model = opened(plain, tmp_path, ("joint", "both"))
    samples = [{"image": torch.randn(1, 3, 3), "text": torch.randn(1, 2, 4)}]
    with torch.no_grad(), BlockForwards(model, samples, CPU) as forwards, pytest.raises(InvalidModelError) as told:
        forwards.reach(model.running[0])
    assert "block 3 was called where block 0 was expected" in str(told.value)


class Skipping(TwoStreams):
    """Leaves out what a call names, as guidance by skipped layers does."""

    def forward(self, image: Tensor, text: Tensor, without: tuple[str, ...] = ()) -> Tensor:
        image = self.embed(image)
        for number, double in enumerate(self.both):
            if f"both.{number}" not in without:
                text, image = double(image, text=text)
        joined = torch.cat([text, image], 1)
        for number, single in enumerate(self.joint):
            if f"joint.{number}" not in without:
                joined = joined + single(joined)
        return self.norm(joined[:, text.shape[1] :])


SKIPPED = [("both.0",), (), ("both.1", "joint.0"), ("both.0", "joint.1")]


def skipping(folder: Path, *, skips: bool = True) -> tuple[StreamedModel, list[dict[str, Any]], Skipping]:
    torch.manual_seed(0)
    plain = Skipping().eval()
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, folder / "model.safetensors")
    with parameters_on_meta():
        module = Skipping()
    samples = [{"image": torch.randn(1, 3, 3), "text": torch.randn(1, 2, 4), "without": each} for each in SKIPPED]
    return StreamedModel(module, Checkpoint(folder), folder, {}, LISTS, skips=skips), samples, plain


def test_calls_may_pass_blocks_by(tmp_path: Path) -> None:
    model, samples, plain = skipping(tmp_path)
    present: dict[str, list[int]] = {}
    with torch.no_grad(), BlockForwards(model, samples, CPU) as forwards:
        for unit in model.running:
            forwards.reach(unit)
            present[unit.name] = forwards.present()
            model.load(unit.parameters, CPU)
            if unit is model.running[-1]:
                forwards.run_to_end()
            else:
                forwards.run(hand_on=True)
            model.unload(unit.parameters)
        outputs = [forwards.finish(sample) for sample in range(len(samples))]
        wanted = [plain(**sample) for sample in samples]
    assert all(torch.equal(*pair) for pair in zip(outputs, wanted, strict=True))
    assert present == {
        name: [sample for sample, without in enumerate(SKIPPED) if name not in without]
        for name in ("both.0", "both.1", "joint.0", "joint.1", "joint.2")
    }


def test_only_where_the_model_is_known_to(tmp_path: Path) -> None:
    model, samples, _ = skipping(tmp_path, skips=False)
    with (
        torch.no_grad(),
        BlockForwards(model, samples, CPU) as forwards,
        pytest.raises(InvalidModelError, match=r"block 1 was called where block 0 was expected.*without calibration"),
    ):
        forwards.reach(model.running[0])


def test_going_back_is_refused(plain: TwoStreams, tmp_path: Path) -> None:
    model = replace(opened(plain, tmp_path, ("joint", "both")), skips=True)
    samples = [{"image": torch.randn(1, 3, 3), "text": torch.randn(1, 2, 4)}]
    with torch.no_grad(), BlockForwards(model, samples, CPU) as forwards:
        for unit in model.running[:-1]:
            forwards.reach(unit)
            model.load(unit.parameters, CPU)
            forwards.run(hand_on=True)
        model.load(model.running[-1].parameters, CPU)
        forwards.reach(model.running[-1])
        forwards.run_to_end()
        with pytest.raises(InvalidModelError, match="block 0 was called where the end was expected"):
            forwards.finish(0)


def test_lists_that_take_turns(plain: TwoStreams, tmp_path: Path) -> None:
    model = replace(opened(plain, tmp_path), in_turns=True)
    running = ["both.0", "joint.0", "both.1", "joint.1", "joint.2"]
    assert [unit.name for unit in model.running] == running
    assert [unit.block for unit in model.running] == list(range(5))
    assert model.blocks == [model.module.get_submodule(name) for name in running]

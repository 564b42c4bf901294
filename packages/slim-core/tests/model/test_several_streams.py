"""Blocks that hand on several streams, such as text and image: a scale must leave all of them as they were."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import discover


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)


class Block(nn.Module):
    """Of the image's MLP the text reads what is in the middle, so that nothing moves there; of its own it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.other = Mlp(), Mlp(), nn.Linear(12, 8)

    def forward(self, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        assert text is not None
        inner = torch.sigmoid(self.image.gate_proj(image)) * self.image.up_proj(image)
        own = torch.sigmoid(self.text.gate_proj(text)) * self.text.up_proj(text)
        text = text + self.text.down_proj(own) + self.other(inner).mean(1, keepdim=True)
        return image + self.image.down_proj(inner), text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            image, text = block(image, text)
        return torch.cat([image, text], 1)


def test_a_scale_that_only_the_second_stream_feels_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    with parameters_on_meta():
        model = StreamedModel(Net(), Checkpoint(tmp_path), tmp_path, {}, ("blocks",))
    found = discover(model, {"image": torch.randn(1, 5, 8), "text": torch.randn(1, 3, 8)}).findings["blocks.0"]
    assert [graph.source for graph in found.subgraphs] == ["blocks.0.text.up_proj"]
    assert list(found.refused) == ["blocks.0.image.up_proj"]

"""Which list of modules is taken for the decoder blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from slim_core.errors import InvalidModelError
from slim_core.model.skeleton import parameters_on_meta
from slim_llm.models.blocks import find_text_blocks


class _Config:
    num_hidden_layers = 2

    def get_text_config(self, decoder: bool = False) -> _Config:
        assert decoder
        return self


class _Net(nn.Module):
    """A text decoder of two layers of 8 x 8 beside a tower with a larger list of them."""

    def __init__(self, decoder: str | None = "text") -> None:
        super().__init__()
        self.config = _Config()
        self.tower = nn.Module()
        self.tower.layers = layers(4, 16)
        self.text = nn.Module()
        self.text.layers = layers(2, 8)
        self._decoder = decoder

    def get_decoder(self) -> Any:
        return self.get_submodule(self._decoder) if self._decoder is not None else None


def layers(count: int, size: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(size, size) for _ in range(count))


def test_the_decoder_that_the_model_names_has_them() -> None:
    assert find_text_blocks(_Net()) == "text.layers"


@pytest.mark.parametrize("decoder", [None, "", "nowhere"])
def test_no_part_of_the_model_is_named(decoder: str | None) -> None:
    assert find_text_blocks(_Net(decoder)) == "tower.layers"


def test_a_decoder_that_is_no_part_of_the_model() -> None:
    net = _Net()
    net.get_decoder = lambda: SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    assert find_text_blocks(net) == "tower.layers"


def test_of_several_lists_the_one_as_long_as_the_model_is_deep() -> None:
    net = _Net()
    net.text.between = layers(3, 32)
    net.text.empty = nn.ModuleList(nn.ReLU() for _ in range(2))
    net.text.gates = layers(2, 4)
    assert find_text_blocks(net) == "text.layers"
    del net.text.layers, net.text.gates
    assert find_text_blocks(net) == "text.between", "none is as long, so the largest"


def test_a_list_further_down_in_the_decoder() -> None:
    net = _Net()
    net.text.inner = nn.Module()
    net.text.inner.layers = net.text.layers
    del net.text.layers
    assert find_text_blocks(net) == "text.inner.layers"


def test_a_decoder_without_a_list_is_passed_by() -> None:
    net = _Net()
    del net.text.layers
    assert find_text_blocks(net) == "tower.layers"
    del net.tower.layers
    with pytest.raises(InvalidModelError, match="_Net has no list of decoder blocks"):
        find_text_blocks(net)


def test_idefics_whose_vision_encoder_is_the_larger_list() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = {"embed_dim": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "idefics",
        vocab_size=64,
        additional_vocab_size=2,
        cross_layer_interval=2,
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        perceiver_config={"use_resampler": False},
        **text,
    )
    with parameters_on_meta():
        model = AutoModelForImageTextToText.from_config(config)
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    assert max(sizes, key=lambda name: sizes[name]) != "model.layers"
    assert find_text_blocks(model) == "model.layers"

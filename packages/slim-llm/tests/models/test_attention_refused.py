"""Attentions whose states cannot be reached, with the reason."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from slim_core.errors import SpecError
from slim_llm.models.attention import Attentions


class Untapped(nn.Module):
    """An attention whose class is unknown to transformers: it calls no interface and takes no cache."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.head_dim, self.num_heads = 8, 4
        self.k_proj, self.v_proj = nn.Linear(size, 16), nn.Linear(size, 16)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None


class FusedAttention(Untapped):
    """The same with a projection that goes by another name, but with a cache."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        del self.k_proj, self.v_proj
        self.both = nn.Linear(size, 32)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:
            past_key_values.update(hidden_states, hidden_states, 0)
        return hidden_states, None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Untapped, "Untapped neither calls the attention interface of transformers nor updates a cache"),
        (FusedAttention, "the projections of FusedAttention are not known by name"),
    ],
)
def test_attentions_that_cannot_be_reached_say_so(tiny: ModuleType, kind: Any, reason: str) -> None:
    model = tiny.family("llama")
    model.model.layers[1].self_attn = kind(32)
    attentions = Attentions(model)
    info = attentions.attentions[1]
    assert reason in info.problem
    with pytest.raises(SpecError, match=reason), attentions.tapped({info.name: lambda *_: None}):
        pass


def test_an_attention_that_does_not_pass_its_tap_is_an_error(tiny: ModuleType) -> None:
    model = tiny.family("llama")
    attentions = Attentions(model)
    name = "model.layers.1.self_attn"
    model.get_submodule(name).forward = lambda hidden_states, **_: (hidden_states, None)
    with (
        pytest.raises(SpecError, match=rf"{name}: the attention ran without handing .* cannot be quantized"),
        attentions.tapped({name: lambda *_: None}),
    ):
        tiny.run(model, tiny.tokens())


def test_states_of_another_shape_are_an_error(tiny: ModuleType) -> None:
    model = tiny.family("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.num_key_value_groups = 4
    attentions = Attentions(model)
    attention.num_key_value_groups = 2
    with (
        pytest.raises(SpecError, match=r"model\.layers\.1\.self_attn: its states have the shape \[2, 4, 11, 8\]"),
        attentions.tapped({"model.layers.1.self_attn": lambda *_: None}),
    ):
        tiny.run(model, tiny.tokens())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 7}, "k_proj has 16 output features, which are no whole heads of 7"),
        ({"num_heads": None}, "neither the module nor the configuration says how many heads it has"),
    ],
)
def test_structures_that_are_not_understood(settings: dict[str, Any], message: str) -> None:
    class OddAttention(Untapped):
        pass

    model = nn.Module()
    model.attention = OddAttention(16)
    for name, value in settings.items():
        setattr(model.attention, name, value)
    model.config = SimpleNamespace()
    (info,) = Attentions(model).attentions
    assert message in info.problem

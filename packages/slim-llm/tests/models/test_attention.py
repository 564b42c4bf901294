"""Reaching the states of attentions: what is seen is what a cache holds, and nothing else changes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionKind, QuantizedAttention, QuantizedState, StateForm
from slim_llm.models.attention import Attentions


def test_what_is_known_of_attentions(tiny: ModuleType, every_family: str) -> None:
    model = tiny.family(every_family)
    infos = Attentions(model).attentions
    assert not any(info.problem for info in infos)
    assert {(i.heads, i.kv_heads, i.key_dim, i.value_dim) for i in infos} == {tiny.FAMILIES[every_family][2]}
    expected = {"qwen3_next": 1, "gemma3n": 4}.get(every_family, 3)
    assert len(infos) == expected
    assert all(info.prefix == info.name for info in infos)
    blind = [info for info in infos if not info.sees_query]
    assert len(blind) == (0 if every_family in tiny.MODERN else {"gemma3n": 2}.get(every_family, 3))


class RecordingCache(DynamicCache):
    """A cache whose copies are not used, because their layout in memory changes the last bits of products."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kw)
        return key_states, value_states


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_taps_see_what_a_cache_holds_and_change_nothing(
    tiny: ModuleType, every_family: str, implementation: str | None
) -> None:
    model = tiny.family(every_family, implementation)
    before = tiny.hooks(model)
    ids = tiny.tokens()
    plain = tiny.run(model, ids)
    seen, logits = tiny.observe(model, ids)
    assert torch.equal(logits, plain)
    assert tiny.hooks(model) == before
    cache = RecordingCache(config=model.config)
    tiny.run(model, ids, use_cache=True, past_key_values=cache)
    assert seen
    for info in Attentions(model).attentions:
        ((query, key, value),) = seen[info.name]
        layer = cache.layers[layer_index(model.get_submodule(info.name))]
        assert torch.equal(key, layer.keys)
        assert torch.equal(value, layer.values)
        assert (query is not None) == info.sees_query
        if query is not None:
            assert query.shape == (2, info.heads, 11, info.key_dim)


def layer_index(attention: Any) -> int:
    return attention.layer_idx


def test_layers_of_linear_attention_are_passed_over(tiny: ModuleType) -> None:
    model = tiny.family("qwen3_next")
    assert [type(layer).__name__ for layer in model.model.layers]
    assert hasattr(model.model.layers[0], "linear_attn")
    assert [info.name for info in Attentions(model).attentions] == ["model.layers.3.self_attn"]


class QuantizingCache(DynamicCache):
    """A cache that quantizes what it is given; independent of taps."""

    def __init__(self, states: dict[int, QuantizedAttention], config: Any) -> None:
        super().__init__(config=config)
        self.states = states

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        _, key, value = self.states[layer_idx].simulate(None, key_states, value_states)
        super().update(key, value, layer_idx, *args, **kw)
        return key, value


def random_cache(info: AttentionInfo, seed: int) -> QuantizedAttention:
    generator = torch.Generator().manual_seed(seed)
    form = StateForm("int8", "per_channel", symmetric=False)

    def state(dim: int) -> QuantizedState:
        size = info.kv_heads * dim
        scale = torch.rand(size, generator=generator) * 0.1 + 0.01
        return QuantizedState(form, scale, torch.randint(-20, 20, (size,), generator=generator).float())

    return QuantizedAttention(AttentionKind.C8, None, state(info.key_dim), state(info.value_dim))


def test_replaced_keys_and_values_are_those_of_a_quantized_cache(tiny: ModuleType, every_family: str) -> None:
    model = tiny.family(every_family)
    attentions = Attentions(model)
    made = {info.name: random_cache(info, i) for i, info in enumerate(attentions.attentions)}
    ids = tiny.tokens()
    with attentions.tapped({name: quantized.simulate for name, quantized in made.items()}):
        found = tiny.run(model, ids)
    by_layer = {layer_index(model.get_submodule(name)): quantized for name, quantized in made.items()}
    expected = tiny.run(model, ids, use_cache=True, past_key_values=QuantizingCache(by_layer, model.config))
    assert torch.equal(found, expected)
    assert not torch.equal(found, tiny.run(model, ids))


def test_a_replaced_query_is_used(tiny: ModuleType, modern_family: str) -> None:
    """Powers of two move between query and key without rounding anything."""
    model = tiny.family(modern_family)
    attentions = Attentions(model)
    ids = tiny.tokens()

    def swap(query: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert query is not None
        return query * 4, key / 4, value

    def louder(query: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert query is not None
        return query * 4, key, value

    names = [info.name for info in attentions.attentions]
    with attentions.tapped(dict.fromkeys(names, swap)):
        assert torch.equal(tiny.run(model, ids), tiny.run(tiny.family(modern_family), ids))
    with attentions.tapped(dict.fromkeys(names, louder)):
        assert not torch.equal(tiny.run(model, ids), tiny.run(tiny.family(modern_family), ids))


@pytest.fixture(scope="module")
def latent_model(tiny: ModuleType) -> Any:
    return tiny.build("DeepseekV3Config", tiny.MLA)


def test_latent_attention_shows_what_engines_store(tiny: ModuleType, latent_model: Any) -> None:
    ids = tiny.tokens()
    before = tiny.hooks(latent_model)
    seen, logits = tiny.observe(latent_model, ids)
    assert torch.equal(logits, tiny.run(latent_model, ids))
    assert tiny.hooks(latent_model) == before
    cache = RecordingCache(config=latent_model.config)
    tiny.run(latent_model, ids, use_cache=True, past_key_values=cache)
    infos = Attentions(latent_model).attentions
    assert [(i.heads, i.kv_heads, i.key_dim, i.value_dim, i.latent) for i in infos] == [(4, 1, 16, 16, True)] * 3
    for index, info in enumerate(infos):
        ((query, key, value),) = seen[info.name]
        attention = latent_model.get_submodule(info.name)
        assert torch.equal(key, cache.layers[index].keys)
        assert value is key
        assert query is not None
        assert query.shape == (2, 4, 11, 16)
        weight = attention.kv_b_proj.weight.view(4, 8 + 6, 16)
        queries: list[Tensor] = []
        handle = attention.q_b_proj.register_forward_hook(lambda _m, _a, out, to=queries: to.append(out))
        tiny.run(latent_model, ids)
        handle.remove()
        nope = queries[0].view(2, 11, 4, 12).transpose(1, 2)[..., :8]
        torch.testing.assert_close(query, torch.einsum("bhsn,hnr->bhsr", nope, weight[:, :8]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_latent_attention_with_replaced_states(tiny: ModuleType, implementation: str) -> None:
    model = tiny.build("DeepseekV3Config", tiny.MLA, implementation)
    attentions = Attentions(model)
    names = [info.name for info in attentions.attentions]
    ids = tiny.tokens()
    with attentions.tapped(dict.fromkeys(names, lambda query, key, value: (query, key, value))):
        torch.testing.assert_close(
            tiny.run(model, ids), tiny.run(tiny.build("DeepseekV3Config", tiny.MLA, implementation), ids)
        )
    with attentions.tapped(dict.fromkeys(names, lambda query, key, value: (query * 2, key / 2, value))):
        torch.testing.assert_close(
            tiny.run(model, ids), tiny.run(tiny.build("DeepseekV3Config", tiny.MLA, implementation), ids)
        )

    # One latent that all tokens and heads share as their value: attention gives it back whatever the scores are.
    latent = torch.randn(16, generator=torch.Generator().manual_seed(1))
    first = model.model.layers[0].self_attn
    outputs: list[Tensor] = []
    handle = first.o_proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    with attentions.tapped({names[0]: lambda query, key, value: (query, key, latent.expand_as(value))}):
        tiny.run(model, ids)
    handle.remove()
    expected = (first.kv_b_proj.weight.view(4, 14, 16)[:, 8:] @ latent).flatten()
    torch.testing.assert_close(outputs[0], expected.expand(2, 11, -1))


def test_names_of_the_checkpoint(tiny: ModuleType) -> None:
    model = tiny.family("llama")
    attentions = Attentions(model, lambda name: name.replace("model.layers", "h").replace("self_attn", "attention"))
    assert [info.prefix for info in attentions.attentions] == [f"h.{i}.attention" for i in range(3)]
    assert [info.name for info in attentions.attentions] == [f"model.layers.{i}.self_attn" for i in range(3)]

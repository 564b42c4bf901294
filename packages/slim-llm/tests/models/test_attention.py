"""Reaching the states of attentions: what is seen is what a cache holds, and nothing else changes."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import GeneralInterface

from slim_core.errors import SpecError
from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionKind, QuantizedAttention, QuantizedState, StateForm
from slim_llm.models.attention import Attentions

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OLD: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MLA: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}
NEXT: dict[str, Any] = {
    **SMALL,
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 6,
    "sliding_window": 64,
}
# Family to configuration class, settings, and (heads, kv_heads, key_dim, value_dim) of its attentions.
MODERN: dict[str, tuple[str, dict[str, Any], tuple[int, int, int, int]]] = {
    "llama": ("LlamaConfig", SMALL, (4, 2, 8, 8)),
    "qwen2": ("Qwen2Config", SMALL, (4, 2, 8, 8)),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 16}, (4, 2, 16, 16)),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "sliding_window": 64}, (4, 2, 8, 8)),
    "phi3": ("Phi3Config", SMALL, (4, 2, 8, 8)),
    "glm4": ("Glm4Config", SMALL, (4, 2, 8, 8)),
    "gpt_neox": ("GPTNeoXConfig", {**OLD, "intermediate_size": 48}, (4, 4, 8, 8)),
    "opt": ("OPTConfig", {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32}, (4, 4, 8, 8)),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}, (4, 4, 8, 8)),
    "qwen3_next": ("Qwen3NextConfig", NEXT, (4, 2, 8, 8)),
}
FALLBACK: dict[str, tuple[str, dict[str, Any], tuple[int, int, int, int]]] = {
    "falcon": ("FalconConfig", OLD, (4, 1, 8, 8)),
    "bloom": ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}, (4, 4, 8, 8)),
    "mpt": ("MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 4}, (4, 4, 8, 8)),
    "gptj": ("GPTJConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}, (4, 4, 8, 8)),
    "gemma3n": ("Gemma3nTextConfig", SHARED, (4, 2, 8, 8)),
}
FAMILIES = MODERN | FALLBACK
Seen = dict[str, list[tuple[Tensor | None, Tensor, Tensor]]]


def build(name: str, settings: dict[str, Any], implementation: str | None = None) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            elif path.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def family(name: str, implementation: str | None = None) -> Any:
    kind, settings, _ = FAMILIES[name]
    return build(kind, settings, implementation)


def tokens(seed: int = 0, batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({"use_cache": False} | options)).logits


def observe(model: nn.Module, ids: Tensor) -> tuple[Seen, Tensor]:
    """What the taps of all attentions see in one forward, and its logits."""
    attentions = Attentions(model)
    seen: Seen = {info.name: [] for info in attentions.attentions}
    taps = {name: lambda *states, name=name: seen[name].append(states) for name in seen}
    with attentions.tapped(taps):
        logits = run(model, ids)
    return seen, logits


def hooks(model: nn.Module) -> list[object]:
    """Everything a tap could leave behind on a model or on transformers."""
    left: list[object] = [vars(AttentionInterface).get(name) for name in ("get_interface", "__getitem__", "get")]
    left += [vars(GeneralInterface).get("__getitem__")]
    for module in model.modules():
        left += [len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module))]
    return left


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_known_of_attentions(name: str) -> None:
    model = family(name)
    infos = Attentions(model).attentions
    assert not any(info.problem for info in infos)
    assert {(i.heads, i.kv_heads, i.key_dim, i.value_dim) for i in infos} == {FAMILIES[name][2]}
    expected = {"qwen3_next": 1, "gemma3n": 4}.get(name, 3)
    assert len(infos) == expected
    assert all(info.prefix == info.name for info in infos)
    blind = [info for info in infos if not info.sees_query]
    assert len(blind) == (0 if name in MODERN else {"gemma3n": 2}.get(name, 3))


class RecordingCache(DynamicCache):
    """A cache whose copies are not used, because their layout in memory changes the last bits of products."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kw)
        return key_states, value_states


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_taps_see_what_a_cache_holds_and_change_nothing(name: str, implementation: str | None) -> None:
    model = family(name, implementation)
    before = hooks(model)
    ids = tokens()
    plain = run(model, ids)
    seen, logits = observe(model, ids)
    assert torch.equal(logits, plain)
    assert hooks(model) == before
    cache = RecordingCache(config=model.config)
    run(model, ids, use_cache=True, past_key_values=cache)
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


def test_layers_of_linear_attention_are_passed_over() -> None:
    model = family("qwen3_next")
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


@pytest.mark.parametrize("name", FAMILIES)
def test_replaced_keys_and_values_are_those_of_a_quantized_cache(name: str) -> None:
    model = family(name)
    attentions = Attentions(model)
    made = {info.name: random_cache(info, i) for i, info in enumerate(attentions.attentions)}
    ids = tokens()
    with attentions.tapped({name: quantized.simulate for name, quantized in made.items()}):
        found = run(model, ids)
    by_layer = {layer_index(model.get_submodule(name)): quantized for name, quantized in made.items()}
    expected = run(model, ids, use_cache=True, past_key_values=QuantizingCache(by_layer, model.config))
    assert torch.equal(found, expected)
    assert not torch.equal(found, run(model, ids))


@pytest.mark.parametrize("name", MODERN)
def test_a_replaced_query_is_used(name: str) -> None:
    """Powers of two move between query and key without rounding anything."""
    model = family(name)
    attentions = Attentions(model)
    ids = tokens()

    def swap(query: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert query is not None
        return query * 4, key / 4, value

    def louder(query: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert query is not None
        return query * 4, key, value

    names = [info.name for info in attentions.attentions]
    with attentions.tapped(dict.fromkeys(names, swap)):
        assert torch.equal(run(model, ids), run(family(name), ids))
    with attentions.tapped(dict.fromkeys(names, louder)):
        assert not torch.equal(run(model, ids), run(family(name), ids))


@pytest.fixture(scope="module")
def latent_model() -> Any:
    return build("DeepseekV3Config", MLA)


def test_latent_attention_shows_what_engines_store(latent_model: Any) -> None:
    ids = tokens()
    before = hooks(latent_model)
    seen, logits = observe(latent_model, ids)
    assert torch.equal(logits, run(latent_model, ids))
    assert hooks(latent_model) == before
    cache = RecordingCache(config=latent_model.config)
    run(latent_model, ids, use_cache=True, past_key_values=cache)
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
        run(latent_model, ids)
        handle.remove()
        nope = queries[0].view(2, 11, 4, 12).transpose(1, 2)[..., :8]
        torch.testing.assert_close(query, torch.einsum("bhsn,hnr->bhsr", nope, weight[:, :8]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_latent_attention_with_replaced_states(implementation: str) -> None:
    model = build("DeepseekV3Config", MLA, implementation)
    attentions = Attentions(model)
    names = [info.name for info in attentions.attentions]
    ids = tokens()
    with attentions.tapped(dict.fromkeys(names, lambda query, key, value: (query, key, value))):
        torch.testing.assert_close(run(model, ids), run(build("DeepseekV3Config", MLA, implementation), ids))
    with attentions.tapped(dict.fromkeys(names, lambda query, key, value: (query * 2, key / 2, value))):
        torch.testing.assert_close(run(model, ids), run(build("DeepseekV3Config", MLA, implementation), ids))

    # One latent that all tokens and heads share as their value: attention gives it back whatever the scores are.
    latent = torch.randn(16, generator=torch.Generator().manual_seed(1))
    first = model.model.layers[0].self_attn
    outputs: list[Tensor] = []
    handle = first.o_proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    with attentions.tapped({names[0]: lambda query, key, value: (query, key, latent.expand_as(value))}):
        run(model, ids)
    handle.remove()
    expected = (first.kv_b_proj.weight.view(4, 14, 16)[:, 8:] @ latent).flatten()
    torch.testing.assert_close(outputs[0], expected.expand(2, 11, -1))


def test_names_of_the_checkpoint() -> None:
    model = family("llama")
    attentions = Attentions(model, lambda name: name.replace("model.layers", "h").replace("self_attn", "attention"))
    assert [info.prefix for info in attentions.attentions] == [f"h.{i}.attention" for i in range(3)]
    assert [info.name for info in attentions.attentions] == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_only_the_named_attentions_are_tapped() -> None:
    model = family("llama")
    attentions = Attentions(model)
    seen: list[Any] = []
    with attentions.tapped({"model.layers.1.self_attn": lambda *states: seen.append(states)}):
        run(model, tokens())
    assert len(seen) == 1
    before = hooks(model)
    with attentions.tapped({}):
        assert hooks(model) == before


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_nothing_stays_after_an_error(name: str) -> None:
    model = family(name)
    attentions = Attentions(model)
    before, ids = hooks(model), tokens()
    plain = run(model, ids)

    def broken(*_states: Any) -> None:
        raise ValueError("broken tap")

    with pytest.raises(ValueError, match="broken tap"), attentions.tapped({attentions.attentions[1].name: broken}):
        run(model, ids)
    assert hooks(model) == before
    with pytest.raises(KeyError), attentions.tapped({attentions.attentions[0].name: broken, "no.such": broken}):
        pass
    assert hooks(model) == before
    assert torch.equal(run(model, ids), plain)


def test_threads_do_not_disturb_each_other() -> None:
    """Two models are tapped at once, entering and leaving in the other's middle; a third is not tapped at all."""
    models = [family("llama"), family("qwen3")]
    before = [hooks(model) for model in models]
    expected = [observe(model, tokens())[0] for model in models]
    found: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=60)
    left = threading.Event()

    def work(index: int) -> None:
        model = models[index]
        attentions = Attentions(model)
        seen: Seen = {info.name: [] for info in attentions.attentions}
        if index == 1:
            barrier.wait()
        with attentions.tapped({n: lambda *states, n=n: seen[n].append(states) for n in seen}):
            if index == 0:
                barrier.wait()
            barrier.wait()
            if index == 1:
                left.wait(60)
            run(model, tokens())
            found[index] = seen
        left.set()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for name, states in expected[index].items():
            for one, other in zip(found[index][name][0], states[0], strict=True):
                assert torch.equal(one, other)
    assert [hooks(model) for model in models] == before


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
def test_attentions_that_cannot_be_reached_say_so(kind: Any, reason: str) -> None:
    model = family("llama")
    model.model.layers[1].self_attn = kind(32)
    attentions = Attentions(model)
    info = attentions.attentions[1]
    assert reason in info.problem
    with pytest.raises(SpecError, match=reason), attentions.tapped({info.name: lambda *_: None}):
        pass


def test_an_attention_that_does_not_pass_its_tap_is_an_error() -> None:
    model = family("llama")
    attentions = Attentions(model)
    name = "model.layers.1.self_attn"
    model.get_submodule(name).forward = lambda hidden_states, **_: (hidden_states, None)
    with (
        pytest.raises(SpecError, match=rf"{name}: the attention ran without handing .* cannot be quantized"),
        attentions.tapped({name: lambda *_: None}),
    ):
        run(model, tokens())


def test_states_of_another_shape_are_an_error() -> None:
    model = family("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.num_key_value_groups = 4
    attentions = Attentions(model)
    attention.num_key_value_groups = 2
    with (
        pytest.raises(SpecError, match=r"model\.layers\.1\.self_attn: its states have the shape \[2, 4, 11, 8\]"),
        attentions.tapped({"model.layers.1.self_attn": lambda *_: None}),
    ):
        run(model, tokens())


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


def test_samples_that_stand_in_the_middle_of_the_model_are_not_confused() -> None:
    """The suspended forward runs blocks from the outside while other samples stand in the middle of the model."""
    from slim_core.model.suspended import SuspendedForward

    model = family("llama")
    attentions = Attentions(model)
    ids = [tokens(seed, batch=1, length=5 + seed) for seed in range(3)]
    expected = [observe(model, each)[0] for each in ids]
    inputs = [{"input_ids": each, "use_cache": False} for each in ids]
    with torch.no_grad(), SuspendedForward(model, list(model.model.layers), inputs) as forward:
        forward.start()
        for block in range(3):
            name = f"model.layers.{block}.self_attn"
            seen: list[Any] = []
            with attentions.tapped({name: lambda *states, seen=seen: seen.append(states)}):
                for sample in range(3):
                    forward.resume(sample, forward.compute(forward.call(sample)))
            for sample in range(3):
                for one, other in zip(seen[sample], expected[sample][name][0], strict=True):
                    assert torch.equal(one, other)

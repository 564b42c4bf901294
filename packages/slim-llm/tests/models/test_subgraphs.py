"""What can be smoothed in the blocks of real architectures, found and proved without knowing their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slim_core.model.probing import BlockProbe, Findings
from slim_core.model.skeleton import find_blocks
from slim_core.model.subgraphs import Subgraph
from slim_core.model.suspended import SuspendedForward

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OV = ("ov", "self_attn.v_proj", ("self_attn.o_proj",))
UP_DOWN = ("up-down", "mlp.up_proj", ("mlp.down_proj",))
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
PLAIN = [UP_DOWN, OV, ("norm-linear", "input_layernorm", QKV)]
LLAMA = [*PLAIN, ("norm-linear", "post_attention_layernorm", GATE_UP)]
GEMMA = [*PLAIN, ("norm-linear", "pre_feedforward_layernorm", GATE_UP)]
GELU = "changes what the block computes"
EXPECTED: dict[str, tuple[str, dict[str, Any], list[tuple[str, str, tuple[str, ...]]], dict[str, str]]] = {
    "llama": ("LlamaConfig", {}, LLAMA, {}),
    "qwen2": ("Qwen2Config", {}, LLAMA, {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}, LLAMA, {}),
    "gemma2": ("Gemma2Config", {}, GEMMA, {}),
    "gemma3": ("Gemma3TextConfig", {}, GEMMA, {}),
    "glm4": (
        "Glm4Config",
        {},
        [
            ("up-down", "mlp.gate_up_proj", ("mlp.down_proj",)),
            *PLAIN[1:],
            ("norm-linear", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        ],
        {},
    ),
    "phi3": (
        "Phi3Config",
        {},
        [
            ("up-down", "mlp.gate_up_proj", ("mlp.down_proj",)),
            ("ov", "self_attn.qkv_proj", ("self_attn.o_proj",)),
            ("norm-linear", "input_layernorm", ("self_attn.qkv_proj",)),
            ("norm-linear", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        ],
        {},
    ),
    # Norms behind the sublayers: nothing that a norm could be divided for reads it alone.
    "olmo2": ("Olmo2Config", {}, PLAIN[:2], {}),
    # One norm in front of attention and MLP.
    "cohere": ("CohereConfig", {}, [*PLAIN[:2], ("norm-linear", "input_layernorm", QKV + GATE_UP)], {}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {},
        [
            ("ov", "attention.query_key_value", ("attention.dense",)),
            ("norm-linear", "input_layernorm", ("attention.query_key_value",)),
            ("norm-linear", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ],
        {"mlp.dense_h_to_4h": GELU},
    ),
    "falcon": (
        "FalconConfig",
        {"head_dim": None, "num_key_value_heads": None},
        [
            ("ov", "self_attention.query_key_value", ("self_attention.dense",)),
            ("norm-linear", "input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ],
        {"mlp.dense_h_to_4h": GELU},
    ),
    "falcon, groups of heads": (
        "FalconConfig",
        {"head_dim": None, "num_key_value_heads": None, "new_decoder_architecture": True, "num_kv_heads": 2},
        [
            ("ov", "self_attention.query_key_value", ("self_attention.dense",)),
            ("norm-linear", "ln_attn", ("self_attention.query_key_value",)),
            ("norm-linear", "ln_mlp", ("mlp.dense_h_to_4h",)),
        ],
        {"mlp.dense_h_to_4h": GELU},
    ),
    # ReLU passes a positive scale on, GELU does not.
    "opt": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        [
            ("up-down", "fc1", ("fc2",)),
            ("ov", "self_attn.v_proj", ("self_attn.out_proj",)),
            ("norm-linear", "self_attn_layer_norm", QKV),
            ("norm-linear", "final_layer_norm", ("fc1",)),
        ],
        {},
    ),
    "starcoder2": (
        "Starcoder2Config",
        {},
        [*PLAIN[1:], ("norm-linear", "post_attention_layernorm", ("mlp.c_fc",))],
        {"mlp.c_fc": GELU},
    ),
    # Values are clipped, though not those of the sample.
    "olmo": ("OlmoConfig", {"clip_qkv": 50.0}, [UP_DOWN], {"self_attn.v_proj": GELU}),
}
FAMILIES = list(EXPECTED)


def tiny(config: str, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A random model whose norms are no ones and whose biases are no zeros."""
    base = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    given = {key: value for key, value in {**base, **settings}.items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**given)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape) * 0.3
        else:
            parameter *= 5
    return model


def probe(model: nn.Module, number: int = 0) -> tuple[Findings, str]:
    name = find_blocks(model)
    blocks = list(model.get_submodule(name))  # pyright: ignore[reportArgumentType]
    inputs = {"input_ids": torch.arange(1, 21)[None], "use_cache": False}
    with torch.no_grad(), SuspendedForward(model, blocks, [inputs]) as forward:
        forward.start()

        def run() -> Tensor:
            output = forward.compute(forward.call(0))
            return output if isinstance(output, Tensor) else output[0]

        for _ in range(number):
            forward.resume(0, forward.compute(forward.call(0)))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = BlockProbe(model, f"{name}.{number}", run).findings()
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    return found, f"{name}.{number}."


def short(graph: Subgraph, prefix: str) -> tuple[str, str, tuple[str, ...]]:
    return graph.type, graph.source.removeprefix(prefix), tuple(t.removeprefix(prefix) for t in graph.targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype) -> None:
    config, settings, graphs, refused = EXPECTED[family]
    found, prefix = probe(tiny(config, settings, dtype), 1)
    assert [short(graph, prefix) for graph in found.subgraphs] == graphs
    assert found.refused.keys() == {prefix + name for name in refused}
    for name, reason in refused.items():
        assert reason in found.refused[prefix + name]
    plus_one = {graph.plus_one for graph in found.subgraphs if graph.type == "norm-linear"}
    assert plus_one <= {family.startswith("gemma")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_of_a_low_rank(dtype: torch.dtype) -> None:
    """Gemma 3n has one beside the attention."""
    settings = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    settings |= {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}
    found, prefix = probe(tiny("Gemma3nTextConfig", settings, dtype), 1)
    chained = [short(graph, prefix) for graph in found.subgraphs if graph.type == "linear-linear"]
    assert chained == [("linear-linear", "laurel.linear_left", ("laurel.linear_right",))]


def test_what_is_gated_before_it_is_read() -> None:
    """A scale passes the gate of MiniMax's linear attention, a shift would not."""
    settings = {"num_local_experts": 2, "layer_types": ["full_attention", "linear_attention"]}
    found, prefix = probe(tiny("MiniMaxConfig", settings, torch.float32), 1)
    (gated,) = [graph for graph in found.subgraphs if graph.type == "norm-linear"]
    assert short(gated, prefix) == ("norm-linear", "self_attn.norm", ("self_attn.out_proj",))
    assert not gated.direct
    for config in ("LlamaConfig", "GPTNeoXConfig", "Qwen3MoeConfig"):
        found, _ = probe(tiny(config, {}, torch.float32))
        assert {graph.direct for graph in found.subgraphs if graph.type == "norm-linear"} == {True}


def test_a_reader_that_is_no_matrix_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm whose output is also used some other way cannot be divided."""
    model = tiny("LlamaConfig", {}, torch.float32)
    block = type(model.model.layers[0])  # pyright: ignore
    plain = block.forward

    def spying(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return plain(self, hidden_states, **kwargs) + self.input_layernorm(hidden_states)  # pyright: ignore

    monkeypatch.setattr(block, "forward", spying)
    found, prefix = probe(model)
    assert [short(graph, prefix) for graph in found.subgraphs] == [LLAMA[0], LLAMA[1], LLAMA[3]]
    assert "something besides" in found.refused[f"{prefix}input_layernorm"]

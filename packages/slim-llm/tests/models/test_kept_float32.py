"""Weights that transformers keeps in float32 in models of 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slim_core.model.suspended import SuspendedForward
from slim_llm.models.kept_float32 import keep_float32
from slim_llm.models.loading import open_model

CPU = torch.device("cpu")
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """DeepSeek V3 whose experts' biases are stored in float32 and differ by less than 16 bits tell apart."""

    def make(dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.mktemp("deepseek")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **SIZES), dtype=dtype)
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        # Scores of one token lie closely around a half, so the biases decide; in 16 bits they would all be 100.
        spread = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        tensors[BIAS] = 100 + spread * 0.01
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes_and_logits_are_those_of_transformers(
    deepseek: Callable[[torch.dtype], Path], dtype: torch.dtype
) -> None:
    folder = deepseek(dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    want = {name: tensor.dtype for name, tensor in plain.state_dict().items() if "experts" not in name}
    assert want[BIAS] == torch.float32
    assert set(want.values()) == {torch.float32, dtype}
    model = open_model(folder)
    stored = model.module.state_dict()
    assert {name: stored[name].dtype for name in want} == want
    model.load([name for unit in model.units for name in unit.parameters], CPU)
    bias = model.module.get_buffer(BIAS)
    assert torch.equal(bias, load_file(folder / "model.safetensors")[BIAS])
    assert len(bias.to(dtype).unique()) < 8, "else 16 bits would do"
    ids = torch.arange(24)[None]
    given = {"input_ids": ids, "use_cache": False}
    with SuspendedForward(model.module, model.blocks, [given]) as forward:
        forward.start()
        for _ in model.blocks:
            forward.resume(0, forward.compute(forward.call(0)))
        assert torch.equal(forward.outputs[0].logits, plain(**given).logits)


class _Net(nn.Module):
    _keep_in_fp32_modules = ("norm",)
    _keep_in_fp32_modules_strict = ("gate.*weight",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = type("Config", (), {"dtype": dtype})()
        self.norm = nn.LayerNorm(4, dtype=dtype)
        self.gate = nn.Linear(4, 4, dtype=dtype)
        self.tied = nn.Module()
        self.tied.weight = self.gate.weight
        self.register_buffer("gate_weight", torch.ones(2, dtype=dtype), persistent=False)


@pytest.mark.parametrize(
    ("dtype", "norm", "gate"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_by_dtype_of_the_model(dtype: torch.dtype, norm: torch.dtype, gate: torch.dtype) -> None:
    net = _Net(dtype)
    keep_float32(net)
    assert (net.norm.weight.dtype, net.norm.bias.dtype) == (norm, norm)
    assert (net.gate.weight.dtype, net.gate.bias.dtype) == (gate, dtype)
    assert net.tied.weight is net.gate.weight
    assert net.get_buffer("gate_weight").dtype == dtype, "what is computed is no weight"


def test_other_modules_are_left_alone() -> None:
    net = nn.Linear(2, 2, dtype=torch.bfloat16)
    keep_float32(net)
    assert net.weight.dtype == torch.bfloat16

"""``quarot`` on real architectures: what is written computes the same, and loses less to quantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slim_core.evaluation.verify import verify_folder

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py
EXAMPLE = Path(__file__).parents[4] / "examples" / "tiny-qwen3"
HELDOUT = (EXAMPLE.parent / "heldout.txt").read_text()[:1500]
QUAROT: dict[str, Any] = {"type": "quarot"}
IDS = [[61 * i % 3000 for i in range(40)]]
# Dense with and without biases, tied heads, fused projections, qk norms, mixtures with routers and shared experts, and
# low ranks. The last two have blocks of several kinds, one of them without attention heads that could be rotated.
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "qwen3_moe", "deepseek_v3"]
MORE = ["qwen2_moe", "glm4_moe", "mixtral", "qwen3_next", "nemotron_h"]


@pytest.mark.parametrize(
    ("family", "block_size"), [*((one, -1) for one in [*FAMILIES, *MORE]), *((one, 8) for one in FAMILIES)]
)
def test_the_rotated_model_computes_the_same(
    stranger: Stranger,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    family: str,
    block_size: int,
) -> None:
    folder = model_folder(family, torch.float32)
    quantize(folder, tmp_path / "out", process=[QUAROT | {"block_size": block_size}])
    assert stranger.error(folder, tmp_path / "out", IDS) < 1e-4
    written, before = naive.read(tmp_path / "out"), naive.read_tensors(folder)[0]
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["optional"] == {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}
    assert description["metadata"] == {}
    assert rotation.dtype == torch.float32
    assert torch.allclose(rotation.double() @ rotation.double().T, torch.eye(32).double(), atol=1e-6)
    embedding = next(name for name in before if name.endswith(("embed_tokens.weight", "embeddings.weight")))
    assert torch.allclose(written.tensors[embedding], before[embedding] @ rotation, atol=1e-5)
    assert bool((written.tensors[embedding] - before[embedding]).abs().max() > 0.1)
    used = int((rotation != 0).sum(1).max())
    assert used == (32 if block_size == -1 else block_size)


def test_stacked_experts_with_biases(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """A family that is written with other names than transformers loads; routers, experts and heads have biases."""
    folder = model_folder("gpt_oss", torch.float32)
    quantize(folder, tmp_path / "out", process=[QUAROT])
    result = stranger.scores(folder, tmp_path / "out", HELDOUT, sequence_length=32)
    assert result.kl_divergence < 1e-6
    assert result.top1_agreement > 0.999


def test_a_tied_head_is_untied(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder = model_folder("qwen2", torch.float32)
    assert "lm_head.weight" not in naive.read_tensors(folder)[0]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    quantize(folder, tmp_path / "out", process=[QUAROT])
    tensors = naive.read(tmp_path / "out").tensors
    before = naive.read_tensors(folder)[0]
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    expected = before["model.embed_tokens.weight"] * before["model.norm.weight"] @ rotation
    assert torch.allclose(tensors["lm_head.weight"], expected, atol=1e-5)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))
    verification = verify_folder(tmp_path / "out", folder)
    assert verification.ok, verification.text()
    assert not [text for text in verification.warnings if "lm_head" in text]


def test_low_ranks_and_value_heads_are_rotated(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """Not only the residual stream: with multi-head latent attention there are three more spaces."""
    folder = model_folder("deepseek_v3", torch.float32)
    quantize(folder, tmp_path / "out", process=[QUAROT])
    written, before = naive.read(tmp_path / "out").tensors, naive.read_tensors(folder)[0]
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"].double()
    at = "model.layers.0.self_attn."

    def turned_from_left(name: str, norm: str) -> Tensor:
        """What has happened to a weight from the left."""
        only_right = before[name].double() * before[norm].double() @ rotation
        return torch.linalg.lstsq(only_right.T, written[name].double().T).solution.T

    for name, rank in ((at + "q_a_proj.weight", 16), (at + "kv_a_proj_with_mqa.weight", 16)):
        left = turned_from_left(name, "model.layers.0.input_layernorm.weight")
        assert torch.allclose(left @ left.T, torch.eye(len(left)).double(), atol=1e-4)
        assert torch.allclose(left[:rank, :rank].abs(), torch.full((rank, rank), 0.25).double(), atol=1e-4)
        assert torch.allclose(left[rank:, rank:], torch.eye(len(left) - rank).double(), atol=1e-4)
    for norm in ("q_a_layernorm", "kv_a_layernorm"):
        assert torch.equal(written[f"{at}{norm}.weight"], torch.ones(16))
    # Heads of kv_b_proj are [key | value]: rotations keep the length of what they turn, and keys are left alone.
    keys, values = (written[at + "kv_b_proj.weight"].view(4, 16, 16)[:, part] for part in (slice(0, 8), slice(8, 16)))
    gain = before[at + "kv_a_layernorm.weight"]
    old = (before[at + "kv_b_proj.weight"] * gain).view(4, 16, 16)
    assert torch.allclose(keys.norm(dim=2), old[:, :8].norm(dim=2), rtol=1e-4)
    assert torch.allclose(values.norm(dim=(1, 2)), old[:, 8:].norm(dim=(1, 2)), rtol=1e-4)
    assert not torch.allclose(values.norm(dim=2), old[:, 8:].norm(dim=2), rtol=1e-2)


def test_without_the_extra_information(
    rules: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    quantize(model_folder("llama"), tmp_path / "out", process=[QUAROT | {"export_extra_info": False}, rules["dynamic"]])
    assert not (tmp_path / "out" / "optional").exists()
    assert json.loads((tmp_path / "out" / "quant_model_description.json").read_text())["optional"] == {}


def test_outliers_are_gone(stranger: Stranger, naive: ModuleType, quantize: Quantize, tmp_path: Path) -> None:
    """The shipped model has outlier channels. Its largest hidden values, in units of their token, shrink."""
    quantize(EXAMPLE, tmp_path / "out", process=[QUAROT])
    rotated = stranger.opened(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()

    def tails(model: nn.Module) -> Tensor:
        with torch.no_grad():
            states = model(input_ids=torch.tensor(IDS), use_cache=False, output_hidden_states=True).hidden_states[1:-1]
        return torch.stack(
            [torch.quantile((x / x.square().mean(-1, keepdim=True).sqrt()).abs(), 0.9999) for x in states]
        )

    assert bool((tails(rotated) < 0.65 * tails(original)).all())


@pytest.mark.parametrize("rule", ["dynamic", "static"])
def test_quantization_gains(rules: Any, stranger: Stranger, quantize: Quantize, tmp_path: Path, rule: str) -> None:
    losses: list[float] = []
    for name, process in (("plain", [rules[rule]]), ("rotated", [QUAROT, rules[rule]])):
        quantize(EXAMPLE, tmp_path / name, process=process)
        losses.append(stranger.scores(EXAMPLE, tmp_path / name, HELDOUT).kl_divergence)
    assert losses[1] < 0.2 * losses[0]


def test_rotation_then_smoothing_then_quantization(
    rules: Any, stranger: Stranger, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """The whole chain: exact in float, one forward of each block for every sample once it is quantized."""
    folder = model_folder("qwen2", torch.float32)
    smooth = {"type": "iter_smooth", "alpha": 0.5}
    quantize(folder, tmp_path / "float", process=[QUAROT, smooth])
    smoothed = stranger.opened(tmp_path / "float")
    assert stranger.error(folder, tmp_path / "float", IDS) < 1e-4
    norm = naive.read(tmp_path / "float").tensors["model.layers.0.input_layernorm.weight"]
    assert not torch.allclose(norm, torch.ones(32), atol=0.01)
    result = quantize(folder, tmp_path / "out", process=[QUAROT, smooth, rules["static"]])
    assert result.block_forwards == 3 * 5
    assert verify_folder(tmp_path / "out", folder).ok
    seen = naive.read(tmp_path / "out")
    for module in seen.quantized():  # what was calibrated is what the smoothed and rotated model shows
        assert seen.kind(module) == "W8A8"
    names = [name for name in seen.quantized() if ".layers.1." in name]
    low, high = naive.ranges(smoothed, names, IDS)[names[0]]
    scale = float(seen.tensors[f"{names[0]}.input_scale"])
    assert 0.2 < (high - low) / (255 * scale) < 5

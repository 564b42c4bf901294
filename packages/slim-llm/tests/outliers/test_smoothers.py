"""Smoothing of real architectures: what is written computes the same, and loses less to quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slim_core.evaluation.verify import verify_folder

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "glm4", "phi3", "olmo2", "qwen3_moe", "deepseek_v3")
BLOCKS, SAMPLES = 3, 5
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.8}
SHIFT = ITER | {"symmetric": False}
SMOOTH: dict[str, Any] = {"type": "smooth_quant"}
KEYS: dict[str, Any] = {"type": "kv_smooth"}


ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py


@pytest.mark.parametrize("process", [ITER, SHIFT], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smoothed_model_computes_the_same(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
    process: dict[str, Any],
) -> None:
    model = model_folder(family, torch.float32)
    result = quantize(model, tmp_path / "out", process=[process])
    assert result.block_forwards == BLOCKS * SAMPLES
    assert not result.linears
    before, after = stranger.tensors(model), stranger.tensors(tmp_path / "out")
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert len(changed) >= 2 * BLOCKS
    added = {name for name in after if name.endswith("norm.bias") and name not in before}
    # The norms of OLMo 2 stand behind the linears, and there is nothing to shift.
    assert bool(added) == ("symmetric" in process and family != "olmo2")
    assert stranger.error(model, tmp_path / "out", token_ids) <= 1e-4
    report = verify_folder(tmp_path / "out", model)
    assert not report.problems


def test_everything_together_computes_the_same(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
) -> None:
    model = model_folder("qwen2", torch.float32)
    group = {"type": "group", "configs": [KEYS | {"smooth_factor": 0.5}, SMOOTH | {"symmetric": False}]}
    result = quantize(model, tmp_path / "out", process=[SHIFT, group, KEYS])
    assert result.block_forwards == BLOCKS * SAMPLES
    smooth = stranger.opened(tmp_path / "out")
    assert stranger.far(stranger.logits(stranger.opened(model), token_ids), stranger.logits(smooth, token_ids)) <= 1e-4


@pytest.fixture(scope="module")
def with_outliers(stranger: Stranger, model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that computes what the plain one does, with large channels: behind every norm, and in one head's keys."""
    plain, folder = model_folder("llama", torch.float32), tmp_path_factory.mktemp("outliers")
    for file in plain.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    state = stranger.tensors(plain)
    for layer in range(BLOCKS):
        block = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", [f"self_attn.{name}_proj" for name in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            state[f"{block}.{norm}.weight"][5] *= 100
            for reader in readers:
                state[f"{block}.{reader}.weight"][:, 5] /= 100
        for channel in (1, 5):  # a pair of the first key head, which the first two query heads look at
            state[f"{block}.self_attn.k_proj.weight"][channel] *= 100
            for head in (0, 1):
                state[f"{block}.self_attn.q_proj.weight"][8 * head + channel] /= 100
    save_file(state, folder / "model.safetensors")
    return folder


def divergence(stranger: Stranger, model: Path, written: Path) -> float:
    text = "The with statement wraps the execution of a block with methods. " * 6
    return float(stranger.scores(model, written, text, sequence_length=24, max_windows=3).kl_divergence or 0)


@pytest.mark.parametrize("smoother", [ITER, SHIFT, SMOOTH], ids=str)
def test_smoothing_wins_back_what_outliers_cost(
    rules: Any, stranger: Stranger, with_outliers: Path, quantize: Quantize, tmp_path: Path, smoother: dict[str, Any]
) -> None:
    rule = rules["static"] | {"exclude": ["*down_proj", "*o_proj"]}
    lost: list[float] = []
    for name, process in (("plain", [rule]), ("smoothed", [smoother, rule])):
        quantize(with_outliers, tmp_path / name, process=process)
        lost.append(divergence(stranger, with_outliers, tmp_path / name))
    assert lost[1] < lost[0] / 5


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_smoothed_keys_win_back_what_outliers_cost(
    stranger: Stranger, with_outliers: Path, quantize: Quantize, tmp_path: Path, factor: float
) -> None:
    """With one scale for a head; a cache with a scale for every channel does not mind outliers."""
    rule = {"type": "fa3_quant", "details": {"fa_k": {"dtype": "int8", "scope": "per_head"}}}
    lost: list[float] = []
    for name, process in (("plain", [rule]), ("smoothed", [KEYS | {"smooth_factor": factor}, rule])):
        quantize(with_outliers, tmp_path / name, process=process)
        lost.append(divergence(stranger, with_outliers, tmp_path / name))
    assert lost[1] < lost[0] / 5

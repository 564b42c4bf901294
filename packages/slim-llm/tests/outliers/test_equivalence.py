"""What smoothing and rotations leave is the same model, of every architecture that the tests know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.processors.linear_quant import LinearQuant

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py
DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "glm4", "olmo2"]
SPARSE = ["qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "minimax_m2", "deepseek_v2", "deepseek_v3", "glm4_moe"]
SPARSE += ["olmoe", "gpt_oss", "llama4", "phimoe", "longcat", "jetmoe", "nemotron_h", "minimax"]
ODD = ["zamba2", "olmo", "mamba", "deepseek_v32"]
# Their experts are written one by one, as engines read them, and transformers does not put them together again.
UNSTACKED = {"gpt_oss", "llama4", "jetmoe"}
# Latent attention has no keys, Llama 4 normalises them behind rotary embedding, JetMoE has experts that make them.
KEYLESS = {"deepseek_v2", "deepseek_v3", "longcat", "llama4", "jetmoe", "zamba2", "olmo", "mamba", "deepseek_v32"}
UNTURNED = {"gemma3", "glm4", "olmo2", "llama4", "phimoe", "longcat", "jetmoe", "minimax"}
READERS = {"phi3": "qkv_proj", "deepseek_v2": "q_a_proj", "deepseek_v3": "q_a_proj", "nemotron_h": "in_proj"}
INT4 = {"dtype": "int4", "scope": "per_channel", "symmetric": True, "method": "minmax"}
SHIFT: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.8, "symmetric": False}
KEYS: dict[str, Any] = {"type": "kv_smooth"}
QUAROT: dict[str, Any] = {"type": "quarot"}
SEARCHING: list[dict[str, Any]] = [
    {"type": "flex_smooth_quant"},
    {"type": "flex_awq_ssz", "qconfig": {"weight": INT4}},
    {"type": "awq", "weight_qconfig": INT4, "n_grid": 4},
]


def check_same(stranger: Stranger, model: Path, written: Path, ids: list[list[int]], unstacked: bool = False) -> None:
    """Logits within 1e-4 of their size; of a model that only Slim reads, probabilities that cannot be told apart."""
    report = verify_folder(written, model)
    assert report.ok, report.text()
    if unstacked:
        text = "A generator is a function that returns an iterator. " * 8
        scores = stranger.scores(model, written, text, sequence_length=32)
        assert abs(scores.kl_divergence or 0) < 1e-7
        assert scores.top1_agreement == 1
    else:
        assert stranger.error(model, written, ids) <= 1e-4


@pytest.mark.parametrize("family", DENSE + SPARSE + ODD)
def test_all_smoothers_one_after_the_other(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
) -> None:
    model = model_folder(family, torch.float32)
    process = [SHIFT, *SEARCHING] + ([] if family in KEYLESS else [KEYS])
    result = quantize(model, tmp_path / "out", process=process)
    assert {note.position for note in result.smoothed if note.skipped is None} == {
        f"process[{number}]" for number in range(len(process))
    }
    check_same(stranger, model, tmp_path / "out", token_ids, family in UNSTACKED)


@pytest.mark.parametrize("family", [one for one in DENSE + SPARSE if one not in UNTURNED])
def test_learned_rotation_then_shifts_then_keys(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
) -> None:
    model = model_folder(family, torch.float32)
    process = [{"type": "adapt_rotation", "stage": 2}, SHIFT] + ([] if family in KEYLESS else [KEYS])
    learn = {"type": "adapt_rotation", "stage": 1, "steps": 2, "layer_type": [READERS.get(family, "q_proj")]}
    result = quantize(model, tmp_path / "out", prior=[{"process": [learn]}], process=process)
    assert result.smoothed
    check_same(stranger, model, tmp_path / "out", token_ids, family in UNSTACKED)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mamba"])
def test_hadamard_rotation_then_shifts_then_keys(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
) -> None:
    """Mamba multiplies by a weight without calling the linear that has it."""
    model = model_folder(family, torch.float32)
    process = [QUAROT, SHIFT] + ([] if family == "mamba" else [KEYS])
    result = quantize(model, tmp_path / "out", process=process)
    assert {note.position for note in result.smoothed} == {f"process[{number}]" for number in range(1, len(process))}
    assert any(note.shifted for note in result.smoothed)
    check_same(stranger, model, tmp_path / "out", token_ids)


def test_a_norm_behind_which_a_gate_stands_is_not_shifted(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    result = quantize(model_folder("minimax", torch.float32), tmp_path / "out", process=[SHIFT])
    (gated,) = [note for note in result.smoothed if note.source == "model.layers.1.self_attn.norm"]
    assert not gated.shifted
    assert gated.scale_min < gated.scale_max
    (told,) = [text for text in result.warnings if "gated" in text]
    assert told == (
        "spec.process[0]: 1 norms are not shifted, because their output is gated before anything reads it, e.g. "
        "model.layers.1.self_attn.norm"
    )
    assert "model.layers.1.self_attn.norm.bias" not in stranger.tensors(tmp_path / "out")


def test_what_layers_share_is_left_alone(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    model = model_folder("zamba2", torch.float32)
    result = quantize(model, tmp_path / "out", process=[SHIFT])
    assert result.smoothed
    assert not [note for note in result.smoothed if "shared_transformer" in note.source]
    before, after = stranger.tensors(model), stranger.tensors(tmp_path / "out")
    shared = [name for name in before if "shared_transformer" in name]
    assert len(shared) >= 8
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert [text for text in result.warnings if "other layers have the same weights" in text]
    with pytest.raises(UnsupportedError, match=r"no attention of this model .* other layers have the same weights"):
        quantize(model, tmp_path / "keys", process=[KEYS])


def test_values_and_keys_that_may_be_clipped_are_left_alone(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """Nothing is clipped on the few tokens of the proof."""
    model = model_folder("olmo", torch.float32)
    result = quantize(model, tmp_path / "out", process=[SHIFT])
    assert {note.type for note in result.smoothed} == {"up-down"}
    with pytest.raises(UnsupportedError, match="no way to scale its keys and queries"):
        quantize(model, tmp_path / "keys", process=[KEYS])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing behind a norm": ("olmo2", {"type": "smooth_quant"}, "no subgraph of type norm-linear of this model"),
    "no attention": ("mamba", KEYS, "because none was found that keeps keys and values"),
    "no rotation": ("gemma3", QUAROT, "its output passes a norm"),
    "no down projection": (
        "mamba",
        QUAROT | {"online": True, "down_proj_online_layers": [0]},
        "it has no down projections that could be rotated",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_the_structure(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, case: str
) -> None:
    family, process, reason = REFUSED[case]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        quantize(model_folder(family, torch.float32), tmp_path / "out", process=[process])
    assert caught.value.where
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_smoothed_may_be_excluded(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    """The experts of gpt-oss clamp what their up_proj gives them."""
    model = model_folder("gpt_oss", torch.float32)
    told = quantize(model, tmp_path / "all", process=[{"type": "iter_smooth"}]).warnings
    assert [text for text in told if "cannot smooth 12 places: model.layers.0.mlp.experts.0.up_proj: " in text]
    process = [{"type": "iter_smooth", "exclude": ["*.experts.*"]}]
    told = quantize(model, tmp_path / "out", process=process).warnings
    assert [text for text in told if "cannot smooth" in text or "matches no source" in text] == []


def test_what_is_there_but_not_chosen_is_told(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    """Not an error: the recipe may be made for several models."""
    model = model_folder("llama", torch.float32)
    chosen = {"type": "smooth_quant", "exclude": ["*self_attn*"]}
    result = quantize(model, tmp_path / "out", process=[chosen])
    assert len(result.smoothed) == 6  # the sources are norms, and none of them lies in self_attn
    assert [text for text in result.warnings if "exclude: pattern '*self_attn*' matches no source" in text]
    linear = {"type": "iter_smooth", "enable_subgraph_type": ["linear-linear"]}
    result = quantize(model, tmp_path / "none", process=[linear])
    assert "spec.process[0] smooths nothing" in result.warnings
    assert result.block_forwards == 0


@pytest.mark.parametrize("smoother", [SHIFT, SEARCHING[0], SEARCHING[2], KEYS], ids=lambda one: one["type"])
def test_a_smoothing_that_was_killed_is_resumed(
    killed: Any,
    content: Any,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    smoother: Any,
) -> None:
    act = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
    rule = {"type": "linear_quant", "qconfig": {"act": act, "weight": INT4 | {"dtype": "int8"}}}
    model, process = model_folder("qwen2"), [smoother, rule]
    quantize(model, tmp_path / "whole", process=process)
    with killed(LinearQuant, "model.layers.1"):
        quantize(model, tmp_path / "out", process=process)
    assert quantize(model, tmp_path / "out", process=process, resume=True).resumed_units >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    reports = [json.loads((tmp_path / name / "report.json").read_text())["smoothing"] for name in ("out", "whole")]
    assert reports[0] == reports[1]
    assert len(reports[0]) >= 3

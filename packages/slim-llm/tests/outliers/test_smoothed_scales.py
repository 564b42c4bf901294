"""Static scales of a run that smooths and quantizes: those of the smoothed model, in one forward of each block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.evaluation.verify import verify_folder

BLOCKS, SAMPLES = 3, 5
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.8}
SHIFT = ITER | {"symmetric": False}
KEYS: dict[str, Any] = {"type": "kv_smooth"}
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}


def linear_quant(**act: Any) -> dict[str, Any]:
    act = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"} | act
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": WEIGHT}}


ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py


def two_runs(
    stranger: Stranger,
    quantize: Quantize,
    model: Path,
    folder: Path,
    smoother: dict[str, Any],
    rule: dict[str, Any],
    **options: Any,
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """What one run writes that smooths and quantizes, and what two runs write that do so one after the other."""
    result = quantize(model, folder / "one", process=[smoother, rule], **options)
    quantize(model, folder / "smooth", process=[smoother])
    quantize(stranger.as_model(folder / "smooth"), folder / "two", process=[rule], **options)
    return result, stranger.tensors(folder / "one"), stranger.tensors(folder / "two")


def check_alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal but for the rounding of float32, which now and then moves a code to its neighbour."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.dtype == torch.int8:
            off = (value.int() - two[name].int()).abs()
            assert int(off.max()) <= 1
            assert float(off.float().mean()) < 0.01
        elif name.endswith(("input_scale", "weight_scale", "kv_cache_scale", ".scale")):
            assert torch.allclose(value, two[name], rtol=2e-5), name
        elif name.endswith("offset"):
            assert float((value - two[name]).abs().max()) <= 1


@pytest.mark.parametrize("family", ["qwen2", "glm4"])
@pytest.mark.parametrize(
    ("rule", "forwards"),
    [
        (linear_quant(), 1),
        (linear_quant(symmetric=True), 1),
        (linear_quant(method="histogram"), 2),
        (linear_quant(ext={"aggregation_type": "mean"}), 2),
    ],
    ids=["minmax", "symmetric", "histogram", "mean"],
)
def test_static_scales_are_those_of_the_smoothed_model(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    family: str,
    rule: dict[str, Any],
    forwards: int,
) -> None:
    result, one, two = two_runs(stranger, quantize, model_folder(family, torch.float32), tmp_path, ITER, rule)
    assert result.block_forwards == forwards * BLOCKS * SAMPLES
    check_alike(one, two)
    assert sum(name.endswith("input_scale") for name in one) >= 4 * BLOCKS


@pytest.mark.parametrize("method", ["minmax", "histogram"])
def test_static_scales_behind_a_shift_are_those_of_the_shifted_model(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    naive: ModuleType,
    tmp_path: Path,
    method: str,
) -> None:
    """With a histogram the block runs again once it is shifted, with biases that the classes of norms do not have."""
    model = model_folder("llama", torch.float32)
    result = quantize(model, tmp_path / "one", process=[SHIFT, linear_quant(method=method)])
    assert result.block_forwards == (1 if method == "minmax" else 2) * BLOCKS * SAMPLES
    quantize(model, tmp_path / "smooth", process=[SHIFT])
    net = stranger.opened(tmp_path / "smooth")
    low: dict[str, float] = {}
    high: dict[str, float] = {}

    def see(name: str, x: Tensor) -> None:
        low[name] = min(low.get(name, 0.0), float(x.min()))
        high[name] = max(high.get(name, 0.0), float(x.max()))

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _m, args, name=name: see(name, args[0]))
    stranger.logits(net, token_ids)
    written = stranger.tensors(tmp_path / "one")
    for name in low:
        scale = float(written[f"{name}.input_scale"])
        whole = (high[name] - low[name]) / 255
        if method == "minmax":
            assert scale == pytest.approx(whole, rel=2e-5)
        else:  # it may cut off, but not much of these few tokens
            assert 0.5 * whole < scale <= 1.001 * whole


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek_v3"])
def test_shifted_models_are_scored_with_their_biases(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float or in eight bits the model is nearly the original; in eight bits it is not without the biases of norms.

    (Without any of the biases the float model would be the original again: those of norms and linears cancel.)
    """
    model, text = model_folder(family, torch.bfloat16), "A generator is a function that returns an iterator. " * 4

    def score(name: str) -> float:
        scores = stranger.scores(model, tmp_path / name, text, sequence_length=24, max_windows=2)
        return float(scores.kl_divergence or 0)

    quantize(model, tmp_path / "float", process=[SHIFT])
    quantize(model, tmp_path / "eight", process=[SHIFT, linear_quant()])
    quantize(model, tmp_path / "quantized", process=[SHIFT, linear_quant()], propagate="quantized")
    assert score("float") < 0.005
    assert score("eight") < 0.1
    assert score("quantized") < 0.1
    for name, dropped in (("float", True), ("eight", False)):
        report = verify_folder(tmp_path / name, model)
        assert not report.problems
        assert any("drops it" in warning for warning in report.warnings) == dropped
    monkeypatch.setattr("slim_llm.score.take_stored_biases", lambda *_: None)
    assert score("eight") > 0.3
    biases = {name: value for name, value in stranger.tensors(tmp_path / "float").items() if name.endswith("norm.bias")}
    assert biases
    assert all(bool(value.any()) for value in biases.values())


@pytest.mark.parametrize(
    ("rule", "forwards"),
    [
        ({"type": "dynamic_cache"}, 1),
        ({"type": "dynamic_cache", "qconfig": {"method": "histogram", "ext": {"percentile": 99.5}}}, 1),
        ({"type": "fa3_quant"}, 2),
    ],
    ids=["cache", "clipped cache", "kernel"],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "glm4"])
def test_scales_of_attentions_are_those_of_the_smoothed_model(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    family: str,
    rule: dict[str, Any],
    forwards: int,
) -> None:
    result, one, two = two_runs(stranger, quantize, model_folder(family, torch.float32), tmp_path, KEYS, rule)
    assert result.block_forwards == forwards * BLOCKS * SAMPLES
    check_alike(one, two)
    assert sum("scale" in name for name in one) >= 2 * BLOCKS


def test_static_scales_of_a_latent_follow_its_norm(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """The latent is what the norm in front of kv_b_proj makes: scaled with it, and never shifted."""
    model = model_folder("deepseek_v3", torch.float32)
    rule = {"type": "fa3_quant"}
    result, one, two = two_runs(stranger, quantize, model, tmp_path, ITER, rule)
    assert result.block_forwards == 2 * BLOCKS * SAMPLES
    check_alike(one, two)
    result = quantize(model, tmp_path / "shifted", process=[SHIFT])
    assert not [
        name
        for name in stranger.tensors(tmp_path / "shifted")
        if "kv_b_proj.bias" in name or "kv_a_layernorm.b" in name
    ]
    assert [text for text in result.warnings if "no place for a bias, e.g. model.layers.0.self_attn.kv_b_proj" in text]

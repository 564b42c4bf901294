"""Sparse layers from recipe to files: W16A16S by ``float_sparse``, W8A8S by the weight method ``sparse``.

The files are read by ``naive.py`` and held against the published ADMM iteration in float64, and against transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.service import EvalRequest
from slim_llm.service import LlmService

SAMPLES, BLOCKS, RATIO = 5, 3, 0.4
PRUNE = [{"type": "float_sparse", "sparse_ratio": RATIO}]
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]


def sparse_int8(**ext: Any) -> list[dict[str, Any]]:
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "sparse", "ext": ext}
    return [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": weight}}]


def second_moments(model: nn.Module, names: list[str], inputs: list[list[int]]) -> dict[str, np.ndarray]:
    """E[x x^T] of the inputs of these linears, float64."""
    total: dict[str, Any] = dict.fromkeys(names, 0.0)
    handles = []
    for name in names:

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double().numpy()
            total[name] = total[name] + x.T @ x

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in inputs:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: h / sum(map(len, inputs)) for name, h in total.items()}


def pruned(weight: torch.Tensor, h: np.ndarray, ratio: float) -> np.ndarray:
    """ADMM with the gradual mask, with two states and an inverse."""
    w = weight.double().numpy()
    d = np.sqrt(np.diag(h))
    a = h / np.outer(d, d) + 0.1 * np.eye(len(d))
    v, u = w * d, np.zeros_like(w)
    goal, inverse = v @ a, np.linalg.inv(a + np.eye(len(d)))
    mask = np.zeros(w.shape, dtype=bool)
    for t in range(20):
        if t < 15:
            count = round(round(w.size * ratio) * (1 - (1 - (t + 1) / 15) ** 3))
            mask = np.zeros(w.size, dtype=bool)
            mask[np.argsort(np.abs(v + u), axis=None, kind="stable")[:count]] = True
            mask = mask.reshape(w.shape)
        z = np.where(mask, 0, v + u)
        u = u + v - z
        v = (goal + z - u) @ inverse
    return np.where(mask, 0, v + u) / d


def check_pruned(written: Any, source: dict[str, torch.Tensor], h: dict[str, np.ndarray]) -> None:
    for module, moment in h.items():
        found = written.tensors[f"{module}.weight"].double().numpy()
        want = pruned(source[f"{module}.weight"], moment, RATIO)
        both = (found != 0) & (want != 0)
        assert ((found == 0) == (want == 0)).mean() > 0.995, module
        assert (found == 0).sum() >= round(RATIO * found.size)
        normal = both & (np.abs(want) >= 2.0**-8)
        assert normal.sum() > 0.5 * found.size
        # An element that swaps places in the mask moves its neighbours a little; the rest is what shortening costs.
        assert (np.abs(found - want)[normal] <= np.abs(want)[normal] * 0.13 + 2e-3).all(), module
        mantissa = np.abs(np.frexp(found[found != 0])[0]) * 2
        assert np.isin(mantissa, (1.0, 1.25, 1.5, 1.75)).mean() >= 1 - 0.02 / (1 - RATIO) - 1e-6


@pytest.fixture(scope="module")
def pruned_folder(
    tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder, quantize: Quantize
) -> Callable[[str, torch.dtype], tuple[Path, Any]]:
    made: dict[tuple[str, torch.dtype], tuple[Path, Any]] = {}

    def folder(family: str, dtype: torch.dtype) -> tuple[Path, Any]:
        if (family, dtype) not in made:
            path = tmp_path_factory.mktemp("pruned") / family
            made[family, dtype] = path, quantize(model_folder(family, dtype), path, process=PRUNE)
        return made[family, dtype]

    return folder


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float16), ("gemma3", torch.float32)]
)
def test_pruned_files(
    naive: ModuleType,
    model_folder: ModelFolder,
    pruned_folder: Any,
    token_ids: list[list[int]],
    family: str,
    dtype: torch.dtype,
) -> None:
    """qwen2 has biases and a tied head."""
    model, (out, result) = model_folder(family, dtype), pruned_folder(family, dtype)
    source, _ = naive.read_tensors(model)
    written = naive.read(out)
    assert result.block_forwards == BLOCKS * SAMPLES
    assert set(written.tensors) == set(source) | {"lm_head.weight"}
    assert written.description["model_quant_type"] == "W16A16S"
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]
    for name, kind in written.description.items():
        if name in naive.GLOBALS:
            continue
        assert kind == ("W16A16S" if "_proj." in name else "FLOAT"), name
        if name in source:
            assert written.tensors[name].dtype == source[name].dtype == dtype
            if not name.endswith("_proj.weight"):
                assert naive.bits(written.tensors[name]) == naive.bits(source[name])
    if family == "qwen2":
        assert written.description["model.layers.0.self_attn.q_proj.bias"] == "W16A16S"
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    check_pruned(written, source, second_moments(plain, modules, token_ids))
    found = verify_folder(out, model)
    assert not found.problems, found.text()


def test_pruned_outputs_are_propagated(
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    pruned_folder: Any,
    token_ids: list[list[int]],
    tmp_path: Path,
) -> None:
    """A block is pruned for the inputs that the pruned blocks before it make."""
    model = model_folder("llama")
    result = quantize(model, tmp_path / "out", process=PRUNE, propagate="quantized")
    assert result.block_forwards == 2 * BLOCKS * SAMPLES
    written, plain = naive.read(tmp_path / "out"), naive.read(pruned_folder("llama", torch.bfloat16)[0])
    source, _ = naive.read_tensors(model)
    prefix = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for block in range(BLOCKS):
        modules = [f"model.layers.{block}.{name}" for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")]
        check_pruned(written, source, second_moments(prefix, modules, token_ids))
        same = [naive.bits(written.tensors[f"{m}.weight"]) == naive.bits(plain.tensors[f"{m}.weight"]) for m in modules]
        assert all(same) if block == 0 else not any(same)
        state = {name: t for name, t in written.tensors.items() if name.startswith(f"model.layers.{block}.")}
        prefix.load_state_dict(state, strict=False)


TEXT = "The yield expression is used when defining a generator function. 生成器函数返回迭代器。\n" * 2


def perplexity(model: Any, folder: Path) -> float:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    loss, count = 0.0, 0
    for start in range(0, len(ids), 24):
        part = ids[start : start + 24]
        if len(part) > 1:
            with torch.no_grad():
                log = torch.log_softmax(model(input_ids=torch.tensor([part]), use_cache=False).logits[0].double(), -1)
            loss -= float(log[torch.arange(len(part) - 1), torch.tensor(part[1:])].sum())
            count += len(part) - 1
    return math.exp(loss / count)


def evaluate(model: Path, out: Path, tmp_path: Path) -> Any:
    (tmp_path / "text.txt").write_text(TEXT)
    request = EvalRequest(model_path=model, text=tmp_path / "text.txt", quantized=out, device="cpu", sequence_length=24)
    return LlmService().evaluate(request, SilentProgress())


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float16)])
def test_pruned_models_are_evaluated(
    naive: ModuleType, model_folder: ModelFolder, pruned_folder: Any, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model, (out, _) = model_folder(family, dtype), pruned_folder(family, dtype)
    sparse = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    sparse.load_state_dict(naive.read(out).tensors, strict=True)
    result = evaluate(model, out, tmp_path)
    assert result.quantized_perplexity == pytest.approx(perplexity(sparse, model), rel=1e-4)
    assert result.quantized_perplexity != pytest.approx(result.perplexity, rel=1e-3)


def test_everything_pruned_needs_no_data(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    result = quantize(
        model_folder("llama"),
        tmp_path / "out",
        process=[{"type": "float_sparse", "sparse_ratio": 1.0, "include": ["*.down_proj"]}],
        dataset=str(tmp_path / "nothing.jsonl"),
    )
    assert result.block_forwards == 0
    written = naive.read(tmp_path / "out")
    assert len(written.quantized()) == BLOCKS
    assert not any(written.tensors[f"{module}.weight"].any() for module in written.quantized())


def test_pruning_some_and_quantizing_others(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    process = [{"type": "float_sparse", "include": ["*.down_proj"]}, *sparse_int8()]
    result = quantize(model_folder("llama"), tmp_path / "out", process=process)
    assert result.block_forwards == BLOCKS * SAMPLES
    written = naive.read(tmp_path / "out")
    kinds = {module.rpartition(".")[2]: written.kind(module) for module in written.quantized()}
    assert kinds.pop("down_proj") == "W16A16S"
    assert set(kinds.values()) == {"W8A8S"}
    assert written.description["model_quant_type"] == "W8A8S"
    assert not verify_folder(tmp_path / "out", model_folder("llama")).problems


def int8_codes(weight: torch.Tensor, fraction: float, sigma: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a sparse weight, in float32, moments in float64."""
    w = weight.float().numpy()
    magnitude = np.abs(w)
    if sigma is None:
        free = np.sort(magnitude, 1)[:, : -math.ceil(fraction * w.shape[1])].max(1, keepdims=True)
    else:
        exact = w.astype(np.float64)
        distance = np.abs(exact - exact.mean(1, keepdims=True))
        free = np.where(distance > sigma * exact.std(1, keepdims=True), 0, magnitude).max(1, keepdims=True)
    scale = np.maximum(free / np.float32(7), magnitude.max(1, keepdims=True) / np.float32(127))
    return np.round(w / scale).astype(np.int8), scale


@pytest.mark.parametrize(
    ("family", "dtype", "ext"),
    [
        ("llama", torch.bfloat16, {}),
        ("qwen2", torch.float16, {"fraction": 0.1}),
        ("llama", torch.float32, {"use_sigma": True, "sigma_factor": 2.0}),
    ],
)
def test_sparse_int8_files(
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
    ext: dict[str, Any],
) -> None:
    model = model_folder(family, dtype)
    result = quantize(model, tmp_path / "out", process=sparse_int8(**ext))
    assert result.block_forwards == BLOCKS * SAMPLES
    source, _ = naive.read_tensors(model)
    written = naive.read(tmp_path / "out")
    modules = written.quantized()
    assert len(modules) == 7 * BLOCKS
    assert {written.kind(module) for module in modules} == {written.description["model_quant_type"]} == {"W8A8S"}
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    ranges = naive.ranges(plain, modules, token_ids)
    for module in modules:
        codes, weight_scale = int8_codes(source[f"{module}.weight"], ext.get("fraction", 0.01), ext.get("sigma_factor"))
        assert np.array_equal(written.array(f"{module}.weight"), codes)
        scale, offset = naive.input_parameters(*ranges[module], False, dtype)
        assert written.array(f"{module}.input_scale").tolist() == [scale]
        assert written.array(f"{module}.input_offset").tolist() == [offset]
        deq = scale * weight_scale[:, 0]
        assert np.array_equal(naive.decoded(written.tensors[f"{module}.deq_scale"]), deq)
        bias = source.get(f"{module}.bias")
        exact = 0 if bias is None else naive.float32(bias).astype(np.float64) / deq.astype(np.float64)
        exact = exact - np.float64(offset) * codes.astype(np.int64).sum(1)
        assert np.array_equal(written.array(f"{module}.quant_bias"), np.round(exact).astype(np.int32))
        found = {name.rpartition(".")[2] for name in written.tensors if name.rpartition(".")[0] == module}
        assert found - {"bias"} == {"weight", "quant_bias", "input_scale", "input_offset", "deq_scale"}
        layer = AscendV1Folder(tmp_path / "out").layer(module)
        assert layer is not None
        assert layer.kind == "W8A8S"
    assert not verify_folder(tmp_path / "out", model).problems
    deployed = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    for module in modules:
        linear = naive.Deployed(written, module)
        linear.kind = "W8A8"  # the same arithmetic
        deployed.set_submodule(module, linear)
    assert evaluate(model, tmp_path / "out", tmp_path).quantized_perplexity == pytest.approx(
        perplexity(deployed, model), rel=1e-4
    )

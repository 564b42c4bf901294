"""What is written, read back by a naive reader and held against a computation of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "glm4", "olmo2"]
TIED = ("qwen2", "gemma3")
KINDS = {
    "static": "W8A8",
    "static-symmetric": "W8A8",
    "dynamic": "W8A8_DYNAMIC",
    "w8a16": "W8A16",
    "w8a16-asymmetric": "W8A16",
}
GOLDEN = Path(__file__).with_name("golden")
ModelFolder = Callable[..., Path]
every_family = pytest.mark.parametrize("family", FAMILIES)


def linears(family: str) -> list[str]:
    """The linears of the decoder blocks, as each architecture is known to have them."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    if family == "phi3":
        attention, mlp = ["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]
    if family == "glm4":
        mlp = ["gate_up_proj", "down_proj"]
    names = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    return [f"model.layers.{i}.{name}" for i in range(3) for name in names]


def check_structure(naive: ModuleType, folder: Path, source: dict[str, Any], kind: str) -> None:
    """Index, shards, description, side files and modes."""
    written = naive.read(folder)
    description = written.description
    index = json.loads((folder / "quant_model_weights.safetensors.index.json").read_text())
    assert index["weight_map"] == written.place
    assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in written.tensors.values())}
    assert set(description) - naive.GLOBALS == set(written.tensors)
    assert {key: description[key] for key in naive.GLOBALS} == {
        "version": "1.0.0",
        "model_quant_type": kind,
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    assert list(index["weight_map"]) == list(description)[: len(written.tensors)]
    assert set(source) <= set(written.tensors)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "tiny_best_practice.yaml", "report.json"} <= names
    assert not names & {"model.safetensors", "model.safetensors.index.json", "journal.jsonl"}
    assert folder.stat().st_mode & 0o777 == 0o750
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o600), path


@every_family
@pytest.mark.parametrize("scheme", ["static", "dynamic", "w8a16"])
def test_structure(naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, family: str, scheme: str) -> None:
    source, _ = naive.read_tensors(model_folder(family))
    check_structure(naive, output(family, scheme), source, KINDS[scheme])


@every_family
@pytest.mark.parametrize("scheme", ["static", "dynamic", "w8a16"])
def test_kinds_and_untouched_tensors(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, family: str, scheme: str
) -> None:
    source, _ = naive.read_tensors(model_folder(family))
    written = naive.read(output(family, scheme))
    assert sorted(written.quantized()) == sorted(linears(family))
    modules = set(linears(family))
    for name, kind in written.description.items():
        if name in naive.GLOBALS:
            continue
        module, _, part = name.rpartition(".")
        assert kind == (KINDS[scheme] if module in modules and part != "bias" else "FLOAT"), name
    untouched = [name for name in source if name.rpartition(".")[0] not in modules]
    assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"} & set(untouched)
    for name in untouched:
        assert written.tensors[name].dtype == source[name].dtype
        assert written.tensors[name].shape == source[name].shape
        assert naive.bits(written.tensors[name]) == naive.bits(source[name])
    if family in TIED:
        assert "lm_head.weight" not in source
        assert torch.equal(written.tensors["lm_head.weight"], source["model.embed_tokens.weight"])
    else:
        assert "lm_head.weight" in source


def check_weight_only(naive: ModuleType, written: Any, source: dict[str, torch.Tensor], symmetric: bool) -> None:
    for module in written.quantized():
        weight = source[f"{module}.weight"]
        codes, scale, offset = naive.weight_codes(weight, symmetric)
        assert np.array_equal(written.array(f"{module}.weight"), codes)
        assert np.array_equal(written.array(f"{module}.weight_scale"), scale)
        assert np.array_equal(written.array(f"{module}.weight_offset"), offset)
        assert written.tensors[f"{module}.weight_scale"].shape == (len(weight), 1)
        for part in ("weight_scale", "weight_offset"):
            assert written.tensors[f"{module}.{part}"].dtype == torch.float32
        assert written.tensors[f"{module}.weight"].dtype == torch.int8
        check_bias(naive, written, source, module)
        found = {name.rpartition(".")[2] for name in written.tensors if name.rpartition(".")[0] == module}
        assert found - {"bias"} == {"weight", "weight_scale", "weight_offset"}


def check_bias(naive: ModuleType, written: Any, source: dict[str, torch.Tensor], module: str) -> None:
    name = f"{module}.bias"
    assert (name in written.tensors) == (name in source)
    if name in source:
        assert written.tensors[name].dtype == torch.float32
        assert np.array_equal(written.array(name), naive.float32(source[name]))
        assert np.abs(written.array(name)).max() > 0


@every_family
@pytest.mark.parametrize("scheme", ["dynamic", "w8a16"])
def test_weights(naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, family: str, scheme: str) -> None:
    source, _ = naive.read_tensors(model_folder(family))
    check_weight_only(naive, naive.read(output(family, scheme)), source, symmetric=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_asymmetric_weights(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, dtype: torch.dtype
) -> None:
    source, _ = naive.read_tensors(model_folder("qwen2", dtype))
    written = naive.read(output("qwen2", "w8a16-asymmetric", dtype))
    check_weight_only(naive, written, source, symmetric=False)
    assert any(written.array(f"{module}.weight_offset").any() for module in written.quantized())


def check_static(
    naive: ModuleType,
    written: Any,
    model: Path,
    source: dict[str, torch.Tensor],
    token_ids: list[list[int]],
    dtype: torch.dtype,
    symmetric: bool = False,
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    modules = written.quantized()
    ranges = naive.ranges(plain, modules, token_ids)
    for module in modules:
        codes, weight_scale, _ = naive.weight_codes(source[f"{module}.weight"])
        assert np.array_equal(written.array(f"{module}.weight"), codes)
        scale, offset = naive.input_parameters(*ranges[module], symmetric, dtype)
        assert written.array(f"{module}.input_scale").tolist() == [scale]
        assert written.array(f"{module}.input_offset").tolist() == [offset]
        stored = written.tensors[f"{module}.deq_scale"]
        assert stored.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.int64)
        assert stored.shape == (len(codes),)
        deq = scale * weight_scale[:, 0]
        assert np.array_equal(naive.decoded(stored), deq)
        bias = source.get(f"{module}.bias")
        exact = (
            np.zeros(len(codes)) if bias is None else naive.float32(bias).astype(np.float64) / deq.astype(np.float64)
        )
        exact = exact - np.float64(offset) * codes.astype(np.int64).sum(1)
        assert written.tensors[f"{module}.quant_bias"].dtype == torch.int32
        assert np.array_equal(written.array(f"{module}.quant_bias"), np.round(exact).astype(np.int32))
        check_bias(naive, written, source, module)
        found = {name.rpartition(".")[2] for name in written.tensors if name.rpartition(".")[0] == module}
        assert found - {"bias"} == {"weight", "quant_bias", "input_scale", "input_offset", "deq_scale"}


@every_family
def test_static_layers(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, token_ids: list[list[int]], family: str
) -> None:
    model, written = model_folder(family), naive.read(output(family, "static"))
    source, _ = naive.read_tensors(model)
    check_static(naive, written, model, source, token_ids, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_static_layers_of_other_dtypes(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, token_ids: list[list[int]], dtype: torch.dtype
) -> None:
    model, written = model_folder("qwen2", dtype), naive.read(output("qwen2", "static", dtype))
    source, _ = naive.read_tensors(model)
    assert source["model.norm.weight"].dtype == dtype
    check_static(naive, written, model, source, token_ids, dtype)


def test_symmetric_static_layers(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, token_ids: list[list[int]]
) -> None:
    model, written = model_folder("qwen3"), naive.read(output("qwen3", "static-symmetric"))
    source, _ = naive.read_tensors(model)
    check_static(naive, written, model, source, token_ids, torch.bfloat16, symmetric=True)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_listing_of_an_output_folder(naive: ModuleType, output: ModelFolder, scheme: str) -> None:
    """Names, dtypes, shapes and types of all tensors, and names and modes of all files, in their order."""
    folder = output("qwen2", scheme)
    written = naive.read(folder)
    lines = [f"{path.stat().st_mode & 0o777:o} {path.relative_to(folder)}" for path in sorted(folder.rglob("*"))]
    for name in list(written.description):
        if name in naive.GLOBALS:
            lines.append(f"{name} = {json.dumps(written.description[name])}")
        else:
            tensor = written.tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            lines.append(f"{name} {dtype} {list(tensor.shape)} {written.description[name]} {written.place[name]}")
    assert lines == (GOLDEN / f"qwen2-{scheme}.txt").read_text().splitlines()


def encode_fp8(naive: ModuleType, model: Path, encoded: Path, decoded: Path, block: int) -> None:
    """Two copies of a model: linears of the blocks as FP8 with a factor per block, and what that decodes to."""
    import shutil

    from safetensors.torch import save_file

    tensors, _ = naive.read_tensors(model)
    fp8, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".layers." not in name or weight.dim() != 2:
            continue
        rows, columns = weight.shape
        factors = torch.zeros(-(-rows // block), -(-columns // block))
        codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        back = torch.zeros(weight.shape)
        for i in range(factors.shape[0]):
            for j in range(factors.shape[1]):
                part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
                factors[i, j] = weight[part].float().abs().max() / 448
                codes[part] = (weight[part].float() / factors[i, j]).to(torch.float8_e4m3fn)
                back[part] = codes[part].float() * factors[i, j]
        fp8[name], fp8[f"{name}_scale_inv"] = codes, factors
        plain[name] = back.to(torch.bfloat16)
    for folder, content in ((encoded, fp8), (decoded, plain)):
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(content, folder / "model.safetensors")
    config = json.loads((encoded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block], "fmt": "e4m3"}
    (encoded / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scheme", ["static", "dynamic", "w8a16-asymmetric"])
def test_block_fp8_sources_are_quantized_like_their_decode(
    naive: ModuleType, model_folder: ModelFolder, quantize: Callable[..., Any], tmp_path: Path, scheme: str
) -> None:
    encoded, decoded = tmp_path / "fp8", tmp_path / "bf16"
    encode_fp8(naive, model_folder("qwen2"), encoded, decoded, block=20)
    for folder in (encoded, decoded):
        quantize(folder, tmp_path / f"{folder.name}-out", scheme, exclude=["*.k_proj"])
    first, second = naive.read(tmp_path / "fp8-out"), naive.read(tmp_path / "bf16-out")
    assert first.description == second.description
    assert set(first.tensors) == set(second.tensors)
    for name, tensor in first.tensors.items():
        assert naive.bits(tensor) == naive.bits(second.tensors[name]), name
    assert first.tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "fp8-out" / "config.json").read_text())

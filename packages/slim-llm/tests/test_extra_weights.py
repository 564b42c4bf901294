"""What a checkpoint has beyond the model class: it is kept, and in numbers that the written config.json allows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify import verify_folder
from slim_core.runners.run import RunResult

MTP = "model.mtp.layers.0."


def published(drafts: ModuleType, folder: Path, path: Path, fp8: Any) -> dict[str, Tensor]:
    """DeepSeek-V3 in blocks of float8, with a layer that predicts another token and that no block is like (as LongCat
    has it)."""
    config = drafts.copied(folder, path, quantization_config=drafts.FP8, num_nextn_predict_layers=1)
    model = load_file(folder / "model.safetensors")
    more = {
        name.replace("model.layers.2.", MTP).replace(".mlp.", ".transformer_layer.mlp."): value.clone()
        for name, value in model.items()
        if ".layers.2." in name
    }
    hidden = config["hidden_size"]
    more[f"{MTP}eh_proj.weight"] = torch.randn(
        hidden, 2 * hidden, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    more |= {f"{MTP}{name}.weight": torch.ones(hidden).bfloat16() for name in ("enorm", "hnorm", "shared_head.norm")}
    more[f"{MTP}embed_tokens.weight"] = model["model.embed_tokens.weight"].clone()
    more[f"{MTP}shared_head.head.weight"] = model["lm_head.weight"].clone()
    tensors: dict[str, Tensor] = {}
    for name, value in (model | more).items():
        tensors[name] = value
        if (name.endswith("_proj.weight") and "eh_proj" not in name) or "kv_a_proj_with_mqa" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8.encoded(value)
    save_file(tensors, path / "model.safetensors")
    return tensors


def test_a_layer_that_is_not_understood_in_blocks_of_float8(
    drafts: ModuleType, naive: ModuleType, model_folder: Any, quantize: Any, tmp_path: Path
) -> None:
    """config.json loses quantization_config, so nothing may be left that only it explains."""
    fp8 = naive.Fp8Blocks(drafts.BLOCK)
    tensors = published(drafts, model_folder("deepseek_v3"), tmp_path / "model", fp8)
    result: RunResult = quantize(tmp_path / "model", tmp_path / "out", "dynamic")
    assert [unit.name for unit in result.units][-2:] == ["epilogue", "extra"]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    written = load_file(file)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_nextn_predict_layers"] == 1
    assert [name for name in {*written, *description} if name.endswith("_scale_inv")] == []
    assert torch.float8_e4m3fn not in {value.dtype for value in written.values()}
    mine = [name for name in tensors if name.startswith(MTP) and not name.endswith("_scale_inv")]
    assert len(mine) > 30
    assert {name for name in written if name.startswith(MTP)} == set(mine)
    for name in mine:
        factors = tensors.get(f"{name}_scale_inv")
        assert torch.equal(written[name], tensors[name] if factors is None else fp8.decoded(tensors[name], factors)), (
            name
        )
        assert description[name] == "FLOAT"
    assert description["model.layers.2.mlp.experts.7.down_proj.weight"] == "W8A8_DYNAMIC"
    check = verify_folder(tmp_path / "out", tmp_path / "model", "vllm-ascend")
    assert check.ok, check.problems


def test_factors_of_that_layer_are_missing(
    drafts: ModuleType, naive: ModuleType, model_folder: Any, quantize: Any, tmp_path: Path
) -> None:
    fp8 = naive.Fp8Blocks(drafts.BLOCK)
    tensors = published(drafts, model_folder("deepseek_v3"), tmp_path / "model", fp8)
    del tensors[f"{MTP}transformer_layer.mlp.experts.0.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InvalidModelError, match=r"_layer\.mlp\.experts\.0\.up_proj\.weight_scale_inv' beside it"):
        quantize(tmp_path / "model", tmp_path / "out", "dynamic")
    assert not (tmp_path / "out").exists()

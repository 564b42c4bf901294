"""Models, sizes and tensors for which ``quarot`` is refused, with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from slim_core.errors import UnsupportedError

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
QUAROT: dict[str, Any] = {"type": "quarot"}


REFUSED = {
    "gemma3": "its output passes a norm",
    "olmo2": "its output passes a norm",
    "glm4": "its output passes a norm",
    "phimoe": "subtracts the mean",
    "longcat": "something besides its linears changes the hidden states",
    "llama4": "something besides .* reads its output",
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_rotated_are_refused(
    rules: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str
) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[family]) as caught:
        quantize(model_folder(family, torch.float32), tmp_path / "out", process=[QUAROT, rules["dynamic"]])
    assert caught.value.where is not None
    assert "layers.0" in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("GPTNeoXConfig", {}, "subtracts the mean"),
        ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "subtracts the mean"),
        ("OlmoConfig", {}, "with rotated weights the block would compute something else"),
    ],
)
def test_models_with_layer_norm_are_refused(
    quantize: Quantize, tmp_path: Path, config: str, options: dict[str, Any], reason: str
) -> None:
    import transformers

    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings, **options))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=reason):
        quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])


@pytest.mark.parametrize(
    ("family", "size", "what"),
    [
        ("llama", 64, "the 32 channels of the hidden states"),
        ("llama", 16, "the 8 channels of a head of model.layers.0.self_attn.v_proj"),
        ("deepseek_v3", 16, "the 8 channels of a head of model.layers.0.self_attn.kv_b_proj"),
    ],
)
def test_a_block_size_that_does_not_divide(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, size: int, what: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"block_size {size} does not divide {what}") as caught:
        quantize(model_folder(family, torch.float32), tmp_path / "out", process=[QUAROT | {"block_size": size}])
    assert caught.value.where == "spec.process[0]"


def test_unknown_tensors_that_may_belong_to_the_stream_are_refused(
    model_folder: ModelFolder, quantize: Quantize, naive: ModuleType, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama", torch.float32), tmp_path / "model")
    tensors, _ = naive.read_tensors(tmp_path / "model")
    for name, shape, refused in (("rotary.table", (7, 9), False), ("visual.merger.weight", (32, 20), True)):
        more = tensors | {name: torch.zeros(shape)}
        save_file(more, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        if refused:
            with pytest.raises(UnsupportedError, match=r"visual\.merger\.weight: the model class does not use"):
                quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT], overwrite=True)
        else:
            quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])
            assert torch.equal(naive.read(tmp_path / "out").tensors[name], torch.zeros(shape))


def test_a_drafting_layer_that_is_not_understood_is_refused(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama", torch.float32), tmp_path / "model")
    tensors, _ = naive.read_tensors(tmp_path / "model")
    more = {name.replace(".layers.2.", ".layers.3."): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_file(tensors | more, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"model\.layers\.3\..*does not use this tensor"):
        quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])

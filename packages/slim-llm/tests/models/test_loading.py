"""Models opened from folders: streamed forwards equal plain ones, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slim_core.errors import InvalidModelError, SecurityError, SlimError, UnsupportedError
from slim_core.model.suspended import SuspendedForward
from slim_llm.models.loading import open_model, open_tokenizer, read_config

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "glm4", "olmo2"]
ModelFolder = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_suspended_forward_is_the_plain_one_bit_for_bit(
    model_folder: ModelFolder, family: str, dtype: torch.dtype
) -> None:
    folder = model_folder(family, dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    inputs = [torch.randint(0, 3072, shape) for shape in ((1, 5), (2, 17), (1, 33), (1, 1))]
    want = [plain(input_ids=ids, use_cache=False).logits for ids in inputs]
    assert want[0].dtype == dtype
    model = open_model(folder)
    assert model.tied_head == (family in ("qwen2", "gemma3"))
    model.load(model.outside, CPU)
    given = [{"input_ids": ids, "use_cache": False} for ids in inputs]
    with SuspendedForward(model.module, model.blocks, given) as forward:
        forward.start()
        for unit in model.units:
            if unit.block is None:
                continue
            model.load(unit.parameters, CPU)
            for sample in range(len(inputs)):
                forward.resume(sample, forward.compute(forward.call(sample)))
            model.unload(unit.parameters)
        for found, expected in zip(forward.outputs, want, strict=True):
            assert torch.equal(found.logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_cover_the_checkpoint(model_folder: ModelFolder, family: str) -> None:
    model = open_model(model_folder(family))
    assert model.block_lists == ("model.layers",)
    assert [unit.name for unit in model.units] == ["prologue", *(f"model.layers.{i}" for i in range(3)), "epilogue"]
    assert {origin for unit in model.units for origin in unit.tensors.values()} == set(model.source)
    assert all(linear.in_block for unit in model.units[1:-1] for linear in unit.linears)
    assert all(parameter.device.type == "meta" for parameter in model.module.parameters())


def changed(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model folder whose configuration is changed; None removes a key."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "no_such_model"}, UnsupportedError, "does not know model_type 'no_such_model'"),
        ({"model_type": None}, UnsupportedError, "does not know model_type None"),
        ({"model_type": "x", "auto_map": {"AutoModelForCausalLM": "m.M"}}, SecurityError, "needs Python code"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, r"already quantized \(gptq\)"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, r"already quantized \(unknown method\)"),
        ({"quantization_config": "gptq"}, UnsupportedError, r"already quantized \(unknown method\)"),
        ({"hidden_size": "wide"}, InvalidModelError, "transformers cannot build the model"),
        ({"hidden_size": -4}, InvalidModelError, "transformers cannot build the model"),
        ({"num_attention_heads": 0}, InvalidModelError, "transformers cannot build the model"),
        ({"hidden_size": 64}, InvalidModelError, r"config.json asks for \[3072, 64\]"),
        ({"num_hidden_layers": 4}, InvalidModelError, "9 tensors of the model are not in the checkpoint"),
    ],
)
def test_configurations_that_are_refused(
    model_folder: ModelFolder, tmp_path: Path, changes: dict[str, Any], error: type[SlimError], message: str
) -> None:
    folder = changed(model_folder(), tmp_path / "model", **changes)
    with pytest.raises(error, match=message) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)


def test_a_quantized_folder_is_refused(model_folder: ModelFolder, output: ModelFolder) -> None:
    with pytest.raises(UnsupportedError, match="holds a quantized checkpoint"):
        open_model(output("llama", "dynamic"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no config.json"),
        (b"{", "cannot be read as JSON"),
        (b"[]", "is not a JSON object"),
        (b"\xff", "JSON"),
    ],
)
def test_unreadable_configurations(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidModelError, match=message):
        read_config(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="does not exist"):
        read_config(tmp_path / "nothing")


def test_a_model_without_a_dtype_is_read_as_it_is_stored(model_folder: ModelFolder, tmp_path: Path) -> None:
    model = open_model(changed(model_folder(), tmp_path / "model", dtype=None))
    assert model.dtype is None
    model.load(model.outside, CPU)
    assert model.module.get_parameter("model.norm.weight").dtype == model.source.meta("model.norm.weight").dtype


def test_tokenizer(model_folder: ModelFolder, tmp_path: Path) -> None:
    assert len(open_tokenizer(model_folder())) == 3072
    shutil.copyfile(model_folder() / "config.json", tmp_path / "config.json")
    with pytest.raises(InvalidModelError, match="the tokenizer cannot be loaded") as caught:
        open_tokenizer(tmp_path)
    assert caught.value.remedy == "copy the tokenizer files into the model folder"


def test_names_that_transformers_changes_while_loading_are_found_in_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model")
    assert "embed_out.weight" in model.source
    assert "embed_out.weight" in model.tensors_of(model.outside)
    assert sorted(name for unit in model.units for name in unit.tensors) == sorted(model.source)

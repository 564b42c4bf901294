"""The ranges of inputs that runs find: what samples, batches and what comes before a block make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

SAMPLES = 5
BLOCKS = 3
ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_propagating_quantized_outputs(
    naive: ModuleType,
    model_folder: ModelFolder,
    output: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
) -> None:
    """Ranges of a block are those of a model whose earlier blocks are deployed."""
    model = model_folder(family)
    result = quantize(model, tmp_path / "out", "static", propagate="quantized")
    assert result.block_forwards == 2 * BLOCKS * SAMPLES
    written, plain = naive.read(tmp_path / "out"), naive.read(output(family, "static"))
    prefix = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    differ = 0
    for block in range(BLOCKS):
        modules = [name for name in written.quantized() if name.startswith(f"model.layers.{block}.")]
        ranges = naive.ranges(prefix, modules, token_ids)
        for module in modules:
            want = naive.input_parameters(*ranges[module], False, torch.bfloat16)
            found = [float(written.tensors[f"{module}.{part}"]) for part in ("input_scale", "input_offset")]
            assert found == list(want)
            floats = [float(plain.tensors[f"{module}.{part}"]) for part in ("input_scale", "input_offset")]
            differ += found != floats
            assert block > 0 or found == floats
        naive.deploy(prefix, written, f"model.layers.{block}.")
    assert differ > 0  # else this test would not tell the two ways apart


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_batches_of_equal_length_find_the_same_ranges(
    naive: ModuleType, model_folder: ModelFolder, tmp_path: Path, quantize: Quantize, aggregation: str
) -> None:
    words = ["one", "two", "three", "four", "five", "red", "blue", "green", "a b c", "x y z", "this is it"]
    data = tmp_path / "words.json"
    data.write_text(json.dumps(words))
    model, found = model_folder("mistral", torch.float32), []
    forwards = []
    process = [
        {
            "type": "linear_quant",
            "qconfig": {
                "act": {
                    "dtype": "int8",
                    "scope": "per_tensor",
                    "symmetric": False,
                    "method": "minmax",
                    "ext": {"aggregation_type": aggregation},
                },
                "weight": {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"},
            },
        }
    ]
    for size in (1, 2, 64):
        out = tmp_path / f"out{size}"
        dataset = {"path": str(data), "batch_size": size}
        forwards.append(quantize(model, out, process=process, dataset=dataset).block_forwards)
        found.append(naive.read(out))
    assert forwards[0] == BLOCKS * len(words)
    assert forwards[0] > forwards[1] > forwards[2]
    for other in found[1:]:
        for module in found[0].quantized():
            one, two = (float(w.tensors[f"{module}.input_scale"]) for w in (found[0], other))
            assert one == pytest.approx(two, rel=1e-5)


def test_fewer_samples_and_shorter_ones(
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    dataset: Path,
    token_ids: list[list[int]],
    tmp_path: Path,
) -> None:
    model = model_folder("llama")
    options = {"path": str(dataset), "num_samples": 2, "max_length": 7}
    result = quantize(model, tmp_path / "out", "static", dataset=options)
    assert result.block_forwards == 2 * BLOCKS
    written = naive.read(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    ranges = naive.ranges(plain, written.quantized(), [ids[:7] for ids in token_ids[:2]])
    for module in written.quantized():
        scale, offset = naive.input_parameters(*ranges[module], False, torch.bfloat16)
        assert float(written.tensors[f"{module}.input_scale"]) == scale
        assert float(written.tensors[f"{module}.input_offset"]) == offset

"""Every practice of a family, run on a tiny model of that family and read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import Recipe, load_recipe
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.service import LlmService

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "examples" / "tiny-qwen3"
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen1_5": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_5": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwq": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
}
FILES = [path for family in ARCHITECTURES for path in sorted((ROOT / "lab_practice" / family).glob("*.yaml"))]
# What each type makes of the seven linears of a block: q, k, v, o, gate, up, down.
W8A8 = ["W8A8"] * 6 + ["W8A8_DYNAMIC"]
KINDS = {
    "w8a8": W8A8,
    "w8a8c8": W8A8,
    "w8a16": ["W8A16"] * 7,
    "w8a8s": ["W8A8S"] * 7,
    "w16a16s": ["W16A16S"] * 7,
    "w4a8": ["W4A8_DYNAMIC"] * 7,
    "w4a8c8": ["W4A8_DYNAMIC"] * 7,
    "w4a4": ["W8A8_DYNAMIC"] * 4 + ["W4A4_DYNAMIC"] * 2 + ["W8A8_DYNAMIC"],
}
# Most that the perplexity of the shipped model may grow by: the targets, or twice what was measured for pruning types.
RATIOS = {"w8a8": 1.005, "w8a8c8": 1.005, "w8a16": 1.001, "w8a8s": 1.03, "w16a16s": 1.02, "w4a8": 1.02}
RATIOS |= {"w4a8c8": 1.02, "w4a4": 1.06}
TEXTS = ["Read the file, then close it.", "def add(a, b):\n    return a + b\n", "量化把浮点数变成整数。"]


def brief(path: Path, data: Path, samples: int) -> Recipe:
    """The practice with a small calibration set."""
    recipe = load_recipe(path)
    content = path.read_text("utf-8").replace("mix_calib.jsonl", f"{{path: {data}, num_samples: {samples}}}")
    (data.parent / path.name).write_text(content, "utf-8")
    return load_recipe(data.parent / path.name) if "dataset" in content else recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


def made(family: str, folder: Path) -> Path:
    name, options = ARCHITECTURES[family]
    config = getattr(transformers, name)(
        **{"vocab_size": 3072, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64}
        | {"bos_token_id": 3069, "eos_token_id": 3071, "pad_token_id": 3069}
        | options
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("layernorm.weight"):  # outlier channels, as trained models have them
                parameter[3::40] *= 30
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps({"inputs_pretokenized": text}) + "\n" for text in TEXTS), "utf-8")
    return path


def cases() -> list[Any]:
    """All; those of Qwen1.5, which are those of Qwen2 under other names, with ``-m slow``."""
    slow = {"qwen1_5": pytest.mark.slow}
    return [pytest.param(path, marks=slow.get(path.parent.name, ()), id=path.stem) for path in FILES]


@pytest.mark.parametrize("path", cases())
def test_it_runs_on_its_family_and_reads_back(path: Path, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    family, quant_type = path.parent.name, path.stem.rpartition("-")[2]
    model, output = models[family], tmp_path / "out"
    request = QuantRequest(model_path=model, save_path=output, model_type=family, device="cpu")
    LlmService().quantize(request, brief(path, data, 3), SilentProgress())
    description = json.loads((output / "quant_model_description.json").read_text())
    block = "model.layers.1."
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linears += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert [description[f"{block}{name}.weight"] for name in linears] == KINDS[quant_type]
    cached = {name for name in description if re.fullmatch(r".*kv_cache_scale", name)}
    assert len(cached) == (4 if quant_type.endswith("c8") else 0)
    result = verify_folder(output, original=model)
    assert result.ok, result.problems


@pytest.mark.parametrize(
    "quant_type",
    [pytest.param(kind, marks=() if kind in ("w8a8", "w4a4", "w4a8c8") else pytest.mark.slow) for kind in KINDS],
)
def test_what_it_costs_the_shipped_model(quant_type: str, tmp_path: Path) -> None:
    recipe = ROOT / "lab_practice" / "qwen3" / f"qwen3-{quant_type}.yaml"
    assert 0.99 < cost(ROOT / "examples" / "tiny-qwen3", recipe, tmp_path) <= RATIOS[quant_type]


@pytest.mark.parametrize(("quant_type", "most"), [("w8a8", 1.005), pytest.param("w4a8", 1.03, marks=pytest.mark.slow)])
def test_what_it_costs_the_shipped_mixture_of_experts(quant_type: str, most: float, tmp_path: Path) -> None:
    recipe = ROOT / "lab_practice" / "qwen3_moe" / f"qwen3-moe-{quant_type}.yaml"
    assert 0.99 < cost(ROOT / "examples" / "tiny-qwen3-moe", recipe, tmp_path) <= most


def cost(model: Path, practice: Path, folder: Path) -> float:
    """The ratio of perplexities, from the written files, on a quarter of the held-out text, calibrated on a part of the
    bundled set."""
    text, output, calibration = folder / "text.txt", folder / "out", folder / "mix.jsonl"
    held_out = (ROOT / "examples" / "heldout.txt").read_text("utf-8")
    text.write_text(held_out[: len(held_out) // 4], "utf-8")
    calibration.write_text((ROOT / "lab_calib" / "mix_calib.jsonl").read_text("utf-8"), "utf-8")
    request = QuantRequest(model_path=model, save_path=output, model_type=model.name, device="cpu")
    LlmService().quantize(request, brief(practice, calibration, 16), SilentProgress())
    asked = EvalRequest(model_path=model, quantized=output, text=text, device="cpu")
    return LlmService().evaluate(asked, SilentProgress()).ratio

"""The practices of mixtures of experts, and of Qwen3.5, run on a tiny model of their family, read back and scored.

A dozen by default, one of every layout and type; all of them with ``-m slow``.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import load_recipe
from slim_core.runners.plan import Plan
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.service import LlmService

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
DENSE = ("default", "llama", "qwen1_5", "qwen2", "qwen2_5", "qwen3", "qwq")
FILES = [
    path
    for path in sorted((ROOT / "lab_practice").glob("*/*.yaml"))
    if path.parent.name not in DENSE and "apiversion: modelslim_v1\n" in path.read_text("utf-8")
]
QUICK = ("deepseek-v2-w8a16", "deepseek-v3-w4a8c8", "deepseek-v4-w8a8", "glm-5-w4a4c8", "gpt-oss-w4a8", "llama4-w8a8")
QUICK += ("longcat-flash-w8a8", "minimax-m2-w4a8", "mixtral-w8a8c8", "phimoe-w8a8", "qwen3-moe-w4a4", "qwen3-next-w4a8")
# What transformers calls a family, where the folder has another name; Kimi-K2 is built as DeepSeek-V3 is.
MODEL_TYPES = {
    "deepseek_v3_2": "deepseek_v32",
    "glm_5": "glm_moe_dsa",
    "hunyuan_moe": "hunyuan_v1_moe",
    "kimi_k2": "deepseek_v3",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Microscaling formats of experts need 64 to divide their inputs.
WIDTHS = {
    "expert_ffn_hidden_size": 64,
    "ffn_hidden_size": 128,
    "intermediate_size": 128,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "shared_expert_intermediate_size": 64,
}
# As their published models are: a dense block first, or every other one.
LAYOUTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"first_k_dense_replace": 1},
    "llama4_text": {"moe_layers": [1, 3], "interleave_moe_layer_step": 2},
}
# A layer for multi-token prediction, where published checkpoints have one; here it is like the last block.
DRAFTS = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), "model.layers.{}."),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), "mtp.layers.0."),
    "deepseek_v4": "mtp.0.",
    "ernie4_5_moe": "model.mtp_block.0.",
}
NOT_RUN = "the model class does not run drafting layers, so they are not calibrated: "
# Linears that the practices leave in floating point, beside routers.
KEPT = re.compile(r"\.(kv_b_proj|in_proj_(a|b|ba)|indexer\..*|compressor\..*|self_attn\.(wo_a|o_a_proj))$")
ROUTER = re.compile(r"\.(gate|router|classifier|wg|shared_expert_gate)$")
TEXTS = (
    "Read the file, then close it.",
    "The with statement wraps the execution of a block with methods defined by a context manager, which is convenient.",
    "def add(a, b):\n    return a + b\n",
    "量化把浮点数变成整数。",
)
SCORED = "The compiler reads a file, checks what it declares, and writes machine code that runs on the target.\n" * 3
# Of the logits, in dB. Random routers change their mind with the last bit, so this is no measure of quality, but with
# two experts exchanged, or gate and up, at most 4.1 dB were left of W8A8.
LEAST_SQNR = {"w8a8": 5.0, "w8a16": 10.0, "w4a8": 4.0, "w4a4": 3.0}


@pytest.fixture(scope="module")
def tiny_models() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("tiny_models")


@pytest.fixture(scope="module")
def model_of(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        model_type = MODEL_TYPES.get(family, family)
        if model_type not in made:
            plain = vars(tiny_models.tiny_config(model_type))
            widths = {name: width for name, width in WIDTHS.items() if isinstance(plain.get(name), int)}
            model = tiny_models.build(model_type, torch.bfloat16, **widths | LAYOUTS.get(model_type, {}))
            made[model_type] = tmp_path_factory.mktemp(model_type)
            tiny_models.save(model, made[model_type])
            if model_type in DRAFTS:
                add_draft(made[model_type], DRAFTS[model_type])
        return made[model_type]

    return folder


def add_draft(folder: Path, prefix: str) -> None:
    """Give a model a layer that its class does not run: a copy of its last block, and the join of two states."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    blocks = [found for name in tensors if (found := re.match(r"(.*\blayers\.)(\d+)\.", name))]
    last = max(blocks, key=lambda found: int(found[2]))
    prefix = prefix.format(int(last[2]) + 1)
    tensors |= {n.replace(last[0], prefix): t.clone() for n, t in tensors.items() if n.startswith(last[0])}
    hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
    tensors[f"{prefix}eh_proj.weight"] = torch.zeros(hidden, 2 * hidden, dtype=torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def wanted(quant_type: str, name: str, static: bool) -> str:
    """The type of a linear, as the comment of the practice has it."""
    if quant_type == "w8a16":
        return "W8A16"
    experts = re.search(r"\.experts\.\d+\.", name) is not None
    if quant_type.startswith("w4a4"):
        return "W4A4_MXFP4" if experts else "W8A8_MXFP8"
    if quant_type.startswith("w4a8"):
        return "W4A8_DYNAMIC" if experts else "W8A8_DYNAMIC"
    return "W8A8" if static and ".self_attn." in name else "W8A8_DYNAMIC"


def cases() -> list[Any]:
    return [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in FILES]


@pytest.mark.parametrize("path", cases())
def test_it_runs_on_its_family_and_reads_back(path: Path, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    family, quant_type = path.parent.name, path.stem.rpartition("-")[2]
    model, output = model_of(family), tmp_path / "out"
    data, recipe, text = tmp_path / "calibration.jsonl", tmp_path / path.name, tmp_path / "text.txt"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS), "utf-8")
    recipe.write_text(path.read_text("utf-8").replace("mix_calib.jsonl", str(data)), "utf-8")
    text.write_text(SCORED)
    plans: list[Plan] = []
    request = QuantRequest(model_path=model, save_path=output, model_type=family, device="cpu")
    LlmService().quantize(request, load_recipe(recipe), SilentProgress(), plans.append)

    (plan,) = plans
    told = plan.warnings
    if quant_type == "w8a16" and family != "qwen3_5":  # the one without experts
        assert [text for text in told if "W8A16 experts" in text and text.endswith("mindie-llm loads them")]
        told = [text for text in told if "W8A16 experts" not in text]
    if family == "llama4":  # scales what experts are given; Maverick's dense blocks have a norm of the same name
        told = [text for text in told if "cannot smooth 2 places: model.layers.1.post_attention_layernorm" not in text]
    static = "scope: per_tensor" in path.read_text("utf-8")
    linears = [linear for unit in plan.model.units for linear in unit.linears if linear.in_block]
    drafts = {linear.name for linear in linears if not linear.runs}
    assert bool(drafts) == (MODEL_TYPES.get(family, family) in DRAFTS)
    weighted = "weighted: true" in path.read_text("utf-8")
    if drafts and (static or weighted):
        without = "W8A8_DYNAMIC instead of W8A8 (" if static else "weight error not weighted by inputs ("
        assert told.pop().startswith(f"{NOT_RUN}{without}")
    assert told == []

    description = json.loads((output / "quant_model_description.json").read_text())
    types = {linear.name: description[f"{linear.prefix}.weight"] for linear in linears}
    kinds = {name: wanted(quant_type, name, static and name not in drafts) for name in types}
    assert types == {name: "FLOAT" if KEPT.search(name) else kind for name, kind in kinds.items()}
    before, after = stored(model), stored(output)
    routers = [name for name in before if ROUTER.search(name.removesuffix(".weight"))]
    assert routers or family == "qwen3_5"
    for name in routers:
        assert (description[name], after[name]) == ("FLOAT", before[name])
    if quant_type.endswith("c8"):
        latent = any(name.endswith("kv_b_proj") for name in types)
        runs = [name for name in types if name not in drafts]
        attentions = {name.rpartition(".")[0] for name in runs if re.search(r"self_attn\.o_proj$", name)}
        marks = [name for name in after if name.endswith("fa_k.scale" if latent else "k_proj.kv_cache_scale")]
        assert len(marks) == len(attentions) > 0

    result = verify_folder(output, model, "mindie-llm" if quant_type == "w8a16" else "vllm-ascend")
    assert result.ok, result.problems
    scores = LlmService().evaluate(
        EvalRequest(model_path=model, quantized=output, text=text, device="cpu", sequence_length=48), SilentProgress()
    )
    assert scores.logits_sqnr_db is not None
    assert scores.logits_sqnr_db > LEAST_SQNR[quant_type.removesuffix("c8")]


def test_what_runs_by_default_has_every_layout() -> None:
    """The families that are left have the layout of another."""
    quick = {path.parent.name for path in FILES if path.stem in QUICK}
    assert len({path.stem for path in FILES} & set(QUICK)) == len(QUICK)
    same = {"deepseek_v3_2", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "hunyuan_moe", "kimi_k2", "olmoe"}
    same |= {"qwen2_moe", "qwen3_5", "qwen3_5_moe"}
    assert quick | same == {path.parent.name for path in FILES}


def test_qwen3_5_as_it_is_published_keeps_its_vision_tower(tiny_models: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(3)
    built = AutoModelForImageTextToText.from_config(tiny_models.tiny_config("qwen3_5_moe"), dtype=torch.bfloat16)
    model, output, data = tmp_path / "model", tmp_path / "out", tmp_path / "calibration.jsonl"
    tiny_models.save(built, model)
    data.write_text(json.dumps({"text": TEXTS[1]}) + "\n", "utf-8")
    practice = ROOT / "lab_practice" / "qwen3_5_moe" / "qwen3.5-moe-w8a8.yaml"
    recipe = tmp_path / practice.name
    recipe.write_text(practice.read_text("utf-8").replace("mix_calib.jsonl", str(data)), "utf-8")
    request = QuantRequest(model_path=model, save_path=output, model_type="Qwen3.5-35B-A3B", device="cpu")
    LlmService().quantize(request, load_recipe(recipe), SilentProgress())
    description = json.loads((output / "quant_model_description.json").read_text())
    before, after = stored(model), stored(output)
    tower = {name: kind for name, kind in before.items() if name.startswith("model.visual.")}
    assert tower
    assert tower == {name: after.get(name) for name in tower}
    quantized = {name for name, kind in description.items() if kind == "W8A8_DYNAMIC" and name.endswith(".weight")}
    for name in ("linear_attn.in_proj_qkv", "mlp.experts.3.down_proj", "mlp.shared_expert.up_proj"):
        assert f"model.language_model.layers.0.{name}.weight" in quantized
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    result = verify_folder(output, model, "vllm-ascend")
    assert result.ok, result.problems

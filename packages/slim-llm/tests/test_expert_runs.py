"""Mixtures of experts from the recipe to written files that verify and can be scored, family by family."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slim_core.checkpoint.reader import Checkpoint
from slim_core.evaluation.perplexity import EvalResult
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest
from slim_llm.models.experts import experts_apart
from slim_llm.models.loading import open_model
from slim_llm.service import LlmService

FAMILIES = [
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "minimax_m2", "deepseek_v2", "deepseek_v3", "glm4_moe"),
    *("olmoe", "gpt_oss", "llama4", "jetmoe", "nemotron_h"),
]
STATIC = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4"]
FLOAT = re.compile(
    r"norm|embed|lm_head|score_correction|\.gate\.weight|router|shared_expert_gate|conv1d|A_log|\.D$|dt_bias"
)
TEXT = "A generator is a function that returns an iterator. The with statement wraps the execution of a block.\n"
ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(model: Path, text: Path, quantized: Path) -> EvalResult:
    request = EvalRequest(model_path=model, text=text, quantized=quantized, device="cpu", sequence_length=16)
    return LlmService().evaluate(request, SilentProgress())


def assert_sound(naive: ModuleType, folder: Path, written: Path, kind: str) -> None:
    """The folder verifies, holds all of the model, quantized what it should, and the codes are those of the weights."""
    report = verify_folder(written, folder)
    assert report.ok, report.text()
    assert report.compared
    model, found = open_model(folder), naive.read(written)
    names = {name for unit in model.units for name in unit.tensors}
    assert names - set(found.tensors) - {name for name in names if name.endswith(".bias")} == set()
    linears = {info.prefix: info for unit in model.units for info in unit.linears if info.in_block}
    for prefix in linears:
        assert found.kind(prefix) == kind
        codes, _, _ = naive.weight_codes(model.source.load(f"{prefix}.weight"))
        assert (found.array(f"{prefix}.weight") == codes).all(), prefix
    for name in set(model.source) - {f"{prefix}.{part}" for prefix in linears for part in ("weight", "bias")}:
        assert FLOAT.search(name) or name.endswith(("sinks", ".bias")), name
        assert found.description[name] == "FLOAT"
        assert naive.bits(found.tensors[name]) == naive.bits(model.source.load(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic(naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, text: Path, family: str) -> None:
    folder, written = model_folder(family), output(family, "dynamic")
    assert_sound(naive, folder, written, "W8A8_DYNAMIC")
    scores = evaluate(folder, text, written)
    assert math.isfinite(scores.perplexity)
    assert scores.kl_divergence is not None
    assert 1e-6 < scores.kl_divergence < 0.2


@pytest.mark.parametrize("family", STATIC)
def test_static(naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, text: Path, family: str) -> None:
    folder, written = model_folder(family), output(family, "static")
    assert_sound(naive, folder, written, "W8A8")
    scores = evaluate(folder, text, written)
    assert scores.kl_divergence is not None
    assert 1e-6 < scores.kl_divergence < 0.3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_static_ranges_are_those_of_the_tokens_routed_to_an_expert(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, token_ids: list[list[int]], family: str
) -> None:
    """Taken from the stacked experts of transformers: what goes into each of the first ones, by its routing."""
    dtype = torch.float32
    folder = model_folder(family, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    seen: list[tuple[Tensor, Tensor]] = []
    name = "model.layers.0.mlp.experts"
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[:2]))
    with torch.no_grad():
        for ids in token_ids:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    found = naive.read(output(family, "static", dtype))
    for expert in range(4):
        given = torch.cat([states[(index == expert).any(-1)] for states, index in seen])
        scale, offset = naive.input_parameters(float(given.min()), float(given.max()), False, dtype)
        for linear in ("gate_proj", "up_proj"):
            assert found.array(f"{name}.{expert}.{linear}.input_scale") == pytest.approx(scale, rel=1e-5)
            assert found.array(f"{name}.{expert}.{linear}.input_offset") == pytest.approx(offset, abs=1)


def test_stacked_experts_are_written_one_by_one_even_if_they_stay_float(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, text: Path, tmp_path: Path
) -> None:
    for family in ("gpt_oss", "llama4"):
        folder, written = model_folder(family), tmp_path / family
        quantize(folder, written, "dynamic", exclude=["*"])
        report = verify_folder(written, folder)
        assert report.ok, report.text()
        source, found = open_model(folder).source, naive.read(written)
        assert set(found.tensors) >= set(source)
        assert all(naive.bits(found.tensors[name]) == naive.bits(source.load(name)) for name in source)
        scores = evaluate(folder, text, written)
        assert scores.kl_divergence == pytest.approx(0, abs=1e-6)
        assert scores.top1_agreement == 1.0


def test_stacks_and_single_tensors_give_the_same_output(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder = model_folder("qwen3_moe", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, change in (("stacked", lambda t: t), ("turned", lambda t: t.mT if t.dim() == 3 else t)):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        changed = {key: change(tensor).contiguous() for key, tensor in tensors.items()}
        save_file(changed, tmp_path / name / "model.safetensors")
        quantize(tmp_path / name, tmp_path / f"{name}-out", "static")
        found, want = naive.read(tmp_path / f"{name}-out"), naive.read(output("qwen3_moe", "static", torch.float32))
        assert found.description == want.description
        for key, tensor in want.tensors.items():
            if key.endswith(".weight"):
                assert naive.bits(found.tensors[key]) == naive.bits(tensor), key
            elif key.endswith("_scale"):  # of inputs: sums are rounded otherwise where a matrix lies otherwise
                torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-4, atol=0)


def test_runners_agree(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    quantize(model_folder("gpt_oss"), tmp_path / "out", "static", runner="model_wise")
    one, other = naive.read(tmp_path / "out"), naive.read(output("gpt_oss", "static"))
    assert {name: naive.bits(tensor) for name, tensor in one.tensors.items()} == {
        name: naive.bits(tensor) for name, tensor in other.tensors.items()
    }


def test_quantized_experts_are_what_the_next_block_sees(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder = model_folder("gpt_oss")
    quantize(folder, tmp_path / "out", "static", propagate="quantized")
    assert_sound(naive, folder, tmp_path / "out", "W8A8")
    one, other = naive.read(tmp_path / "out"), naive.read(output("gpt_oss", "static"))
    key = "model.layers.{}.mlp.experts.2.gate_proj.input_scale"
    assert torch.equal(one.tensors[key.format(0)], other.tensors[key.format(0)])
    assert not torch.equal(one.tensors[key.format(2)], other.tensors[key.format(2)])


def test_identity_experts(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, text: Path, tmp_path: Path
) -> None:
    """LongCat: checkpoints have nothing for experts without weights, which transformers writes if it saves a model."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("longcat"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = Checkpoint(model_folder("longcat"))
    kept = {name: raw.load(name).clone() for name in raw if not re.search(r"experts\.[45]\.", name)}
    assert len(kept) < len(raw)
    save_file(kept, folder / "model.safetensors")
    assert [apart.count for _, apart in experts_apart(open_model(folder).module)] == [4, 4]
    quantize(folder, tmp_path / "out", "dynamic")
    assert_sound(naive, folder, tmp_path / "out", "W8A8_DYNAMIC")
    assert 1e-6 < (evaluate(folder, text, tmp_path / "out").kl_divergence or 0) < 0.2

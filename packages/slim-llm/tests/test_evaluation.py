"""Perplexity of models and of written files, against direct forwards of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.errors import InvalidDatasetError, SlimError
from slim_core.evaluation.perplexity import EvalResult
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest
from slim_llm.service import LlmService

TEXT = (
    "The yield expression is used when defining a generator function. Using a yield expression in the body of a "
    "function causes that function to be a generator function, and using it in an async def function's body causes "
    "that coroutine function to be an asynchronous generator function. 生成器函数返回迭代器。\n"
)
LENGTH = 24
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "glm4", "olmo2"]
ModelFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(model: Path, text: Path, quantized: Path | None = None, **options: Any) -> EvalResult:
    options = {"sequence_length": LENGTH} | options
    request = EvalRequest(model_path=model, text=text, quantized=quantized, device="cpu", **options)
    return LlmService().evaluate(request, SilentProgress())


def token_windows() -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "examples" / "tiny-qwen3")(TEXT)["input_ids"]
    parts = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    return [part for part in parts if len(part) > 1]


def direct(*models: Any, windows: int | None = None) -> tuple[int, list[float], float, float]:
    """Tokens, perplexity of each model, KL(first || last) and how often both put the same token first."""
    losses, divergence, same, count = [0.0] * len(models), 0.0, 0, 0
    for part in token_windows()[:windows]:
        with torch.no_grad():
            logs = [
                functional.log_softmax(
                    model(input_ids=torch.tensor([part]), use_cache=False).logits[0, :-1].double(), -1
                )
                for model in models
            ]
        target = torch.tensor(part[1:])
        count += len(target)
        for i, log in enumerate(logs):
            losses[i] -= float(log[torch.arange(len(target)), target].sum())
        divergence += float((logs[0].exp() * (logs[0] - logs[-1])).sum())
        same += int((logs[0].argmax(-1) == logs[-1].argmax(-1)).sum())
    return count, [math.exp(loss / count) for loss in losses], divergence / count, same / count


def logits_sqnr(plain: Any, deployed: Any) -> float:
    """Decibels, over all predicted tokens; what all logits of a token share says nothing."""
    signal = noise = 0.0
    for window in map(torch.tensor, token_windows()):
        with torch.no_grad():
            exact, other = (model(input_ids=window[None]).logits[0, :-1].float() for model in (plain, deployed))
        difference = other - exact
        signal += float((exact - exact.mean(-1, keepdim=True)).square().sum())
        noise += float((difference - difference.mean(-1, keepdim=True)).square().sum())
    return 10 * math.log10(signal / noise)


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_and_quantized_perplexity(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, text: Path, family: str
) -> None:
    folder, written = model_folder(family), output(family, "static")
    plain, deployed = load(folder, torch.bfloat16), load(folder, torch.bfloat16)
    naive.deploy(deployed, naive.read(written))
    count, (perplexity, quantized), divergence, agreement = direct(plain, deployed)
    result = evaluate(folder, text, written)
    assert result.tokens == count
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.quantized_perplexity == pytest.approx(quantized, rel=1e-4)
    assert result.kl_divergence == pytest.approx(divergence, rel=1e-3)
    assert result.kl_divergence > 1e-4
    assert result.top1_agreement == pytest.approx(agreement)
    assert result.ratio == pytest.approx(quantized / perplexity, rel=1e-4)
    assert result.logits_sqnr_db == pytest.approx(logits_sqnr(plain, deployed), abs=0.05)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("dynamic", torch.bfloat16),
        ("w8a16", torch.bfloat16),
        ("static", torch.float32),
        ("static", torch.float16),
        ("w8a16-asymmetric", torch.float32),
    ],
)
def test_other_schemes_and_dtypes(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, text: Path, scheme: str, dtype: torch.dtype
) -> None:
    """qwen2 has biases and a tied head."""
    folder, written = model_folder("qwen2", dtype), output("qwen2", scheme, dtype)
    plain, deployed = load(folder, dtype), load(folder, dtype)
    naive.deploy(deployed, naive.read(written))
    _, (perplexity, quantized), divergence, _ = direct(plain, deployed)
    result = evaluate(folder, text, written)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.quantized_perplexity == pytest.approx(quantized, rel=1e-4)
    assert result.kl_divergence == pytest.approx(divergence, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v32", "mamba"])
def test_models_that_read_the_weight_of_a_linear(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, text: Path, family: str
) -> None:
    """An indexer asks ``weights_proj.weight`` for its dtype; a state-space model multiplies by ``dt_proj.weight``."""
    folder, written = model_folder(family), output(family, "w8a16")
    plain, deployed = load(folder, torch.bfloat16), load(folder, torch.bfloat16)
    files = naive.read(written)
    read = {"deepseek_v32": "self_attn.indexer.weights_proj", "mamba": "mixer.dt_proj"}[family]
    assert [name for name in files.quantized() if name.endswith(read)]
    for name in files.quantized():
        scale, offset = (files.tensors[f"{name}.weight_{part}"] for part in ("scale", "offset"))
        weight = (files.tensors[f"{name}.weight"].float() - offset) * scale
        deployed.get_submodule(name).weight.data = weight.bfloat16()
    _, (perplexity, quantized), divergence, _ = direct(plain, deployed)
    result = evaluate(folder, text, written)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.quantized_perplexity == pytest.approx(quantized, rel=1e-4)
    assert result.kl_divergence == pytest.approx(divergence, rel=1e-2)


def test_original_alone(model_folder: ModelFolder, text: Path) -> None:
    folder = model_folder("llama")
    result = evaluate(folder, text, max_windows=2)
    count, (perplexity,), _, _ = direct(load(folder, torch.bfloat16), windows=2)
    assert result.tokens == count == 2 * (LENGTH - 1)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.quantized_perplexity is result.kl_divergence is result.top1_agreement is result.ratio is None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_copy_diverges_by_nothing(
    model_folder: ModelFolder, quantize: Callable[..., Any], text: Path, tmp_path: Path, family: str
) -> None:
    result = quantize(model_folder(family), tmp_path / "copy", "static", exclude=["*"])
    assert any("no linear is quantized" in warning for warning in result.warnings)
    assert result.block_forwards == 0
    scores = evaluate(model_folder(family), text, tmp_path / "copy")
    assert scores.kl_divergence == 0.0
    assert scores.top1_agreement == 1.0
    assert scores.logits_sqnr_db == math.inf
    assert scores.quantized_perplexity == scores.perplexity


def test_windows_fit_the_model(model_folder: ModelFolder, text: Path) -> None:
    """The model has 64 positions; longer windows are cut to that."""
    long, cut = (evaluate(model_folder("llama"), text, sequence_length=n) for n in (4096, 64))
    assert long == cut


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the text is empty"), (b"\xff\xfe", "cannot be read as UTF-8"), (None, "cannot be read")],
)
def test_texts_that_cannot_be_scored(
    model_folder: ModelFolder, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidDatasetError, match=message):
        evaluate(model_folder("llama"), path)


def test_a_missing_tensor_of_the_output(
    model_folder: ModelFolder, output: ModelFolder, text: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    shutil.copytree(output("llama", "static"), tmp_path / "out")
    description = tmp_path / "out" / "quant_model_description.json"
    types = json.loads(description.read_text())
    types["model.layers.0.mlp.up_proj.weight"] = "W8A8_DYNAMIC"
    description.write_text(json.dumps(types))
    with pytest.raises(SlimError, match=r"model\.layers\.0\.mlp\.up_proj\.weight_scale: the tensor is missing"):
        evaluate(model_folder("llama"), text, tmp_path / "out")
    types["model.layers.0.mlp.up_proj.weight"] = "W3A3"
    description.write_text(json.dumps(types))
    with pytest.raises(SlimError, match=r"model\.layers\.0\.mlp\.up_proj: layers of type 'W3A3' cannot be read"):
        evaluate(model_folder("llama"), text, tmp_path / "out")


def test_files_of_another_model(model_folder: ModelFolder, output: ModelFolder, text: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(output("llama", "static"), tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(
        SlimError, match=r"out: the files were written for another model: model\.layers\.1\..* not there"
    ):
        evaluate(model_folder("llama"), text, tmp_path / "out")

"""A tiny language model with biases, quantized for MindIE-SD by the real command. What the saver writes does not depend
on the kind of model."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TOKEN8 = {"dtype": "int8", "scope": "per_token"}
WEIGHT8 = {"dtype": "int8", "scope": "per_channel"}
MX8, MX4 = {"dtype": "mxfp8", "scope": "per_block"}, {"dtype": "mxfp4", "scope": "per_block"}
DUAL = {"dtype": "mxfp4", "scope": "dual_scale", "method": "dualscale", "ext": {"dual_block_size": 64}}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"act": {"dtype": "int8", "scope": "per_tensor", "symmetric": False}, "weight": WEIGHT8},
    "W8A8_DYNAMIC": {"act": TOKEN8, "weight": WEIGHT8},
    "W8A8_MXFP8": {"act": MX8, "weight": MX8},
    "W4A4_MXFP4": {"act": MX4, "weight": MX4},
    "W4A4_MXFP4_DUALSCALE": {"act": DUAL, "weight": DUAL},
}


@pytest.fixture(scope="session")
def reader() -> ModuleType:
    """The independent reader, ``reader.py`` in this folder."""
    path = Path(__file__).with_name("reader.py")
    spec = importlib.util.spec_from_file_location("mindie_reader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def schemes() -> dict[str, dict[str, Any]]:
    """The ``qconfig`` of each type."""
    return SCHEMES


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``build(dtype, **config)``: a saved model with a tokenizer."""

    def model(dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "vocab_size": json.loads((EXAMPLE / "config.json").read_text())["vocab_size"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            **changes,
        }
        torch.manual_seed(0)
        built = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
        for parameter in built.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("model") / "tiny"
        built.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EXAMPLE / name, folder / name)
        (folder / "modeling_tiny.py").write_text("# code that comes with the model\n")
        (folder / "notes.txt").write_text("not for MindIE-SD\n")
        (folder / "diffusion_pytorch_model.json.index.json").write_text("{}")
        return folder

    return model


@pytest.fixture(scope="session")
def model(build: Callable[..., Path]) -> Path:
    """The model of most tests, float32."""
    return build()


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calib.jsonl"
    texts = ("A generator is a function that returns an iterator.", "Hello, world!", "def add(a, b): return a + b")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def slim() -> Callable[..., Result]:
    """Run the command in this process."""
    from slim_cli.main import app

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def quant(slim: Callable[..., Result], model: Path, calibration: Path) -> Callable[..., Result]:
    """``quant(out, process, *options, saver={...}, source=...)``: one run of ``slim quant``."""

    def run(out: Path, process: list[Any], *options: str, saver: Any = None, source: Path | None = None) -> Result:
        save = [{"type": "mindie_format_saver"} | (saver or {})]
        spec = {"process": process, "save": save, "dataset": str(calibration)}
        recipe = out.parent / f"{out.name}.yaml"
        recipe.write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}))  # JSON is YAML
        places = ("--model_path", source or model, "--save_path", out, "--config_path", recipe)
        return slim("quant", *places, "--model_type", "tiny", "--device", "cpu", *options)

    return run


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, quant: Callable[..., Result]) -> Callable[..., Path]:
    """``written(kind, **saver)``: the folder of a run. Only to be read."""
    made: dict[tuple[Any, ...], Path] = {}

    def folder(kind: str, **saver: Any) -> Path:
        key = (kind, *sorted(saver.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / kind.lower()
            found = quant(out, [{"type": "linear_quant", "qconfig": SCHEMES[kind]}], saver=saver)
            assert found.exit_code == 0, found.output
            made[key] = out
        return made[key]

    return folder

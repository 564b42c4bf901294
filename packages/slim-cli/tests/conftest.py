"""A tiny random model, and ways to run the command in this process and in its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
DATA_FREE = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: true, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*"]
      exclude: ["*layers.0.mlp.down_proj"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random blocks behind the tokenizer of the example."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "random-qwen3"
    config = Qwen3Config(
        vocab_size=json.loads((EXAMPLE / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that needs no calibration data."""
    path = tmp_path_factory.mktemp("recipe") / "w8a8-dynamic.yaml"
    path.write_text(DATA_FREE)
    return path


@pytest.fixture
def quant(model: Path, recipe: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a `slim quant` that works, with more behind them."""

    def arguments(*more: str, device: bool = True) -> list[str]:
        start = ["quant", "--model_path", str(model), "--save_path", str(tmp_path / "out"), "--model_type", "random"]
        return [
            *start,
            *(["--device", "cpu"] if device else []),
            *([] if "--quant_type" in more else ["--config_path", str(recipe)]),
            *more,
        ]

    return arguments


@pytest.fixture
def only_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the accelerators of this machine."""
    monkeypatch.setattr("slim_core.devices._available", lambda kind: int(kind == "cpu"))


Slim = Callable[..., Result]


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> Slim:
    """Run the command in this process; standard input is no terminal."""
    from slim_cli.main import app

    monkeypatch.delenv("MSMODELSLIM_LOG_LEVEL", raising=False)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def installed() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed console script."""
    script = Path(sys.executable).parent / "slim"

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *map(str, arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            timeout=120,
            check=False,
        )

    return run

"""What a real run writes passes the independent check, and its report tells the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from slim_core.devices import Devices
from slim_core.evaluation.inspect import inspect_folder
from slim_core.evaluation.report import write_report
from slim_core.evaluation.verify import verify_folder
from slim_core.model.streamed import StreamedModel
from slim_core.progress import SilentProgress
from slim_core.recipe import SpecV1
from slim_core.runners.plan import make_plan
from slim_core.runners.run import RunResult, run_plan
from slim_core.savers.side_files import write_text
from slim_llm.models.loading import open_model

INPUTS = [{"input_ids": torch.arange(12)[None] * 3 % 90, "use_cache": False} for _ in range(2)]
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
STATIC = {"act": {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}, "weight": WEIGHT}
DYNAMIC = {"act": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}, "weight": WEIGHT}
SPEC = {
    "process": [
        {"type": "linear_quant", "qconfig": STATIC, "exclude": ["*down_proj"]},
        {"type": "linear_quant", "qconfig": DYNAMIC, "include": ["*down_proj"]},
    ],
    "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        dtype=request.param,
    )
    folder = tmp_path_factory.mktemp("model") / request.param
    model = Qwen3ForCausalLM(config).to(getattr(torch, request.param))
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


class StopsAt(SilentProgress):
    """Interrupts the run when a unit is done."""

    def __init__(self, step: str) -> None:
        self._step = step

    def done(self, step: str) -> None:
        if step == self._step:
            raise KeyboardInterrupt


def quantize(model: StreamedModel, out: Path, progress: Any = None, *, resume: bool = False) -> RunResult:
    plan = make_plan(model, SpecV1.model_validate(SPEC), Devices("cpu"))

    def finish(folder: Path, result: RunResult) -> None:
        write_text(folder / "tiny_best_practice.yaml", json.dumps({"spec": SPEC}))
        write_report(folder, plan, result, title="tiny", debug=True)

    return run_plan(
        plan,
        out,
        fingerprint="f",
        progress=progress or SilentProgress(),
        calibration=lambda: INPUTS,
        resume=resume,
        finish=finish,
    )


def test_what_a_run_writes_is_right(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(open_model(model_folder), out)
    found = verify_folder(out, model_folder)
    assert not found.problems
    assert not found.warnings
    assert found.compared
    assert found.checked == len(load_file(out / "quant_model_weights-00001-of-00001.safetensors"))
    report = json.loads((out / "report.json").read_text())
    assert report["block_forwards"] == 3 * len(INPUTS)
    assert report["bytes_out"] == report["predicted_bytes_out"]
    assert sum(row["low"] is not None for row in report["linears"]) == 3 * 6
    assert all(row["tokens"] == 24 for row in report["linears"] if row["low"] is not None)
    assert report["bytes_in"] == sum(t.nbytes for t in load_file(model_folder / "model.safetensors").values())
    assert inspect_folder(out).model_quant_type == "W8A8"


def test_a_changed_byte_is_found(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(open_model(model_folder), out)
    file = out / "quant_model_weights-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 9
    save_file(tensors, file)
    file.chmod(0o600)
    assert [p.split(":")[0] for p in verify_folder(out, model_folder).problems] == [
        "model.layers.1.mlp.down_proj.weight"
    ]


def test_the_report_of_a_resumed_run_tells_all(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(open_model(model_folder), out, StopsAt("model.layers.1"))
    result = quantize(open_model(model_folder), out, resume=True)
    assert result.resumed_units > 0
    report = json.loads((out / "report.json").read_text())
    assert report["resumed_units"] == result.resumed_units
    assert all(unit["seconds"] is not None for unit in report["units"])
    assert all(row["sqnr_db"] is not None for row in report["linears"] if row["kind"] != "FLOAT")
    assert not verify_folder(out, model_folder).problems

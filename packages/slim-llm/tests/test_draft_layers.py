"""Layers for multi-token prediction, as checkpoints on the hub hold them: linears of the model as far as rules go."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slim_core.evaluation.inspect import inspect_folder
from slim_core.evaluation.verify import verify_folder
from slim_core.processors.linear_quant import LinearQuant
from slim_llm.__main__ import main
from slim_llm.models.loading import open_model

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
DRAFTS = "the model class does not run drafting layers, so they are not calibrated: "
PER_TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
CHANNELS: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}


def rule(act: dict[str, Any] | None, weight: dict[str, Any], **names: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, **names}


@pytest.mark.parametrize(
    ("family", "fp8"), [("deepseek_v3", False), ("deepseek_v3", True), ("glm4_moe", False), ("qwen3_next", False)]
)
def test_a_rule_for_everything(
    drafts: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    family: str,
    fp8: bool,
) -> None:
    tensors = drafts.published(
        model_folder(family), family, tmp_path / "model", fp8=naive.Fp8Blocks(drafts.BLOCK) if fp8 else None
    )
    result = quantize(tmp_path / "model", tmp_path / "out", "dynamic")
    assert [text for text in result.warnings if "draft" in text] == []
    drafts.check(naive.read(tmp_path / "out"), naive, family, tensors)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    verified = verify_folder(tmp_path / "out", tmp_path / "model", "vllm-ascend")
    assert verified.ok, verified.problems
    assert [text for text in map(str, verified.warnings) if drafts.NAMES[family][0] in text] == []


@pytest.fixture
def log() -> Iterator[None]:
    """Leaves the log as it was; commands set it up."""
    root = logging.getLogger("slim")
    before = root.handlers, root.propagate, root.level
    yield
    root.handlers, root.propagate = before[0], before[1]
    root.setLevel(before[2])


@pytest.mark.usefixtures("log")
def test_the_command_lists_quantizes_and_scores(
    drafts: ModuleType, model_folder: ModelFolder, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan and the report have every linear with what it becomes and why; what nothing runs is not scored."""
    tensors = drafts.published(model_folder("glm4_moe"), "glm4_moe", tmp_path / "model")
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    process = [rule(STATIC, CHANNELS, include=["*.self_attn.*"]), rule(PER_TOKEN, CHANNELS, exclude=["*.self_attn.*"])]
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": str(dataset)}
    recipe.write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}))
    text.write_text("def add(a, b):\n    return a + b\n" * 6)
    arguments = ["quant", "--model_path", str(tmp_path / "model"), "--save_path", str(tmp_path / "out")]
    arguments += ["--model_type", "tiny", "--config_path", str(recipe), "--device", "cpu"]
    assert main([*arguments, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    listing = plan[plan.index("\nmodel.layers.3: ") :]
    lines = [line.split(maxsplit=6) for line in listing.splitlines() if "self_attn" in line]
    why = "spec.process[0]; a drafting layer, not calibrated: W8A8_DYNAMIC instead of W8A8"
    assert [[line[0], line[4], line[5] + " " + line[6]] for line in lines] == [
        [f"self_attn.{leaf}_proj", "W8A8_DYNAMIC", why] for leaf in "qkvo"
    ]
    assert "spec.process[1]; a drafting layer, not calibrated\n" in listing
    assert "eh_proj" not in listing
    assert not (tmp_path / "out").exists()

    assert main(arguments) == 0
    capsys.readouterr()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = {row["name"]: row for row in report["linears"] if row["unit"] == "model.layers.3"}
    assert set(told) == set(drafts.quantized_of("glm4_moe", tensors))
    for name, row in told.items():
        assert row["kind"] == "W8A8_DYNAMIC"
        assert row["reason"] == (why if "self_attn" in name else "spec.process[1]; a drafting layer, not calibrated")
        assert (row["tokens"], row["low"], row["high"]) == (None, None, None)
        assert row["sqnr_db"] > 25
    assert {unit["name"]: unit["kind"] for unit in report["units"]}["model.layers.3"] == "draft"
    assert (
        f"{DRAFTS}W8A8_DYNAMIC instead of W8A8 (4 linears, e.g. model.layers.3.self_attn.q_proj)"
        in (report["warnings"])
    )
    held = inspect_folder(tmp_path / "out")
    assert held.leaves["o_proj", "W8A8"].modules == 3
    assert held.leaves["o_proj", "W8A8_DYNAMIC"].modules == 1
    assert "model.layers.3.eh_proj" in held.float_linears

    scores = []
    for folder in ("out", "other"):
        if folder == "other":  # the same without that layer
            for at in ("model", "out"):
                kept = {n: t for n, t in load_one(tmp_path / at).items() if not n.startswith("model.layers.3.")}
                rewrite(tmp_path / at, kept)
        path = tmp_path / f"{folder}.json"
        asked = ["eval", str(tmp_path / "model"), "--quantized", str(tmp_path / "out"), "--text", str(text)]
        assert main([*asked, "--device", "cpu", "--json", str(path)]) == 0
        scores.append(json.loads(path.read_text()))
    assert scores[0]["perplexity"] == scores[1]["perplexity"]
    assert scores[0]["quantized_perplexity"] == scores[1]["quantized_perplexity"]


def load_one(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file, {"format": "pt"})
    for index in folder.glob("*.index.json"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))


@pytest.mark.parametrize("act", ["per_tensor", "pd_mix"])
def test_static_rules_become_dynamic(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, act: str
) -> None:
    tensors = drafts.published(
        model_folder("deepseek_v3"), "deepseek_v3", tmp_path / "model", fp8=naive.Fp8Blocks(drafts.BLOCK)
    )
    process = [rule(STATIC | {"scope": act}, CHANNELS)]
    quantize(tmp_path / "model", tmp_path / "out", process=process)
    written = naive.read(tmp_path / "out")
    drafts.check(written, naive, "deepseek_v3", tensors)
    assert written.kind("model.layers.2.self_attn.q_a_proj") == ("W8A8" if act == "per_tensor" else "W8A8_MIX")
    assert verify_folder(tmp_path / "out", tmp_path / "model").ok


def test_what_is_sparse_by_calibration_stays_float(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """W8A8S has no dynamic form. Here the further layer is what a shorter config.json leaves of a dense model."""
    model, out = tmp_path / "model", tmp_path / "out"
    folder = model_folder("llama")
    model.mkdir()
    for file in folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    result = quantize(model, out, process=[rule(STATIC | {"symmetric": True}, CHANNELS | {"method": "sparse"})])
    written, tensors = naive.read(out), load_file(model / "model.safetensors")
    mine = [name for name in tensors if name.startswith("model.layers.2.")]
    for name in mine:
        assert torch.equal(written.tensors[name], tensors[name])
        assert written.description[name] == "FLOAT"
    assert written.kind("model.layers.1.mlp.up_proj") == "W8A8S"
    assert len([name for name in written.tensors if name.startswith("model.layers.2.")]) == len(mine) == 9
    text = (
        "FLOAT instead of W8A8S, which needs the range of the input (7 linears, e.g. model.layers.2.self_attn.q_proj)"
    )
    assert f"{DRAFTS}{text}" in result.warnings


def test_methods_that_would_look_at_inputs(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """GPTQ rounds to nearest with the scales of SSZ, as it does for experts that no token reaches."""
    tensors = drafts.published(model_folder("qwen3_next"), "qwen3_next", tmp_path / "model")
    written, results = {}, {}
    weighted = {"method": "ssz", "ext": {"weighted": True}}
    for method, options in (("ssz", {"method": "ssz"}), ("gptq", {"method": "gptq"}), ("weighted", weighted)):
        process = [rule(PER_TOKEN, CHANNELS | options)]
        results[method] = quantize(tmp_path / "model", tmp_path / method, process=process)
        written[method] = naive.read(tmp_path / method)
    mine = [name for name in written["ssz"].tensors if name.startswith("mtp.")]
    assert len(mine) > 50
    linear = "model.layers.2.self_attn.q_proj.weight"
    for method, text in (("gptq", "weight rounded to nearest"), ("weighted", "weight error not weighted by inputs")):
        for name in mine:
            assert torch.equal(written[method].tensors[name], written["ssz"].tensors[name]), name
        assert not torch.equal(written[method].tensors[linear], written["ssz"].tensors[linear])
        count = len(drafts.quantized_of("qwen3_next", tensors))
        assert f"{DRAFTS}{text} ({count} linears, e.g. mtp.layers.0.self_attn.q_proj)" in results[method].warnings
        verified = verify_folder(tmp_path / method, tmp_path / "model", "vllm-ascend")
        assert verified.ok, verified.problems
    assert results["ssz"].samples == 0
    assert results["gptq"].samples > 0


def test_autoround_rounds_to_nearest(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    tensors = drafts.published(model_folder("qwen3_next"), "qwen3_next", tmp_path / "model")
    qconfig = {"act": PER_TOKEN, "weight": {"dtype": "int8", "scope": "per_channel"}}
    strategy = {"qconfig": qconfig, "include": ["*.experts.*"]}
    process = [{"type": "autoround_quant", "iters": 2, "strategies": [strategy]}]
    result = quantize(tmp_path / "model", tmp_path / "out", process=process)
    written = naive.read(tmp_path / "out")
    experts = [name for name in drafts.quantized_of("qwen3_next", tensors) if ".experts." in name]
    assert len(experts) == 12
    for name in experts:
        scale, weight = written.tensors[f"{name}.weight_scale"], tensors[f"{name}.weight"].float()
        nearest = torch.clamp(torch.round(weight / scale), -128, 127).to(torch.int8)
        assert torch.equal(written.tensors[f"{name}.weight"], nearest)
    text = "weight rounded to nearest (12 linears, e.g. mtp.layers.0.mlp.experts.0.gate_proj)"
    assert f"{DRAFTS}{text}" in result.warnings
    verified = verify_folder(tmp_path / "out", tmp_path / "model", "vllm-ascend")
    assert verified.ok, verified.problems


def test_smoothing_does_not_touch_it(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    tensors = drafts.published(model_folder("glm4_moe"), "glm4_moe", tmp_path / "model")
    process = [{"type": "iter_smooth"}, rule(PER_TOKEN, CHANNELS)]
    quantize(tmp_path / "model", tmp_path / "out", process=process)
    written = naive.read(tmp_path / "out")
    drafts.check(written, naive, "glm4_moe", tensors)
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(written.tensors[norm], tensors[norm])


LEARNED = [{"process": [{"type": "adapt_rotation", "stage": 1, "steps": 2}]}]


@pytest.mark.parametrize(
    ("rotating", "options"),
    [({"type": "quarot"}, {}), ({"type": "adapt_rotation", "stage": 2}, {"prior": LEARNED})],
    ids=["quarot", "adapt_rotation"],
)
def test_a_rotated_model(
    drafts: ModuleType,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    rotating: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Its codes are those of the rotated weights, which a run without quantization writes in float32."""
    tensors = drafts.published(model_folder("deepseek_v3", torch.float32), "deepseek_v3", tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "float", process=[rotating], **options)
    quantize(tmp_path / "model", tmp_path / "out", process=[rotating, rule(PER_TOKEN, CHANNELS)], **options)
    rotated = naive.read(tmp_path / "float").tensors
    name = "model.layers.3.mlp.experts.0.up_proj.weight"
    assert not torch.allclose(rotated[name], tensors[name])
    del rotated["rot.weight"]  # lies beside the model and is not described
    drafts.check(naive.read(tmp_path / "out"), naive, "deepseek_v3", rotated)


def test_rules_name_it_by_pattern(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    tensors = drafts.published(model_folder("deepseek_v3"), "deepseek_v3", tmp_path / "model")
    only = quantize(tmp_path / "model", tmp_path / "only", "dynamic", include=["model.layers.3.*"])
    written = naive.read(tmp_path / "only")
    assert set(written.quantized()) == set(drafts.quantized_of("deepseek_v3", tensors))
    assert [text for text in only.warnings if "matches no linear" in text] == []
    quantize(tmp_path / "model", tmp_path / "but", "dynamic", exclude=["model.layers.3.*"])
    written = naive.read(tmp_path / "but")
    assert [name for name in written.quantized() if name.startswith("model.layers.3.")] == []
    assert "model.layers.2.mlp.experts.7.up_proj" in written.quantized()
    quantize(tmp_path / "model", tmp_path / "mlp", "dynamic", include=["*mlp.experts*"])
    written = naive.read(tmp_path / "mlp")
    mine = [name for name in written.quantized() if name.startswith("model.layers.3.")]
    assert len(mine) == 8 * 3
    assert all(".mlp.experts." in name for name in mine)


@pytest.mark.parametrize("act", [PER_TOKEN, STATIC], ids=["dynamic", "static"])
def test_a_run_killed_in_it_is_resumed(
    drafts: ModuleType,
    killed: Any,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    act: dict[str, Any],
) -> None:
    drafts.published(model_folder("qwen3_next"), "qwen3_next", tmp_path / "model")
    process = [rule(act, CHANNELS)]
    whole = quantize(tmp_path / "model", tmp_path / "whole", process=process)
    with killed(LinearQuant, "mtp.layers.0"):
        quantize(tmp_path / "model", tmp_path / "out", process=process)
    result = quantize(tmp_path / "model", tmp_path / "out", process=process, resume=True)
    assert result.resumed_units == 5
    assert [unit.name for unit in result.units][-3:] == ["epilogue", "mtp.layers.0", "extra"]
    assert [replace(row, seconds=0.0) for row in result.linears] == [replace(row, seconds=0.0) for row in whole.linears]
    one, two = naive.read(tmp_path / "whole"), naive.read(tmp_path / "out")
    assert one.description == two.description
    both = [{name: naive.bits(tensor) for name, tensor in held.tensors.items()} for held in (one, two)]
    assert both[0] == both[1]


def stacked(tensors: dict[str, Tensor], *, turned: bool) -> dict[str, Tensor]:
    """Experts as transformers has them in memory, those of the drafting layer too; or transposed."""
    held: dict[str, dict[tuple[int, str], Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name):
            held.setdefault(found[1], {})[int(found[2]), found[3]] = tensor
        else:
            result[name] = tensor
    for path, each in held.items():
        count = max(expert for expert, _ in each) + 1
        up = torch.stack([torch.cat([each[e, "gate_proj"], each[e, "up_proj"]]) for e in range(count)])
        down = torch.stack([each[e, "down_proj"] for e in range(count)])
        stacks = {f"{path}.gate_up_proj": up, f"{path}.down_proj": down}
        result |= {name: (t.mT if turned else t).contiguous() for name, t in stacks.items()}
    return result


@pytest.mark.parametrize("turned", [False, True])
def test_stacked_experts(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, turned: bool
) -> None:
    """Qwen3.5 stores the experts of all layers in stacks; they are written one by one."""
    tensors = drafts.published(model_folder("qwen3_next"), "qwen3_next", tmp_path / "model")
    save_file(stacked(tensors, turned=turned), tmp_path / "model" / "model.safetensors", {"format": "pt"})
    quantize(tmp_path / "model", tmp_path / "out", "dynamic")
    drafts.check(naive.read(tmp_path / "out"), naive, "qwen3_next", tensors)
    verified = verify_folder(tmp_path / "out", tmp_path / "model", "vllm-ascend")
    assert verified.ok, verified.problems


def test_stacks_that_are_no_drafting_layer_stay_whole(
    drafts: ModuleType, model_folder: ModelFolder, tmp_path: Path
) -> None:
    tensors = drafts.published(model_folder("qwen3_next"), "qwen3_next", tmp_path / "model")
    held = stacked(tensors, turned=False)
    held["mtp.layers.0.mlp.experts.down_proj"] = torch.zeros(2, 3, 5)
    save_file(held, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = open_model(tmp_path / "model")
    assert [unit.name for unit in model.units][-2:] == ["epilogue", "extra"]
    assert {name for name in held if name.startswith("mtp.")} == set(model.units[-1].tensors)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_layer_that_is_no_block_of_the_model_is_carried_over(
    drafts: ModuleType, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, change: str
) -> None:
    tensors = drafts.published(model_folder("deepseek_v3"), "deepseek_v3", tmp_path / "model")
    if change == "missing":
        del tensors["model.layers.3.mlp.experts.7.down_proj.weight"]
    else:
        tensors["model.layers.3.self_attn.o_proj.weight"] = torch.ones(32, 48).bfloat16()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    result = quantize(tmp_path / "model", tmp_path / "out", "dynamic")
    written = naive.read(tmp_path / "out")
    mine = [name for name in tensors if name.startswith("model.layers.3.")]
    assert {name for name in written.tensors if name.startswith("model.layers.3.")} == set(mine)
    for name in mine:
        assert torch.equal(written.tensors[name], tensors[name])
        assert written.description[name] == "FLOAT"
    assert [unit.name for unit in result.units][-1] == "extra"
    assert verify_folder(tmp_path / "out", tmp_path / "model", "vllm-ascend").ok

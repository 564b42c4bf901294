"""`slim quant` with ``mindie_format_saver``: the files, and what an independent reader makes of them."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import Result

from slim_core.processors.linear_quant import LinearQuant
from slim_core.runners.simulated import simulated
from slim_core.savers import mindie_format
from slim_core.savers.mindie_folder import MindieFolder

KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE")
every_kind = pytest.mark.parametrize("kind", KINDS)
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LEAVES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = {f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in LEAVES}
IDS = torch.arange(24)[None] * 37 % 3000
Quant = Callable[..., Result]
Written = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures: drawing takes longer than all the rest of a small run."""
    monkeypatch.setattr("slim_core.evaluation.report.write.draw_plots", lambda _data: {})


def rule(qconfig: Any, **more: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": qconfig, **more}


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits.double()


def description(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("quant_model_description*.json")
    return json.loads(path.read_text())


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@every_kind
def test_the_reader_computes_what_slim_simulates(kind: str, written: Written, model: Path, reader: ModuleType) -> None:
    folder = written(kind)
    float_model = AutoModelForCausalLM.from_pretrained(model)
    exact = logits(float_model)
    opened = MindieFolder(folder)
    layers = {name: layer for name in LINEARS if (layer := opened.layer(name)) is not None}
    assert layers.keys() == LINEARS
    with simulated(float_model, layers, torch.device("cpu")):
        simulation = logits(float_model)
    replaced = reader.quantize(float_model, folder / f"quant_model_description_{kind.lower()}.json")
    assert set(replaced) == LINEARS
    error = (simulation - exact).norm()
    assert float(error) > 1e-3 * float(exact.norm())
    # A rounding that falls the other way in one layer goes on through the others.
    assert float((logits(float_model) - simulation).norm()) < 0.05 * float(error)


@every_kind
def test_files(kind: str, written: Written, model: Path) -> None:
    folder = written(kind)
    weights, text = f"quant_model_weight_{kind.lower()}.safetensors", f"quant_model_description_{kind.lower()}.json"
    assert {path.name for path in folder.iterdir()} == {
        *(weights, text, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("modeling_tiny.py", "tiny_best_practice.yaml", "report.html", "report.json"),
    }
    for name in (weights, text):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o640
    assert all(not stat.S_IMODE(path.stat().st_mode) & ~0o640 for path in folder.iterdir())
    assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (folder / text).read_text().startswith('{\n    "model_quant_type"')
    described, stored = description(folder), tensors(folder)
    assert described.pop("model_quant_type") == kind
    assert described.keys() == stored.keys()
    original = load_file(model / "model.safetensors")
    for name, tensor in stored.items():
        prefix, _, suffix = name.rpartition(".")
        if prefix in LINEARS:
            assert described[name] == ("FLOAT" if suffix == "bias" else kind)
            assert suffix != "bias" or tensor.dtype == torch.float32
        else:
            assert described[name] == "FLOAT"
            assert tensor.dtype == original[name].dtype
            assert torch.equal(tensor, original[name])
    assert {name for name in original if name.rpartition(".")[0] not in LINEARS} <= stored.keys()


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (
            "W8A8",
            {"weight": ("int8", [128, 64]), "quant_bias": ("int32", [128]), "deq_scale": ("float32", [128])}
            | {"input_scale": ("float32", [1]), "input_offset": ("float32", [1])},
        ),
        (
            "W8A8_DYNAMIC",
            {"weight": ("int8", [128, 64]), "weight_scale": ("float32", [128, 1])}
            | {"weight_offset": ("float32", [128, 1])},
        ),
        ("W8A8_MXFP8", {"weight": ("float8_e4m3fn", [128, 64]), "weight_scale": ("uint8", [128, 2])}),
        ("W4A4_MXFP4", {"weight": ("float8_e4m3fn", [128, 64]), "weight_scale": ("uint8", [128, 2])}),
        (
            "W4A4_MXFP4_DUALSCALE",
            {"weight": ("float8_e4m3fn", [128, 64]), "weight_scale": ("uint8", [128, 2])}
            | {"weight_dual_scale": ("float32", [128, 1, 1])},
        ),
    ],
)
def test_tensors_of_a_layer(kind: str, parts: dict[str, tuple[str, list[int]]], written: Written) -> None:
    prefix = "model.layers.1.mlp.up_proj."
    found = {
        name.removeprefix(prefix): (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors(written(kind)).items()
        if name.startswith(prefix)
    }
    assert found == parts | {"bias": ("float32", [128])}


def test_static_scales_are_numbers_of_the_dtype_that_mindie_computes_in(written: Written) -> None:
    stored = tensors(written("W8A8"))
    scales = [tensor for name, tensor in stored.items() if name.endswith("input_scale")]
    assert len(scales) == len(LINEARS)
    assert all(torch.equal(scale, scale.bfloat16().float()) for scale in scales)


@pytest.mark.parametrize("kind", ["W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"])
def test_packed_weights_are_the_same_numbers(
    kind: str, written: Written, model: Path, reader: ModuleType, slim: Callable[..., Result]
) -> None:
    values, packed = tensors(written(kind)), tensors(written(kind, mxfp4_weight="packed"))
    for name in LINEARS:
        one, other = values[f"{name}.weight"], packed[f"{name}.weight"]
        assert other.dtype == torch.uint8
        assert other.shape[1] * 2 == one.shape[1]
        # Also the sign of a zero.
        assert torch.equal(one.float(), reader.elements(other).float())
        assert torch.equal(one.float().signbit(), reader.elements(other).signbit())
    out = written(kind, mxfp4_weight="packed")
    assert slim("verify", out, "--model", model, "--engine", "mindie-sd").exit_code == 0
    float_model = AutoModelForCausalLM.from_pretrained(model)
    assert len(reader.quantize(float_model, out / f"quant_model_description_{kind.lower()}.json")) == len(LINEARS)
    one, other = MindieFolder(written(kind)), MindieFolder(out)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.up_proj"
    first, second = one.layer(name), other.layer(name)
    assert first is not None
    assert second is not None
    assert torch.equal(first.simulate(x), second.simulate(x))


@every_kind
def test_verify_inspect_and_eval(
    kind: str, written: Written, model: Path, slim: Callable[..., Result], tmp_path: Path
) -> None:
    folder = written(kind)
    found = slim("verify", folder, "--model", model, "--engine", "mindie-sd")
    assert found.exit_code == 0, found.output
    assert "compared with the original" in found.stdout
    assert slim("verify", folder, "--engine", "vllm-ascend").exit_code == 3
    assert f"format mindie, type {kind}" in slim("inspect", folder).stdout
    text = tmp_path / "text.txt"
    text.write_text("A generator is a function that returns an iterator. " * 4)
    scored = slim("eval", model, "--quantized", folder, "--text", text, "--device", "cpu", "--sequence_length", 32)
    assert scored.exit_code == 0, scored.output


def test_the_most_frequent_type_names_the_files(quant: Quant, schemes: Any, tmp_path: Path) -> None:
    down, other = {"include": ["*down_proj"]}, {"exclude": ["*down_proj"]}
    found = quant(tmp_path / "mixed", [rule(schemes["W8A8_DYNAMIC"], **other), rule(schemes["W8A8_MXFP8"], **down)])
    assert found.exit_code == 0, found.output
    assert "model_quant_type is W8A8_DYNAMIC (layers: 12 W8A8_DYNAMIC, 2 W8A8_MXFP8)" in found.stderr
    assert (tmp_path / "mixed" / "quant_model_weight_w8a8_dynamic.safetensors").exists()
    # Two of each: the first in the alphabet.
    only = {"include": ["*up_proj"]}
    found = quant(tmp_path / "even", [rule(schemes["W8A8_DYNAMIC"], **only), rule(schemes["W4A4_MXFP4"], **down)])
    assert found.exit_code == 0, found.output
    assert description(tmp_path / "even")["model_quant_type"] == "W4A4_MXFP4"
    # Linears that are fused elsewhere may differ here.
    assert "fuse" not in found.output


def test_in_parts(
    quant: Quant,
    schemes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slim: Callable[..., Result],
    written: Written,
    model: Path,
    reader: ModuleType,
) -> None:
    monkeypatch.setattr(mindie_format, "_GIB", 200_000)
    out = tmp_path / "out"
    found = quant(out, [rule(schemes["W8A8_DYNAMIC"])], saver={"part_file_size": 1})
    assert found.exit_code == 0, found.output
    assert "MindIE-SD does NOT load weights in parts (part_file_size: 1)" in found.output
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"quant_model_weight-00001-of-{len(names):05d}.safetensors"
    assert all(stat.S_IMODE((out / name).stat().st_mode) == 0o640 for name in names)
    index = json.loads((out / "quant_model_weight.safetensors.index.json").read_text())
    stored = tensors(out)
    assert index["weight_map"].keys() == stored.keys()
    whole = tensors(written("W8A8_DYNAMIC"))
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], whole[name]) for name in whole)
    checked = slim("verify", out, "--model", model)
    assert checked.exit_code == 0
    assert "mindie-sd does not load weights in parts" in checked.stdout
    assert slim("verify", out, "--engine", "mindie-sd").exit_code == 3
    with pytest.raises(FileNotFoundError):
        reader.quantize(AutoModelForCausalLM.from_pretrained(model), out / "quant_model_description_w8a8_dynamic.json")


def test_nothing_quantized(quant: Quant, schemes: Any, tmp_path: Path, slim: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    found = quant(out, [rule(schemes["W8A8_DYNAMIC"], exclude=["*"])])
    assert found.exit_code == 0, found.output
    assert "MindIE-SD does not find them" in found.output
    assert {path.name for path in out.glob("quant_model_*")} == {
        "quant_model_description.json",
        "quant_model_weight.safetensors",
    }
    assert description(out)["model_quant_type"] == "FLOAT"
    assert slim("verify", out).exit_code == 0
    assert slim("verify", out, "--engine", "mindie-sd").exit_code == 3


def test_resumed_and_overwritten(
    quant: Quant, schemes: Any, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, process = tmp_path / "w8a8", LinearQuant.process

    def dying(self: Any, work: Any) -> None:
        process(self, work)
        if work.name == "model.layers.1":
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(LinearQuant, "process", dying)
        assert quant(out, [rule(schemes["W8A8"])]).exit_code != 0
    assert not out.exists()
    found = quant(out, [rule(schemes["W8A8"])], "--resume")
    assert found.exit_code == 0, found.output
    assert "resumed" in found.output
    name, text = "quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json"
    for file in (name, text):
        assert (out / file).read_bytes() == (written("W8A8") / file).read_bytes()
        assert stat.S_IMODE((out / file).stat().st_mode) == 0o640
    # Another type into the same place: the old files go.
    assert quant(out, [rule(schemes["W8A8_DYNAMIC"])]).exit_code == 1
    assert (out / name).exists()
    assert quant(out, [rule(schemes["W8A8_DYNAMIC"])], "--overwrite").exit_code == 0
    assert {path.name for path in out.glob("quant_model_*")} == {
        "quant_model_description_w8a8_dynamic.json",
        "quant_model_weight_w8a8_dynamic.safetensors",
    }


INT8, GROUPED = {"dtype": "int8", "scope": "per_channel"}, {"scope": "per_group", "ext": {"group_size": 32}}
TOKEN = {"dtype": "int8", "scope": "per_token"}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "W8A16": ([rule({"weight": INT8})], "has no place for W8A16 layers"),
    "W8A8_MIX": ([rule({"act": {"scope": "pd_mix", "symmetric": False}, "weight": INT8})], "for W8A8_MIX layers"),
    "W4A8": ([rule({"act": TOKEN, "weight": {"dtype": "int4"}})], "for W4A8_DYNAMIC layers"),
    "W4A4": (
        [rule({"act": TOKEN | {"dtype": "int4"}, "weight": {"dtype": "int4"}})],
        "for W4A4_DYNAMIC layers",
    ),
    "groups": ([rule({"act": TOKEN, "weight": GROUPED})], "for W8A8_DYNAMIC in groups of 32 layers"),
    "sparse": ([{"type": "float_sparse"}], "for W16A16S layers"),
    "cache": (
        [rule({"act": TOKEN, "weight": INT8}), {"type": "dynamic_cache"}],
        "no place for a quantized cache (C8)",
    ),
    "rotation": (
        [{"type": "quarot"}, rule({"act": TOKEN, "weight": INT8})],
        "has no place for what quarot leaves beside the weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_has_no_place_for(case: str, quant: Quant, tmp_path: Path) -> None:
    process, message = REFUSED[case]
    for options in ((), ("--force",), ("--dry_run",)):
        found = quant(tmp_path / "out", process, *options)
        assert found.exit_code == 1
        assert found.stderr.startswith("error 301 UnsupportedError: ")
        assert message in found.stderr
        assert "ascendv1_saver" in found.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"out.yaml"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mlp_bias": False}, "loads W8A8_MXFP8 linear layers only with a bias"),
        ({"intermediate_size": 160}, "loads W8A8_MXFP8 linear layers only if 64 divides their input features"),
    ],
)
def test_what_the_engine_asks_for(
    changes: dict[str, Any],
    reason: str,
    build: Callable[..., Path],
    quant: Quant,
    schemes: Any,
    tmp_path: Path,
    slim: Callable[..., Result],
) -> None:
    source, out = build(torch.bfloat16, **changes), tmp_path / "out"
    found = quant(out, [rule(schemes["W8A8_MXFP8"])], source=source)
    assert found.exit_code == 1
    assert f"mindie-sd: {reason}" in found.stderr
    forced = quant(out, [rule(schemes["W8A8_MXFP8"])], "--force", source=source)
    assert forced.exit_code == 0, forced.output
    assert f"mindie-sd {reason}" in forced.output
    assert slim("verify", out, "--model", source).exit_code == 0
    checked = slim("verify", out, "--engine", "mindie-sd")
    assert checked.exit_code == 3
    assert f"mindie-sd {reason}" in checked.stdout
    assert quant(tmp_path / "int8", [rule(schemes["W8A8_DYNAMIC"])], source=source).exit_code == 0


def test_float_tensors_stay_those_of_the_original(
    quant: Quant, schemes: Any, model: Path, tmp_path: Path, slim: Callable[..., Result]
) -> None:
    """MindIE-SD takes them from there. Smoothing leaves them alone then; a rotation cannot."""
    out = tmp_path / "smoothed"
    found = quant(out, [{"type": "iter_smooth"}, rule(schemes["W8A8_DYNAMIC"])])
    assert found.exit_code == 0, found.output
    assert "is lost, and the results are wrong" not in found.output
    checked = slim("verify", out, "--model", model)
    assert checked.exit_code == 0, checked.output
    # From v into o, and from up into down.
    moved = "is not that of the original, like 8 linears whose input is not scaled: right if iter_smooth moved scales"
    assert f"model.layers.0.self_attn.v_proj: {moved}" in checked.stdout
    out = tmp_path / "rotated"
    found = quant(out, [{"type": "quarot", "export_extra_info": False}, rule(schemes["W8A8_DYNAMIC"])])
    assert found.exit_code == 0, found.output
    lost = "process[0]: mindie-sd takes all tensors that are not quantized from the original model, so what quarot"
    assert lost in found.output
    checked = slim("verify", out, "--model", model)
    assert checked.exit_code == 3
    assert "model.embed_tokens.weight: differs from the original" in checked.stdout


def test_attentions(quant: Quant, schemes: Any, model: Path, tmp_path: Path, slim: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    found = quant(out, [rule(schemes["W8A8_DYNAMIC"]), {"type": "fa3_quant"}])
    assert found.exit_code == 0, found.output
    described, stored = description(out), tensors(out)
    assert described["fa_quant_type"] == "FAKQuant"
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        assert described[f"{prefix}.quant_type"] == "INT8"
        for state in ("fa_q", "fa_k", "fa_v"):
            assert described[f"{prefix}.{state}.scale"] == "FAQuant"
            scale, offset = stored[f"{prefix}.{state}.scale"], stored[f"{prefix}.{state}.offset"]
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (4, 1))
            assert (offset.dtype, tuple(offset.shape)) == (torch.int8, (4, 1))
    checked = slim("verify", out, "--model", model, "--engine", "mindie-sd")
    assert checked.exit_code == 0, checked.output
    assert "FAKQuant" in checked.stdout
    # MindIE-SD wants rotations of query and key with FP8.
    dynamic = {"type": "fa3_quant", "qconfig": {"dtype": "fp8_e4m3", "scope": "per_token"}}
    found = quant(tmp_path / "fp8", [rule(schemes["W8A8_DYNAMIC"]), dynamic])
    assert found.exit_code == 1
    assert "(mindie-sd: " in found.stderr
    assert "FP8_DYNAMIC" in found.stderr


def test_an_output_is_no_source(quant: Quant, schemes: Any, written: Written, tmp_path: Path) -> None:
    found = quant(tmp_path / "out", [rule(schemes["W8A8"])], source=written("W8A8_DYNAMIC"))
    assert found.exit_code == 1
    assert "this folder holds a quantized checkpoint" in found.stderr


def test_the_reader_refuses_what_verify_refuses(
    written: Written, model: Path, tmp_path: Path, reader: ModuleType, slim: Callable[..., Result]
) -> None:
    source = written("W8A8_DYNAMIC")
    text, weights = "quant_model_description_w8a8_dynamic.json", "quant_model_weight_w8a8_dynamic.safetensors"

    def refused(folder: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error):
            reader.quantize(AutoModelForCausalLM.from_pretrained(model), folder / text)
        found = slim("verify", folder, "--engine", "mindie-sd")
        assert found.exit_code == 3
        assert message in found.stdout

    for name in (text, weights):
        folder = shutil.copytree(source, tmp_path / f"open-{name}")
        (folder / name).chmod(0o644)
        refused(folder, PermissionError, f"{name}: has mode 0644, expected at most 0640")
        folder = shutil.copytree(source, tmp_path / f"link-{name}")
        (folder / name).rename(folder.parent / f"{folder.name}-moved")
        (folder / name).symlink_to(folder.parent / f"{folder.name}-moved")
        refused(folder, PermissionError, f"{name}: is a symbolic link, which MindIE-SD refuses")
    folder = shutil.copytree(source, tmp_path / "type")
    (folder / text).write_text(json.dumps({**description(folder), "model_quant_type": "w8a8_dynamic"}))
    refused(folder, ValueError, "model_quant_type is 'w8a8_dynamic', which MindIE-SD does not know")
    folder = shutil.copytree(source, tmp_path / "other")
    (folder / text).write_text(json.dumps({**description(folder), "model_quant_type": "W8A8"}))
    refused(folder, FileNotFoundError, "quant_model_weight_w8a8.safetensors: the file is missing")

"""What is written for diffusion models, checked by ``slim verify`` and told by ``slim inspect``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slim_core.dispatch import original_opener, original_parts
from slim_core.errors import InvalidModelError
from slim_core.evaluation.inspect import inspect_folder
from slim_core.evaluation.verify import Verification, verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import QuantRequest
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]
WEIGHT: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
DYNAMIC: dict[str, Any] = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
LINEAR: dict[str, Any] = {"type": "linear_quant", "qconfig": {"act": DYNAMIC, "weight": WEIGHT}, "exclude": ["*ffn.2"]}
WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"
EXPERTS = ("high_noise_model", "low_noise_model")
SETTINGS = {"prompt": "a red fox", "size": "64*64", "frame_num": 5, "sample_steps": 2}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr("slim_core.evaluation.report.write.draw_plots", lambda data: {})


def quantize(model: Path, out: Path, *process: dict[str, Any], names: str = "original") -> Path:
    spec = {
        "process": [*process, LINEAR],
        "multimodal_sd_config": {"tensor_names": names, "model_config": SETTINGS},
    }
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})
    request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu")
    DiffusionService().quantize(request, recipe, SilentProgress())
    return out


def verify(out: Path, model: Path | None = None) -> Verification:
    return verify_folder(out, model, "mindie-sd", original_opener(out), original_parts(out))


@pytest.fixture(scope="module")
def experts(pipeline_folder: PipelineFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model of two transformers, only to be read."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("slim_core.evaluation.report.write.draw_plots", lambda data: {})
        return quantize(pipeline_folder("wan2_2_t2v"), tmp_path_factory.mktemp("experts") / "out")


@pytest.fixture
def broken(experts: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(experts, tmp_path / "out")


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_layouts_and_both_sets_of_names(
    pipeline_folder: PipelineFolder, tmp_path: Path, layout: str, names: str
) -> None:
    """A file that came from one layout may be held against the other."""
    out = quantize(pipeline_folder("wan2_1_t2v", layout=layout), tmp_path / "out", names=names)
    for other in ("original", "diffusers"):
        found = verify(out, pipeline_folder("wan2_1_t2v", layout=other))
        assert (found.problems, found.warnings, found.compared) == ([], [], True)
    assert any("blocks.0.ffn.2" in linear for linear in inspect_folder(out).float_linears) == (names == "original")
    another = verify(out, pipeline_folder("wan2_1_t2v", seed=5))
    assert any("differs from the original" in problem for problem in another.problems)
    assert any("blocks.0" in problem and "is off by" in problem for problem in another.problems)


def test_a_model_of_another_class(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    out = quantize(pipeline_folder("flux"), tmp_path / "out")
    assert verify(out, pipeline_folder("flux")).ok
    problems = verify(out, pipeline_folder("sd3")).problems
    assert any("is in the original but missing here" in problem for problem in problems)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_several_transformers(pipeline_folder: PipelineFolder, experts: Path, layout: str) -> None:
    model = pipeline_folder("wan2_2_t2v", layout=layout)
    found = verify(experts, model)
    assert (found.problems, found.warnings, found.compared) == ([], [], True)
    one = verify(experts / EXPERTS[1], model)
    assert (one.problems, one.compared) == ([], True)
    assert found.checked == 2 * one.checked
    assert [entry.count for entry in found.loadable] == [2 * entry.count for entry in one.loadable]
    assert all(entry.example.startswith("high_noise_model/") for entry in found.loadable)


def test_inspecting_several_transformers(experts: Path) -> None:
    whole, parts = inspect_folder(experts), [inspect_folder(experts / name) for name in EXPERTS]
    assert (whole.format, whole.model_quant_type) == ("mindie", "W8A8_DYNAMIC")
    assert whole.tensors == sum(part.tensors for part in parts)
    assert whole.nbytes == sum(part.nbytes for part in parts)
    assert set(whole.shards) == {f"{name}/{WEIGHTS}" for name in EXPERTS}
    assert whole.files[f"low_noise_model/{WEIGHTS}"] == (experts / "low_noise_model" / WEIGHTS).stat().st_size
    key = ("ffn.0".rpartition(".")[2], "W8A8_DYNAMIC")
    assert whole.leaves[key].modules == 2 * parts[0].leaves[key].modules
    assert whole.global_keys == {f"{name}/model_quant_type": "W8A8_DYNAMIC" for name in EXPERTS}
    assert "low_noise_model/blocks.0.ffn.2" in whole.float_linears
    assert "high_noise_model/blocks.0.ffn.2" in whole.text()


def test_a_flipped_bit(pipeline_folder: PipelineFolder, broken: Path) -> None:
    """Of a code, and of a float tensor."""
    name = "blocks.1.ffn.0.weight"
    path = broken / "low_noise_model" / WEIGHTS
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    content, at = bytearray(path.read_bytes()), {}
    with safe_open(path, "pt") as file:
        at = {key: file.get_tensor(key) for key in (name, "head.modulation")}
    for tensor in at.values():
        start = bytes(content).index(tensor.numpy().tobytes(), header)
        content[start] ^= 0x40
    path.write_bytes(content)
    problems = verify(broken, pipeline_folder("wan2_2_t2v")).problems
    assert [problem.split(":")[0] for problem in problems] == [
        f"low_noise_model/{place}" for place in sorted(at, key=list(load_file(path)).index)
    ]
    assert "times what rounding to its scale allows" in "".join(problems)
    assert "differs from the original, expected the same bits" in "".join(problems)
    assert verify(broken / "high_noise_model", pipeline_folder("wan2_2_t2v")).ok


def test_a_lost_tensor(pipeline_folder: PipelineFolder, broken: Path) -> None:
    path = broken / "high_noise_model" / WEIGHTS
    tensors = load_file(path)
    del tensors["blocks.0.norm3.bias"], tensors["blocks.0.self_attn.q.weight_scale"]
    save_file(tensors, path)
    problems = verify(broken, pipeline_folder("wan2_2_t2v")).problems
    for name in ("blocks.0.norm3.bias", "blocks.0.self_attn.q.weight_scale"):
        assert any(text.startswith(f"high_noise_model/{name}: is described as") for text in problems)
    assert "high_noise_model/blocks.0.norm3.bias: is in the original but missing here" in problems


def test_experts_that_changed_places(pipeline_folder: PipelineFolder, broken: Path) -> None:
    first, second = (broken / name for name in EXPERTS)
    first.rename(broken / "aside")
    second.rename(first)
    (broken / "aside").rename(second)
    assert verify(broken).ok  # by themselves both are sound
    found = verify(broken, pipeline_folder("wan2_2_t2v"))
    for name in EXPERTS:
        assert any(text.startswith(f"{name}/") and "differs from the original" in text for text in found.problems)
    assert any("float tensors differ; is it the model this was made from?" in text for text in found.warnings)


def test_an_expert_that_is_not_there(pipeline_folder: PipelineFolder, broken: Path, tmp_path: Path) -> None:
    model = pipeline_folder("wan2_2_t2v")
    (broken / "low_noise_model").rename(tmp_path / "other")
    assert verify(broken, model).problems == [
        "low_noise_model: the folder is missing, though the original has this transformer"
    ]
    (tmp_path / "other").rename(broken / "other")
    assert verify(broken, model).problems == [
        "low_noise_model: the folder is missing, though the original has this transformer",
        "other: the original has no such transformer",
    ]
    with pytest.raises(InvalidModelError, match=r"'other' is the name of none of them.*call the quantized folder high"):
        verify(broken / "other", model)
    with pytest.raises(InvalidModelError, match=r"this is one model, but .* holds high_noise_model, other"):
        verify(broken, pipeline_folder("wan2_1_t2v"))


def test_a_file_that_others_may_read(broken: Path) -> None:
    note = broken / "notes.txt"
    note.write_text("mine")
    note.chmod(0o644)
    (broken / "low_noise_model" / WEIGHTS).chmod(0o666)
    assert verify(broken).problems == [
        "notes.txt: has mode 0644, expected at most 0640",
        f"low_noise_model/{WEIGHTS}: has mode 0666, expected at most 0640",
    ]


@pytest.mark.parametrize("process", [{"type": "iter_smooth"}, {"type": "flex_smooth_quant"}])
def test_smoothed_weights_are_compared(
    pipeline_folder: PipelineFolder, tmp_path: Path, process: dict[str, Any]
) -> None:
    """With the original's, divided by the scales of their inputs."""
    model = pipeline_folder("wan2_1_t2v")
    out = quantize(model, tmp_path / "out", process)
    found = verify(out, model)
    assert (found.problems, found.warnings, found.compared) == ([], [], True)
    tensors = load_file(out / WEIGHTS)
    name = "blocks.0.self_attn.q"
    assert f"{name}.div.mul_scale" in tensors
    row = int((tensors[f"{name}.linear.weight"][:, 3].abs() < 50).nonzero()[0])
    tensors[f"{name}.linear.weight"][row, 3] += 60
    tensors["blocks.1.self_attn.k.div.mul_scale"][2] *= 3
    save_file(tensors, out / WEIGHTS)
    problems = verify(out, model).problems
    assert [text.split(":")[0] for text in problems] == [f"{name}.linear.weight", "blocks.1.self_attn.k.linear.weight"]
    assert f"row {row} is off by" in problems[0]

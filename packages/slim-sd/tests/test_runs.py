"""Whole runs over tiny pipelines: capture, streaming, files, in both layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slim_core.errors import InvalidDatasetError, SecurityError
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.plan import Plan
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_sd import calibration
from slim_sd.captured.recorder import forward_parameters
from slim_sd.captured.records import open_records
from slim_sd.loading import open_transformer
from slim_sd.pipeline.folders import transformer_folders
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]
WEIGHT: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
DYNAMIC: dict[str, Any] = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
WANS = ("wan2_1_t2v", "wan2_1_i2v", "wan2_2_t2v", "wan2_2_i2v", "wan2_2_ti2v")
OTHERS = ("flux", "sd3", "hunyuan_video", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tiny_pipelines: ModuleType, no_plots: None) -> None:
    tiny_pipelines.shrink_edited_pictures(monkeypatch)


@pytest.fixture
def picture(tmp_path: Path, tiny_pipelines: ModuleType) -> Path:
    path = tmp_path / "picture.png"
    tiny_pipelines.parts.picture(64, 64).save(path)
    return path


def settings_for(name: str, picture: Path) -> dict[str, Any]:
    """What a tiny pipeline generates."""
    made: dict[str, Any] = {"prompt": "a red fox"}
    if name in WANS:
        made |= {"size": "64*64", "frame_num": 5, "sample_steps": 3}
        return made | ({"image": str(picture)} if name.endswith("_i2v") else {})
    made |= {"height": 32, "width": 32, "num_inference_steps": 2}
    if name == "hunyuan_video":
        made |= {"num_frames": 5}
    return made | ({"image": str(picture)} if "edit" in name else {})


def run(
    model: Path, out: Path, settings: dict[str, Any], act: dict[str, Any] | None = None, **options: Any
) -> tuple[RunResult, list[Plan]]:
    names = ("overwrite", "resume", "dry_run", "reuse_calib", "device")
    request = QuantRequest(
        model_path=model,
        save_path=out,
        model_type="tiny",
        **{"device": "cpu", **{name: options.pop(name) for name in names if name in options}},
    )
    plans: list[Plan] = []
    service = DiffusionService()
    result = service.quantize(request, recipe(settings, act, **options), SilentProgress(), plans.append)
    return result, [plans[0], *plans[0].others]


def recipe(settings: dict[str, Any], act: dict[str, Any] | None = None, **options: Any) -> Any:
    dump = {name: options.pop(name) for name in ("dump_data_dir", "enable_dump", "time_steps") if name in options}
    names = {name: options.pop(name) for name in ("tensor_names",) if name in options}
    linear = {"type": "linear_quant", "qconfig": {"act": act or STATIC, "weight": WEIGHT}, "include": ["*"]}
    linear |= {"exclude": options.pop("exclude", [])}
    spec = {
        "process": options.pop("process", [linear]),
        "multimodal_sd_config": {"dump_config": dump, "model_config": settings, **names},
        **options,
    }
    return recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})


def description(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("quant_model_description*.json")
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("quant_model_weight*.safetensors")
    return load_file(path)


def outputs(out: Path, component: str, count: int) -> Path:
    return out if count == 1 else out / calibration.expert_name(component)


@pytest.mark.parametrize("name", [*WANS, *OTHERS])
def test_calibrated_on_what_the_pipeline_calls(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path, name: str
) -> None:
    """The forward is the plain one's, bit for bit; the files hold what an independent reader expects."""
    folder, out = pipeline_folder(name), tmp_path / "out"
    result, plans = run(folder, out, settings_for(name, picture))
    components = transformer_folders(folder)
    assert len(plans) == len(components)
    for component, plan in zip(components, plans, strict=True):
        written = outputs(out, component, len(components))
        model = open_transformer(folder, component)
        expert = calibration.expert_name(component) if len(components) > 1 else None
        path = out / (f"calib_data_{expert}.pth" if expert else "calib_data.pth")
        records = open_records(
            path, parameters=forward_parameters(model.module), fingerprint=None, settings=None, config=model.config
        )
        assert_plain_forward(model, records)
        assert_written(written, model, plan)
    assert result.samples >= len(components)


def assert_plain_forward(model: Any, records: Any) -> None:
    calls = [{key: value for key, value in call.items() if value is not None} for call in records]
    names = [name for unit in model.units for name in unit.parameters]
    model.load(names, CPU)
    with torch.no_grad():
        wanted = [model.module(**call)[0] for call in calls]
    model.unload(names)
    with torch.no_grad(), BlockForwards(model, calls, CPU) as forwards:
        found = [output[0] for output in forwards.run_model()]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def assert_written(folder: Path, model: Any, plan: Plan) -> None:
    """Every tensor of the model is there once: as it was, or quantized and near to what it was."""
    types, tensors = description(folder), weights(folder)
    quantized = {info.prefix for unit in model.units for info in unit.linears if info.name in plan.assignments}
    assert quantized
    assert types.pop("model_quant_type") == "W8A8"
    assert set(types) == set(tensors)
    for name in model.source:
        original = model.source.load(name)
        prefix = name.rpartition(".")[0]
        if prefix not in quantized:
            assert types[name] == "FLOAT"
            assert torch.equal(tensors[name], original)
        elif name.endswith(".weight"):
            scale = tensors[f"{prefix}.deq_scale"] / tensors[f"{prefix}.input_scale"]
            assert tensors[name].dtype == torch.int8
            assert scale.dtype == torch.float32
            error = (tensors[name].float() * scale[:, None] - original.float()).abs().max()
            assert float(error) <= float(scale.max()) * 0.51


@pytest.mark.parametrize("name", WANS)
@pytest.mark.parametrize("act", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_both_layouts_give_the_same_files(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path, name: str, act: dict[str, Any]
) -> None:
    """Patterns are written for the original names, and the output has them."""
    made: dict[str, dict[str, bytes]] = {}
    for layout in ("diffusers", "original"):
        out = tmp_path / layout
        model = pipeline_folder(name, layout=layout)
        # The scheduler of an original folder is Slim's choice, of a Diffusers folder its own: say which.
        settings = settings_for(name, picture) | {"sample_shift": 3.0}
        _, plans = run(model, out, settings, act, exclude=["*ffn.2*"])
        made[layout] = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("quant_model_*"))}
        for plan in plans:
            per_block = 11 if name == "wan2_1_i2v" else 9  # without ffn.2; k_img and v_img
            assert len(plan.assignments) == per_block * sum(unit.block is not None for unit in plan.model.units)
            assert not any("matches no" in text for text in plan.warnings)
    assert made["diffusers"].keys() == made["original"].keys()
    assert made["diffusers"] == made["original"]
    first = next(text for path, text in made["original"].items() if path.endswith(".json"))
    assert b"blocks.0.self_attn.q.weight" in first


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_names_of_diffusers_if_asked(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path, layout: str
) -> None:
    """Patterns for the original names still hold."""
    model = pipeline_folder("wan2_1_t2v", layout=layout)
    settings = settings_for("wan2_1_t2v", picture)
    for names in ("diffusers", "original"):
        run(model, tmp_path / names, settings, DYNAMIC, exclude=["*ffn.2*"], tensor_names=names)
    theirs, ours = (description(tmp_path / names) for names in ("diffusers", "original"))
    assert theirs["blocks.0.attn1.to_q.weight"] == "W8A8_DYNAMIC"
    assert theirs["blocks.0.ffn.net.2.weight"] == "FLOAT"
    assert sorted(theirs.values()) == sorted(ours.values())


def test_data_free_recipes_generate_nothing(
    pipeline_folder: PipelineFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the pipeline was built")

    monkeypatch.setattr("slim_sd.pipeline.sampling.build_pipeline", fail)
    _, (plan,) = run(pipeline_folder("wan2_1_t2v"), tmp_path / "out", {}, DYNAMIC)  # not even a prompt
    assert not plan.needs_data
    assert not list(tmp_path.glob("**/calib_data*"))


def test_a_capture_is_made_once(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept with the output, found there by the next run, and made anew if it is gone."""
    generated: list[int] = []
    generate = calibration.Sampler.generate
    monkeypatch.setattr(
        calibration.Sampler, "generate", lambda self, *given: generated.append(1) or generate(self, *given)
    )
    model, out, settings = pipeline_folder("wan2_1_t2v"), tmp_path / "out", settings_for("wan2_1_t2v", picture)
    run(model, out, settings)
    first = weights(out)
    assert (out / "calib_data.pth").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "picture.png"]
    run(model, out, settings, overwrite=True)
    assert len(generated) == 1
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(out).items())
    (out / "calib_data.pth").unlink()
    run(model, out, settings, overwrite=True)
    assert len(generated) == 2


def test_a_folder_of_its_own_for_captures(pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path) -> None:
    model, settings = pipeline_folder("wan2_1_t2v"), settings_for("wan2_1_t2v", picture)
    run(model, tmp_path / "one", settings, dump_data_dir=str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "calib_data.pth").exists()
    assert not (tmp_path / "one" / "calib_data.pth").exists()
    run(model, tmp_path / "two", settings, dump_data_dir=str(tmp_path / "kept"), enable_dump=False)


def test_a_capture_may_lie_in_an_empty_save_path(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path
) -> None:
    model, settings = pipeline_folder("wan2_1_t2v"), settings_for("wan2_1_t2v", picture)
    run(model, tmp_path / "one", settings)
    out = tmp_path / "two"
    out.mkdir()
    (out / "calib_data.pth").write_bytes((tmp_path / "one" / "calib_data.pth").read_bytes())  # no sidecar
    run(model, out, {}, enable_dump=False)
    assert (out / "calib_data.pth").read_bytes() == (tmp_path / "one" / "calib_data.pth").read_bytes()
    with pytest.raises(SecurityError, match="not empty"):
        run(model, out, settings)


def test_a_capture_of_something_else_is_refused(pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path) -> None:
    model, settings = pipeline_folder("wan2_1_t2v"), settings_for("wan2_1_t2v", picture)
    kept = str(tmp_path / "kept")
    run(model, tmp_path / "one", settings, dump_data_dir=kept)
    other = settings | {"prompt": "a blue fox"}
    with pytest.raises(InvalidDatasetError, match="prompt was 'a red fox' and is 'a blue fox'"):
        run(model, tmp_path / "two", other, dump_data_dir=kept)
    assert not (tmp_path / "two").exists()
    run(model, tmp_path / "two", other, dump_data_dir=kept, reuse_calib=True)
    another = pipeline_folder("wan2_1_t2v", seed=3)
    with pytest.raises(InvalidDatasetError, match="the model is another one"):
        run(another, tmp_path / "three", settings, dump_data_dir=kept)


def test_missing_and_not_to_be_captured(pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path) -> None:
    with pytest.raises(InvalidDatasetError, match=r"there is no calib_data\.pth, and enable_dump is false"):
        run(pipeline_folder("wan2_1_t2v"), tmp_path / "out", settings_for("wan2_1_t2v", picture), enable_dump=False)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_only_some_time_steps(pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path) -> None:
    model, settings = pipeline_folder("wan2_1_t2v"), settings_for("wan2_1_t2v", picture)
    every, _ = run(model, tmp_path / "all", settings, dump_data_dir=str(tmp_path / "kept"))
    some, (plan,) = run(model, tmp_path / "some", settings, dump_data_dir=str(tmp_path / "kept"), time_steps=2)
    assert (every.samples, some.samples) == (6, 4)  # with and without the prompt
    assert plan.activation_bytes


def test_a_plan_captures_nothing(pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path) -> None:
    model, settings = pipeline_folder("wan2_2_t2v"), settings_for("wan2_2_t2v", picture)
    request = QuantRequest(model_path=model, save_path=tmp_path / "out", model_type="tiny", device="cpu")
    plan = DiffusionService().plan(request, recipe(settings))
    assert plan.needs_data
    assert [plan.part, *(other.part for other in plan.others)] == ["high_noise_model", "low_noise_model"]
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_experts_have_folders_of_their_own_and_are_resumed(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = pipeline_folder("wan2_2_t2v"), settings_for("wan2_2_t2v", picture)
    run(model, tmp_path / "whole", settings)
    out, opened = tmp_path / "out", []

    def stop_at_the_second(folder: Path, component: str, *given: Any) -> Any:
        opened.append(component)
        if opened.count("transformer_2") > 1:  # once for the plan
            raise KeyboardInterrupt
        return open_transformer(folder, component, *given)

    with monkeypatch.context() as patched:
        patched.setattr("slim_sd.quantize.open_transformer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, settings)
    assert not out.exists()
    run(model, out, settings, resume=True)
    for expert in ("high_noise_model", "low_noise_model"):
        assert description(out / expert) == description(tmp_path / "whole" / expert)
        assert all(
            torch.equal(tensor, weights(out / expert)[n]) for n, tensor in weights(tmp_path / "whole" / expert).items()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "picture.png", "whole"]


def test_activations_wait_on_disk(
    pipeline_folder: PipelineFolder, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their size here: the result is the same."""
    from slim_core.runners.spill import Spill

    model, settings = pipeline_folder("wan2_1_t2v"), settings_for("wan2_1_t2v", picture)
    kept = str(tmp_path / "kept")
    _, (plan,) = run(model, tmp_path / "one", settings, dump_data_dir=kept)
    assert plan.memory.spills
    held: list[int] = []
    hold = Spill.hold
    monkeypatch.setattr(Spill, "hold", lambda self, value, **given: held.append(1) or hold(self, value, **given))
    monkeypatch.setattr("slim_core.runners.beginning.Spill", lambda folder: Spill(folder, at_least=1))
    run(model, tmp_path / "two", settings, dump_data_dir=kept)
    assert held
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

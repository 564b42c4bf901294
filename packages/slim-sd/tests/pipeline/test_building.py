"""Pipelines built round transformers that are open already, from every tiny model and from both layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slim_core.errors import InvalidModelError, SecurityError, UnexpectedError, UnsupportedError
from slim_sd.pipeline.building import build_pipeline
from slim_sd.pipeline.folders import layout_of, pipeline_index, transformer_folders
from slim_sd.wan import files as wan_files
from slim_sd.wan.names import diffusers_name

PipelineFolder = Callable[..., Path]
ORIGINALS = ("wan2_1_t2v", "wan2_1_i2v", "wan2_2_t2v", "wan2_2_i2v", "wan2_2_ti2v")
NAMES = (*ORIGINALS, "flux", "sd3", "hunyuan_video", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus")


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """The transformers of a folder as diffusers' modules, every parameter in one dtype."""
    found: dict[str, nn.Module] = {}
    for component, place in transformer_folders(folder).items():
        tensors = {name: value for file in place.glob("*.safetensors") for name, value in load_file(file).items()}
        if layout_of(folder) == "original":
            config = wan_files.transformer_config(place)
            tensors = {diffusers_name(name): value for name, value in tensors.items()}
        else:
            config = json.loads((place / "config.json").read_text())
        module = getattr(diffusers, config["_class_name"]).from_config(config)
        module.load_state_dict(tensors)
        found[component] = module.to(dtype).eval()
    return found


def latents(pipeline: Any, arguments: Mapping[str, Any]) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipeline(**arguments, return_dict=False)[0])


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch, tiny_pipelines: ModuleType) -> None:
    tiny_pipelines.shrink_edited_pictures(monkeypatch)


def test_all_are_tried(tiny_pipelines: ModuleType) -> None:
    assert tiny_pipelines.NAMES == NAMES
    assert tiny_pipelines.ORIGINALS == ORIGINALS


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_samples(name: str, pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    folder = pipeline_folder(name)
    transformers = opened(folder)
    pipeline = build_pipeline(folder, transformers)
    assert type(pipeline).__name__ == pipeline_index(folder)["_class_name"]
    spreads: list[float] = []
    for component, module in transformers.items():
        assert pipeline.components[component] is module
        module.register_forward_hook(lambda _module, _inputs, output: spreads.append(float(output[0].std())))
    first = latents(pipeline, tiny_pipelines.arguments(name))
    assert torch.isfinite(first).all()
    assert len(spreads) >= 2
    assert all(0.5 < spread < 2 for spread in spreads), spreads
    assert torch.equal(first, latents(pipeline, tiny_pipelines.arguments(name)))
    other = latents(pipeline, tiny_pipelines.arguments(name, seed=1))
    assert not torch.equal(first, other)
    # The prompt, too, reaches the result.
    words = tiny_pipelines.arguments(name) | {"prompt": "Two cats fight on a stage"}
    assert not torch.equal(first, latents(pipeline, words))


@pytest.mark.parametrize("name", ORIGINALS)
def test_both_layouts_sample_the_same(name: str, pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    results = []
    for layout in ("diffusers", "original"):
        folder = pipeline_folder(name, layout=layout)
        results.append(latents(build_pipeline(folder, opened(folder)), tiny_pipelines.arguments(name)))
    assert torch.equal(*results)


def test_both_layouts_sample_the_same_in_bfloat16(pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    results = []
    for layout in ("diffusers", "original"):
        folder = pipeline_folder("wan2_2_t2v", layout=layout, dtype=torch.bfloat16, shards=2)
        pipeline = build_pipeline(folder, opened(folder, torch.bfloat16))
        assert pipeline.components["text_encoder"].dtype == torch.bfloat16
        assert pipeline.components["vae"].dtype == torch.float32
        results.append(latents(pipeline, tiny_pipelines.arguments("wan2_2_t2v")))
    assert torch.equal(*results)


def test_both_experts_work(pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    folder = pipeline_folder("wan2_2_t2v", layout="original")
    transformers = opened(folder)
    times: dict[str, list[float]] = {name: [] for name in transformers}
    for name, module in transformers.items():
        module.register_forward_pre_hook(
            lambda _module, _args, given, name=name: times[name].append(float(given["timestep"][0])), with_kwargs=True
        )
    latents(build_pipeline(folder, transformers, shift=3.0), tiny_pipelines.arguments("wan2_2_t2v"))
    assert min(times["transformer"]) >= 875 > max(times["transformer_2"])


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_transformers_files_are_not_read(layout: str, tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    folder = shutil.copytree(pipeline_folder("wan2_2_ti2v", layout=layout), tmp_path / "model")
    transformers = opened(folder)
    for place in transformer_folders(folder).values():
        for file in place.glob("*.safetensors"):
            if layout == "diffusers":
                file.unlink()
            else:  # its headers tell what kind of model it is
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] + bytes(-(-file.stat().st_size // 2)))
    assert build_pipeline(folder, transformers).components["transformer"] is transformers["transformer"]


def test_ti2v_begins_with_a_picture_or_without(pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    picture = tiny_pipelines.arguments("wan2_1_i2v")["image"]
    results = []
    for layout in ("diffusers", "original"):
        folder = pipeline_folder("wan2_2_ti2v", layout=layout)
        pipeline = build_pipeline(folder, opened(folder), from_image=True)
        assert isinstance(pipeline, WanImageToVideoPipeline)
        results.append(latents(pipeline, tiny_pipelines.arguments("wan2_2_ti2v") | {"image": picture}))
        assert torch.isfinite(results[-1]).all()
    assert torch.equal(*results)
    for name, layout in (("wan2_1_t2v", "original"), ("wan2_2_i2v", "diffusers"), ("flux", "diffusers")):
        folder = pipeline_folder(name, layout=layout)
        with pytest.raises(UnsupportedError, match="only a TI2V model"):
            build_pipeline(folder, opened(folder), from_image=True)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_solver_and_shift(layout: str, pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    folder = pipeline_folder("wan2_1_t2v", layout=layout)
    transformers = opened(folder)

    def scheduler(**options: Any) -> Any:
        return build_pipeline(folder, transformers, **options).components["scheduler"]

    for options, kind, shift in (
        ({}, UniPCMultistepScheduler, 5.0),
        ({"shift": 3.0}, UniPCMultistepScheduler, 3.0),
        ({"solver": "dpm++"}, DPMSolverMultistepScheduler, 5.0),
        ({"solver": "dpm++", "shift": 3}, DPMSolverMultistepScheduler, 3.0),
        ({"solver": "unipc", "shift": 8.0}, UniPCMultistepScheduler, 8.0),
    ):
        found = scheduler(**options)
        assert isinstance(found, kind)
        assert found.config["flow_shift"] == shift
        assert found.config["use_flow_sigmas"]
    pipeline = build_pipeline(folder, transformers, solver="dpm++")
    assert torch.isfinite(latents(pipeline, tiny_pipelines.arguments("wan2_1_t2v"))).all()


def test_solver_and_shift_of_other_models(pipeline_folder: PipelineFolder) -> None:
    sd3, flux = pipeline_folder("sd3"), pipeline_folder("flux")
    assert build_pipeline(sd3, opened(sd3), shift=6.0).components["scheduler"].config["shift"] == 6.0
    with pytest.raises(UnsupportedError, match="solver cannot be chosen"):
        build_pipeline(sd3, opened(sd3), solver="unipc")
    with pytest.raises(UnsupportedError, match="takes no shift, it depends on the size"):
        build_pipeline(flux, opened(flux), shift=3.0)


def test_dtypes(pipeline_folder: PipelineFolder) -> None:
    folder = pipeline_folder("sd3", dtype=torch.bfloat16)
    stored = build_pipeline(folder, opened(folder)).components
    assert (stored["text_encoder"].dtype, stored["vae"].dtype) == (torch.bfloat16, torch.float32)
    chosen = build_pipeline(folder, opened(folder), dtype=torch.float16).components
    assert {chosen[name].dtype for name in ("text_encoder", "text_encoder_3", "vae")} == {torch.float16}
    for layout in ("diffusers", "original"):
        folder = pipeline_folder("wan2_1_i2v", layout=layout)
        chosen = build_pipeline(folder, opened(folder), dtype=torch.bfloat16).components
        assert (chosen["image_encoder"].dtype, chosen["text_encoder"].dtype) == (torch.bfloat16, torch.bfloat16)
        assert chosen["vae"].dtype == torch.float32
        for name in ("text_encoder", "image_encoder", "vae"):
            assert not chosen[name].training
            assert not any(parameter.requires_grad for parameter in chosen[name].parameters())


def test_progress_bars_are_put_back(pipeline_folder: PipelineFolder, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    folder = pipeline_folder("wan2_1_t2v")
    transformers = opened(folder)
    shown = logging.is_progress_bar_enabled(), diffusers.utils.logging.is_progress_bar_enabled()
    capfd.readouterr()
    build_pipeline(folder, transformers)
    assert "it/s" not in capfd.readouterr().err
    assert shown == (logging.is_progress_bar_enabled(), diffusers.utils.logging.is_progress_bar_enabled())


@pytest.mark.parametrize("given", [{}, {"transformer": 1, "transformer_2": 2}, {"unet": 1}])
def test_transformers_that_do_not_fit(given: dict[str, Any], pipeline_folder: PipelineFolder) -> None:
    with pytest.raises(UnexpectedError, match=r"were given for \['transformer'\]"):
        build_pipeline(pipeline_folder("wan2_1_t2v"), given)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path, {"format": "pt"})


def to_bin(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def rename_class(path: Path) -> None:
    index = json.loads(path.read_text())
    index["text_encoder"][1] = "UMT7EncoderModel"
    path.write_text(json.dumps(index))


def rename_pipeline(path: Path) -> None:
    path.write_text(path.read_text().replace('"WanPipeline"', '"Wan9Pipeline"'))


def not_a_pipeline(path: Path) -> None:
    path.write_text(path.read_text().replace('"WanPipeline"', '"AutoencoderKLWan"'))


@pytest.mark.parametrize(
    ("file", "spoil", "error", "problem"),
    [
        ("text_encoder/model.safetensors", cut, InvalidModelError, "text_encoder"),
        ("text_encoder/model.safetensors", drop_tensor, InvalidModelError, "'text_encoder' .*missing tensor"),
        ("text_encoder/model.safetensors", to_bin, InvalidModelError, "'text_encoder' has no safetensors"),
        ("text_encoder/model.safetensors", Path.unlink, InvalidModelError, "'text_encoder' has no safetensors"),
        ("text_encoder/config.json", Path.unlink, InvalidModelError, "'text_encoder' .*cannot be loaded"),
        ("vae/diffusion_pytorch_model.safetensors", cut, InvalidModelError, "vae"),
        ("vae/diffusion_pytorch_model.safetensors", drop_tensor, InvalidModelError, "'vae' .*missing tensor"),
        ("vae/diffusion_pytorch_model.safetensors", to_bin, InvalidModelError, "'vae'"),
        ("vae/config.json", Path.unlink, InvalidModelError, "'vae' .*cannot be loaded"),
        ("scheduler/scheduler_config.json", Path.unlink, InvalidModelError, "'scheduler' .*cannot be loaded"),
        ("tokenizer/tokenizer.json", cut, InvalidModelError, "'tokenizer' .*cannot be loaded"),
        ("model_index.json", rename_class, UnsupportedError, "'text_encoder': the installed transformers has no"),
        ("model_index.json", rename_pipeline, UnsupportedError, "has no pipeline 'Wan9Pipeline'"),
        ("model_index.json", not_a_pipeline, UnsupportedError, "has no pipeline 'AutoencoderKLWan'"),
    ],
)
def test_broken_diffusers_folders(
    file: str,
    spoil: Callable[[Path], Any],
    error: type[Exception],
    problem: str,
    tmp_path: Path,
    pipeline_folder: PipelineFolder,
) -> None:
    folder = shutil.copytree(pipeline_folder("wan2_1_t2v"), tmp_path / "model")
    transformers = opened(folder)
    spoil(folder / file)
    with pytest.raises(error, match=problem) as caught:
        build_pipeline(folder, transformers)
    assert str(folder) in str(caught.value)


def hostile(path: Path) -> None:
    torch.save({"conv1.weight": Path("x")}, path)


@pytest.mark.parametrize(
    ("file", "spoil", "error", "problem"),
    [
        ("models_t5_umt5-xxl-enc-bf16.pth", Path.unlink, InvalidModelError, "missing"),
        ("models_t5_umt5-xxl-enc-bf16.pth", cut, InvalidModelError, "not a complete"),
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", Path.unlink, InvalidModelError, "missing"),
        ("Wan2.1_VAE.pth", Path.unlink, InvalidModelError, "VAE"),
        ("Wan2.1_VAE.pth", hostile, SecurityError, "would run code"),
        ("google", shutil.rmtree, InvalidModelError, "tokenizer"),
    ],
)
def test_broken_original_folders(
    file: str,
    spoil: Callable[[Path], Any],
    error: type[Exception],
    problem: str,
    tmp_path: Path,
    pipeline_folder: PipelineFolder,
) -> None:
    folder = shutil.copytree(pipeline_folder("wan2_1_i2v", layout="original"), tmp_path / "model")
    transformers = opened(folder)
    spoil(folder / file)
    with pytest.raises(error, match=problem) as caught:
        build_pipeline(folder, transformers)
    assert str(folder) in str(caught.value)


def test_parts_of_another_model(tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    folder = shutil.copytree(pipeline_folder("wan2_1_i2v", layout="original"), tmp_path / "model")
    transformers = opened(folder)
    other = pipeline_folder("wan2_1_i2v", layout="original", text_dim=64, image_dim=48)
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"):
        shutil.copy(other / name, folder / name)
        with pytest.raises(InvalidModelError, match=r"makes states of (64|48) channels, and the transformer takes 32"):
            build_pipeline(folder, transformers)
        shutil.copy(pipeline_folder("wan2_1_i2v", layout="original") / name, folder / name)
    shutil.copy(pipeline_folder("wan2_2_ti2v", layout="original") / "Wan2.2_VAE.pth", folder / "Wan2.1_VAE.pth")
    with pytest.raises(InvalidModelError, match="makes states of 48 channels, and the transformer takes 16"):
        build_pipeline(folder, transformers)


@pytest.mark.parametrize("name", ["qwen_image_edit", "wan2_1_t2v"])
def test_code_beside_a_tokenizer_is_not_run(name: str, tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    layout = "original" if name.startswith("wan") else "diffusers"
    folder = shutil.copytree(pipeline_folder(name, layout=layout), tmp_path / "model")
    transformers = opened(folder)
    for place in (
        [folder / "google" / "umt5-xxl"] if layout == "original" else [folder / "processor", folder / "tokenizer"]
    ):
        config = json.loads((place / "tokenizer_config.json").read_text())
        config["auto_map"] = {"AutoTokenizer": [None, "mine.Mine"], "AutoProcessor": "mine.Mine"}
        config["tokenizer_class"] = "Mine"
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        (place / "mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    with pytest.raises(InvalidModelError, match=f"{folder}.*custom code"):
        build_pipeline(folder, transformers)
    assert not (tmp_path / "mark").exists()


def test_a_processor_as_published(tmp_path: Path, pipeline_folder: PipelineFolder, tiny_pipelines: ModuleType) -> None:
    """It names the image processor for torchvision, has settings for videos and a template of chats."""
    name = "qwen_image_edit_plus"
    folder = shutil.copytree(pipeline_folder(name), tmp_path / "model")
    path = folder / "processor" / "preprocessor_config.json"
    config = json.loads(path.read_text()) | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    path.write_text(json.dumps(config | {"processor_class": "Qwen2_5_VLProcessor"}))
    (path.parent / "video_preprocessor_config.json").write_text(json.dumps(config))
    (path.parent / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    pipeline = build_pipeline(folder, opened(folder))
    assert pipeline.components["processor"].chat_template.startswith("{{ messages")
    expected = build_pipeline(pipeline_folder(name), opened(folder))
    of = [latents(each, tiny_pipelines.arguments(name)) for each in (pipeline, expected)]
    assert torch.equal(*of)

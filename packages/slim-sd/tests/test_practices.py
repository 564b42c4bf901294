"""The practices for diffusion models: which model gets which, what becomes of every linear, and what an independent
reader of the MindIE-SD format makes of the files.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from slim_core.dispatch import choose_recipe, match_practice
from slim_core.evaluation.verify import verify_folder
from slim_core.practices import PracticeLibrary
from slim_core.practices.registry import load_registry
from slim_core.progress import SilentProgress
from slim_core.recipe import NameFilter, load_recipe
from slim_core.runners.plan import Plan
from slim_core.service import QuantRequest
from slim_sd.recipe import SpecSd
from slim_sd.resources import PRACTICE_FOLDER, REGISTRY
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]

ROOT = Path(__file__).parents[3]
LAB = ROOT / "lab_practice"
API = "multimodal_sd_modelslim_v1"
FILES = [path for path in sorted(LAB.glob("*/*.yaml")) if f"apiversion: {API}\n" in path.read_text("utf-8")]
OWN = [path for path in FILES if path.parent.name != "default"]
DEFAULT = LAB / "default" / "default_sd_w8a8.yaml"
STATIC = [path for path in OWN if path.stem.endswith("_w8a8")]
# What a model type gets for a quantization type, without a tag and without a question.
CHOSEN = {
    "flux1": {"w8a8": "flux1_w8a8_dynamic"},
    "hunyuan_video": {"w8a8": "hunyuan_video_w8a8_dynamic"},
    "qwen_image": {"w8a8": "qwen_image_w8a8_dynamic"},
    "qwen_image_edit": {"w8a8": "qwen_image_edit_w8a8_dynamic"},
    "sd3": {"w8a8": "sd3_w8a8_dynamic"},
    "wan2_1": {"w8a8": "wan2_1_w8a8_dynamic"},
    "wan2_2": {"w8a8": "wan2_2_w8a8_dynamic", "w4a4": "wan2_2_w4a4_mxfp4"},
}
# The tiny pipelines that each practice is tried on.
WAN2_2 = ("wan2_2_t2v", "wan2_2_i2v", "wan2_2_ti2v")
PIPELINES: dict[str, tuple[str, ...]] = {
    "flux1_w8a8": ("flux",),
    "flux1_w8a8_dynamic": ("flux",),
    "hunyuan_video_w8a8": ("hunyuan_video",),
    "hunyuan_video_w8a8_dynamic": ("hunyuan_video",),
    "qwen_image_edit_w8a8_dynamic": ("qwen_image_edit", "qwen_image_edit_plus"),
    "qwen_image_w8a8": ("qwen_image",),
    "qwen_image_w8a8_dynamic": ("qwen_image",),
    "sd3_w8a8_dynamic": ("sd3",),
    "wan2_1_w8a8": ("wan2_1_t2v",),
    "wan2_1_w8a8_dynamic": ("wan2_1_t2v", "wan2_1_i2v"),
    "wan2_2_t2v_w8a8": ("wan2_2_t2v",),
    "wan2_2_ti2v_w8a8": ("wan2_2_ti2v",),
    "wan2_2_w4a4_mxfp4": WAN2_2,
    "wan2_2_w8a8_dynamic": WAN2_2,
    "wan2_2_w8a8_mxfp8": WAN2_2,
}
CASES = [pytest.param(LAB, name, tiny, id=f"{name}-{tiny}") for name, kinds in PIPELINES.items() for tiny in kinds]
# Linears of the blocks that stay in floating point, beside everything outside of the blocks.
KEPT = {
    **dict.fromkeys(("flux1", "sd3"), r"\.(norm\d?(_context)?\.linear|ff_context\.net\.2)$"),
    "hunyuan_video": r"\.norm\d?(_context)?\.linear$",
    **dict.fromkeys(("qwen_image", "qwen_image_edit"), r"\.((img|txt)_mod\.1|txt_mlp\.net\.2)$"),
    **dict.fromkeys(("wan2_1", "wan2_2"), r"\.ffn\.2$"),
}
BLOCK = re.compile(r"(blocks|transformer_blocks|single_transformer_blocks)\.\d+\.")
# Of the output of a transformer with random weights, in dB, against the float one.
LEAST_SQNR = {"W8A8_DYNAMIC": 25.0, "W8A8": 18.0, "W8A8_MXFP8": 20.0, "W4A4_MXFP4": 6.0}
TINY = {
    "size": "64*64",
    "frame_num": 5,
    "sample_steps": 3,
    "num_frames": 5,
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures: drawing takes longer than all the rest of a small run."""
    monkeypatch.setattr("slim_core.evaluation.report.write.draw_plots", lambda _data: {})


@pytest.fixture(scope="session")
def reader() -> ModuleType:
    """``tests/mindie/reader.py``, which knows nothing of Slim."""
    spec = importlib.util.spec_from_file_location("mindie_reader", ROOT / "tests" / "mindie" / "reader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_recipe(path: Path, folder: Path) -> Path:
    """The practice with sizes, frames and steps that a tiny pipeline makes quickly; nothing else is changed."""
    recipe = yaml.safe_load(path.read_text("utf-8"))
    settings = recipe["spec"].get("multimodal_sd_config", {}).get("model_config", {})
    settings |= {name: TINY[name] for name in settings if name in TINY}
    if dump := recipe["spec"].get("multimodal_sd_config", {}).get("dump_config"):
        dump |= {name: 2 for name in dump if name == "time_steps"}
    (folder / path.name).write_text(yaml.safe_dump(recipe), "utf-8")
    return folder / path.name


def run(path: Path, model: Path, output: Path) -> Plan:
    """Run a practice; gives the plan."""
    plans: list[Plan] = []
    request = QuantRequest(model_path=model, save_path=output, model_type=path.parent.name, device="cpu")
    recipe = load_recipe(tiny_recipe(path, output.parent))
    DiffusionService().quantize(request, recipe, SilentProgress(), plans.append)
    (plan,) = plans
    return plan


def experts(model: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """The transformers of a Diffusers folder, and what was written for each."""
    if not (model / "transformer_2").is_dir():
        yield model / "transformer", output
        return
    yield model / "transformer", output / "high_noise_model"
    yield model / "transformer_2", output / "low_noise_model"


def float_transformer(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    module = getattr(diffusers, config["_class_name"]).from_config(config)
    module.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return module.eval()


class Original(nn.Module):
    """A Wan transformer of diffusers that tells the names of the original project, for a reader that goes by names."""

    def __init__(self, module: nn.Module, names: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        super().__init__()
        self.inner = module
        modules = {f"{name}.weight": name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        renamed = {name: names({key: torch.zeros(())}) for key, name in modules.items()}
        self.found = {next(iter(new)).removesuffix(".weight"): name for name, new in renamed.items()}

    def named_modules(self, *_args: Any, **_options: Any) -> Any:
        yield from ((new, self.inner.get_submodule(name)) for new, name in self.found.items())

    def get_submodule(self, target: str) -> nn.Module:
        """The parent of a linear that is about to be replaced."""
        return Parent(self, target)


class Parent(nn.Module):
    """Where the reader sets a layer, ``setattr`` being all it does."""

    def __init__(self, owner: Original, prefix: str) -> None:
        super().__init__()
        object.__setattr__(self, "place", (owner, prefix))

    def __setattr__(self, name: str, value: Any) -> None:
        if "place" not in self.__dict__:
            super().__setattr__(name, value)
            return
        owner, prefix = self.__dict__["place"]
        parent, _, leaf = owner.found[f"{prefix}.{name}"].rpartition(".")
        setattr(owner.inner.get_submodule(parent), leaf, value)


def call_of(module: Any) -> dict[str, Any]:
    """One call of a transformer, of noise."""
    from slim_sd.examples import example_call

    call = example_call(module, module.config, torch.float32)
    assert call is not None
    return call


def first_call(module: Any, captured: Path) -> dict[str, Any]:
    """The first call of those that were captured."""
    names = list(inspect.signature(module.forward).parameters)
    call = dict(zip(names, torch.load(captured, weights_only=True)[0], strict=True))
    return {name: value for name, value in call.items() if name != "return_dict"}


def output_of(module: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(**call, return_dict=False)[0].double()


def sqnr(signal: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_practice_is_sound(path: Path) -> None:
    recipe = load_recipe(path)
    spec = recipe.spec(SpecSd)
    assert recipe.metadata.config_id == path.stem
    assert (recipe.raw_spec["runner"], spec.runner, spec.warnings()) == ("layer_wise", "layer_wise", [])
    assert [(saver.type, saver.part_file_size) for saver in spec.save] == [("mindie_format_saver", 0)]  # pyright: ignore
    assert (path in STATIC) == (spec.multimodal_sd_config.dump_config.time_steps is not None)
    if path in STATIC or path.stem == "wan2_1_w8a8_dynamic":
        assert spec.multimodal_sd_config.given["prompt"]


def test_every_practice_is_tried() -> None:
    assert sorted(PIPELINES) == [path.stem for path in sorted(OWN, key=lambda path: path.stem)]


def test_every_registered_model_type_reaches_its_practices_without_a_question() -> None:
    library, registry = PracticeLibrary([PRACTICE_FOLDER]), load_registry(REGISTRY)
    assert set(registry.values()) == set(CHOSEN)
    listed: dict[str, set[str]] = {}
    for practice in library.list():
        if practice.recipe.apiversion == API and practice.pedigree != "default":
            models = {*practice.metadata.verified_model_types, *practice.metadata.verified_tags}
            assert models
            listed.setdefault(practice.pedigree, set()).update(models)
    assert listed == {family: {n for n, place in registry.items() if place == family} for family in CHOSEN}
    for name, family in registry.items():
        for quant_type, config_id in CHOSEN[family].items():
            selection = library.select(family, name, quant_type)
            assert selection.question is None
            assert (selection.practice.config_id, selection.practice.quant_type) == (config_id, quant_type)
    assert library.warnings == []


@pytest.mark.parametrize("tags", [["atlas_350"], ["Atlas_350", "MindIE-SD"]])
def test_tags_choose_among_devices(tags: list[str]) -> None:
    library = PracticeLibrary([PRACTICE_FOLDER])
    for name in (name for name, place in load_registry(REGISTRY).items() if place == "wan2_2"):
        selection = library.select("wan2_2", name, "w8a8", tags)
        assert (selection.practice.config_id, selection.question) == ("wan2_2_w8a8_mxfp8", None)


def test_no_name_belongs_to_two_services() -> None:
    from slim_llm.resources import REGISTRY as TEXT
    from slim_vlm.resources import REGISTRY as PICTURES

    assert not set(load_registry(REGISTRY)) & {*load_registry(TEXT), *load_registry(PICTURES)}


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


@pytest.mark.parametrize(
    ("model_type", "config_id"),
    [
        *((name, "wan2_1_w8a8_dynamic") for name in ("Wan2.1", "Wan2_1", "Wan2.1-T2V-14B", "Wan2.1-T2V-1.3B")),
        *((name, "wan2_2_w8a8_dynamic") for name in ("Wan2_2", "Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B")),
        ("FLUX.1-dev", "flux1_w8a8_dynamic"),
        *((name, "hunyuan_video_w8a8_dynamic") for name in ("HunyuanVideo", "hunyuan-video", "hunyuanvideo")),
        ("Qwen-Image-Edit-2509", "qwen_image_edit_w8a8_dynamic"),
    ],
)
def test_a_name_alone(model_type: str, config_id: str) -> None:
    selection = match_practice(model_type, "w8a8")
    assert (selection.practice.config_id, selection.question) == (config_id, None)


def test_a_type_instead_of_a_recipe(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    request = QuantRequest(
        model_path=pipeline_folder("wan2_1_t2v"),
        save_path=tmp_path / "out",
        model_type="Wan2.1-T2V-14B",
        quant_type="w8a8",
        device="cpu",
    )
    recipe, service = choose_recipe(request, never)
    assert recipe.metadata.config_id == "wan2_1_w8a8_dynamic"
    assert isinstance(service, DiffusionService)
    assert service.plan(request, recipe).warnings == []


@pytest.mark.parametrize(("quant_type", "lead"), [("w8a8", ""), ("w4a4", "There is no practice for My-Tune with w4a4")])
def test_an_unknown_name_gets_the_fallback(
    quant_type: str, lead: str, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    asked: list[str] = []
    request = QuantRequest(
        model_path=pipeline_folder("flux"), save_path=tmp_path / "out", model_type="My-Tune", quant_type=quant_type
    )
    recipe, service = choose_recipe(request, lambda question: asked.append(question) or True)
    assert (recipe.metadata.config_id, type(service)) == ("default_sd_w8a8", DiffusionService)
    (question,) = asked
    assert question.startswith(lead)
    assert "'default_sd_w8a8' fits any diffusion model but was not made for My-Tune" in question


@pytest.mark.parametrize(("lab", "practice", "tiny"), CASES)
def test_it_runs_on_its_pipeline_and_the_reader_loads_it(
    lab: Path,
    practice: str,
    tiny: str,
    pipeline_folder: PipelineFolder,
    tiny_wan: ModuleType,
    reader: ModuleType,
    tmp_path: Path,
) -> None:
    (path,) = lab.glob(f"*/{practice}.yaml")
    sizes = {"num_attention_heads": 8} if "mxfp" in practice else {}  # 64 must divide what is multiplied
    model, output = pipeline_folder(tiny, **sizes), tmp_path / "out"
    plan = run(path, model, output)
    for one in (plan, *plan.others):
        assert one.needs_data == (path in STATIC)
        assert [text for text in one.warnings if "the pipeline is run once" not in text] == []
        assert len(one.warnings) == one.needs_data
    kinds: Counter[str] = Counter()
    for source, written in experts(model, output):
        result = verify_folder(written, engine="mindie-sd")
        assert result.ok, result.problems
        module = float_transformer(source)
        expert = "" if written == output else f"_{written.name}"
        captured = output / f"calib_data{expert}.pth"
        assert captured.is_file() == (path in STATIC)
        call = call_of(module) if path not in STATIC else first_call(module, captured)
        before = output_of(module, call)
        view = Original(module, tiny_wan.original_transformer_names) if tiny.startswith("wan") else module
        linears = {name for name, part in view.named_modules() if isinstance(part, nn.Linear)}
        (described,) = written.glob("quant_model_description*.json")
        replaced = set(reader.quantize(view, described))
        kept = re.compile(KEPT[path.parent.name])
        everything = {name for name in linears if BLOCK.match(name)}
        assert everything
        whole = "mxfp" in practice  # nothing in blocks is kept there
        assert replaced == (everything if whole else {name for name in everything if not kept.search(name)})
        kinds += Counter(json.loads(described.read_text()).values())
        assert any(key.endswith(".div.mul_scale") for key in json.loads(described.read_text())) == (path in STATIC)
        main = json.loads(described.read_text())["model_quant_type"]
        assert described.name == f"quant_model_description_{main.lower()}.json"
        assert sqnr(before, output_of(module, call)) > LEAST_SQNR[main]
    expected = {
        "w8a8": {"W8A8"},
        "dynamic": {"W8A8_DYNAMIC"},
        "mxfp8": {"W8A8_MXFP8"},
        "mxfp4": {"W4A4_MXFP4", "W8A8_MXFP8"},
    }[practice.rpartition("_")[2]]
    assert set(kinds) - {"FLOAT"} == expected


@pytest.mark.parametrize("tiny", ["flux", "hunyuan_video", "qwen_image_edit", "sd3", "wan2_1_t2v", "wan2_2_i2v"])
def test_the_fallback_leaves_modulation_alone(tiny: str, pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    model, output = pipeline_folder(tiny), tmp_path / "out"
    plan = run(DEFAULT, model, output)
    for one in (plan, *plan.others):
        assert one.warnings == []
        assert not one.needs_data
        names = {linear.prefix for unit in one.model.units if unit.block is not None for linear in unit.linears}
        kept = {linear.prefix for unit in one.model.units for linear in unit.linears if unit.block is not None}
        kept -= {one.model.tensor_name(name) for name in one.assignments}
        patterns = r"\.(norm\d?(_context)?\.linear|(img|txt)_mod\.1|txt_mlp\.net\.2|ff_context\.net\.2|ffn\.2)$"
        assert kept == {name for name in names if re.search(patterns, name)}
        assert kept
    for _, written in experts(model, output):
        assert verify_folder(written, engine="mindie-sd").ok


def test_every_pattern_of_a_practice_is_used_on_published_names() -> None:
    """Names as the published models have them, spelled out."""
    wan = [f"blocks.39.{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["blocks.39.ffn.0"]
    joint = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out"]
    flux = [f"transformer_blocks.18.{n}" for n in (*joint, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj")]
    flux += [f"single_transformer_blocks.37.{n}" for n in ("proj_mlp", "proj_out", "attn.to_v")]
    qwen = [f"transformer_blocks.59.{n}" for n in (*joint, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj")]
    hunyuan = [*flux, "transformer_blocks.19.ff_context.net.2"]
    modulation = ["transformer_blocks.3.norm1.linear", "transformer_blocks.3.norm1_context.linear"]
    single = ["single_transformer_blocks.3.norm.linear"]
    last = ["transformer_blocks.3.ff_context.net.2"]
    of_qwen = [f"transformer_blocks.3.{name}" for name in ("img_mod.1", "txt_mod.1", "txt_mlp.net.2")]
    names = {
        "flux1": (flux, [*modulation, *single, *last]),
        "hunyuan_video": (hunyuan, [*modulation, *single]),
        "qwen_image": (qwen, of_qwen),
        "qwen_image_edit": (qwen, of_qwen),
        "sd3": (flux[:7], [*modulation, *last]),
        "wan2_1": (wan, ["blocks.0.ffn.2"]),
        "wan2_2": (wan, ["blocks.0.ffn.2"]),
    }
    for path in OWN:
        rules = [one for one in load_recipe(path).spec(SpecSd).process if one.type == "linear_quant"]
        filters = [NameFilter(one.include, one.exclude) for one in rules]
        taken, kept = names[path.parent.name]
        if "mxfp" in path.stem:
            taken, kept = [*taken, *kept], []
        for name in taken:
            assert [one.matches(name) for one in filters].count(True) == 1, (path.stem, name)
        assert not any(one.matches(name) for one in filters for name in kept)


@pytest.mark.parametrize("layers", [2, 3])
def test_nine_linears_of_each_block_in_both_layouts(
    layers: int, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    """What the guide's practice makes of Wan2.1: ffn.2 is kept whatever the layout calls it; all bytes are equal."""
    path = LAB / "wan2_1" / "wan2_1_w8a8_dynamic.yaml"
    for layout in ("diffusers", "original"):
        model = pipeline_folder("wan2_1_t2v", layout=layout, num_layers=layers)
        (tmp_path / layout).mkdir()
        run(path, model, tmp_path / layout / "out")
    names = ("quant_model_description_w8a8_dynamic.json", "quant_model_weight_w8a8_dynamic.safetensors")
    files = [
        [(tmp_path / layout / "out" / name).read_bytes() for name in names] for layout in ("diffusers", "original")
    ]
    assert files[0] == files[1]
    described = json.loads(files[0][0])
    assert described["model_quant_type"] == "W8A8_DYNAMIC"
    quantized = [name for name, kind in described.items() if kind == "W8A8_DYNAMIC" and name.endswith(".weight")]
    attention = [f"{a}.{part}" for a in ("self_attn", "cross_attn") for part in "qkvo"]
    assert sorted(quantized) == sorted(f"blocks.{i}.{n}.weight" for i in range(layers) for n in (*attention, "ffn.0"))
    assert len(quantized) == 9 * layers
    tensors = load_file(tmp_path / "original" / "out" / names[1])
    for name in quantized:
        prefix, (n, k) = name.removesuffix(".weight"), tensors[name].shape
        assert (tensors[name].dtype, n * k > 0) == (torch.int8, True)
        assert tensors[f"{prefix}.weight_scale"].shape == tensors[f"{prefix}.weight_offset"].shape == (n, 1)
        assert not tensors[f"{prefix}.weight_offset"].any()
        assert (tensors[f"{prefix}.bias"].dtype, described[f"{prefix}.bias"]) == (torch.float32, "FLOAT")
    assert described["blocks.0.ffn.2.weight"] == "FLOAT"
    assert tensors["blocks.0.ffn.2.weight"].dtype == torch.float32


def test_the_table_in_the_documentation() -> None:
    text = (ROOT / "docs" / "diffusion.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (`\w+_w\da\d[^|]+) \| [^|]+ \|$", text, re.M)
    listed = {family: set(re.findall(r"`(\w+)`", practices)) for family, practices in rows}
    assert listed == {family: {path.stem for path in OWN if path.parent.name == family} for family in CHOSEN}

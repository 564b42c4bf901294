"""Vision-language models through the service, held against transformers' own forward and an independent reader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from slim_core.evaluation.verify import verify_folder
from slim_core.model.streamed import StreamedModel
from slim_core.progress import SilentProgress
from slim_core.runners.calibration import BlockForwards
from slim_core.service import EvalRequest
from slim_vlm.dataset import read_samples
from slim_vlm.images import open_image
from slim_vlm.inputs import ImageInputs
from slim_vlm.models import open_vlm
from slim_vlm.preparation import Preparation, conversation
from slim_vlm.processor import open_processor
from slim_vlm.service import VlmService

VlmFolder = Callable[..., Path]
Quantize = Callable[..., Any]
CPU = torch.device("cpu")
FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm4v_moe", "glm46v", "internvl"),
    *("gemma3", "llava", "mistral3", "idefics3", "aya_vision"),
)
TOWERS = {
    "qwen3_vl_moe": ("model.visual",),
    "qwen2_5_vl": ("model.visual",),
    "glm4v": ("model.visual",),
    "internvl": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "idefics3": ("model.vision_model", "model.connector"),
}


def plain(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, experts_implementation="eager"
    ).eval()


def inputs_of(model: StreamedModel, pictures: Path) -> list[Any]:
    preparation = Preparation(model)
    return [preparation.inputs(sample) for sample in read_samples(pictures, "Describe it.")]


def stream(model: StreamedModel, inputs: Any) -> list[Tensor]:
    """The logits of all samples, every unit loaded, run and unloaded by itself."""
    with torch.no_grad(), BlockForwards(model, inputs, CPU) as forwards:
        return [output.logits for output in forwards.run_model()]


@pytest.mark.parametrize("family", FAMILIES)
def test_unit_by_unit_a_model_computes_what_its_plain_forward_does(
    family: str, vlm_folder: VlmFolder, pictures: Path
) -> None:
    model = open_vlm(vlm_folder(family))
    assert model.towers == TOWERS.get(family, model.towers)
    assert model.towers
    reference = plain(vlm_folder(family))
    with torch.no_grad():
        expected = [reference(**inputs).logits for inputs in inputs_of(model, pictures)]
    found = stream(model, inputs_of(model, pictures))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len({one.shape for one in found}) > 1 or family in ("gemma3", "llava", "idefics3", "aya_vision")


def test_deepstack_features_reach_the_text(vlm_folder: VlmFolder, pictures: Path) -> None:
    model = open_vlm(vlm_folder("qwen3_vl_moe"))
    inputs = inputs_of(model, pictures)[:1]
    calls: list[Tensor] = []
    outputs: list[Tensor] = []
    with torch.no_grad(), BlockForwards(model, inputs, CPU) as forwards:
        for unit in model.running[:4]:
            forwards.reach(unit)
            model.load(unit.parameters, CPU)
            if unit.block is not None:
                calls.append(forwards._forward.call(0).args[0].clone())
            output = forwards.run(hand_on=True, keep=True)[0]
            if unit.block is not None:
                outputs.append(output)
    image = inputs[0]["input_ids"][0] == model.config["image_token_id"]
    for before, after in zip(outputs, calls[1:], strict=False):
        assert not torch.equal(before[0, image], after[0, image])
        assert torch.equal(before[0, ~image], after[0, ~image])


@pytest.mark.parametrize("family", FAMILIES)
def test_static_and_dynamic_layers_are_what_an_independent_reader_expects(
    family: str,
    vlm_folder: VlmFolder,
    pictures: Path,
    quantize: Quantize,
    rules: Any,
    naive: ModuleType,
    tmp_path: Path,
) -> None:
    folder = vlm_folder(family)
    quantize(folder, tmp_path / "out", process=[rules["static"], rules["experts"]])
    assert verify_folder(tmp_path / "out", folder, "vllm-ascend").ok
    written = naive.read(tmp_path / "out")
    model = open_vlm(folder)
    reference = plain(folder)
    infos = [info for unit in model.running for info in unit.linears if "experts" not in info.name]
    names = [info.name for info in infos if isinstance(_module(reference, info.name), nn.Linear)]
    assert any(name.startswith(model.towers) for name in names)
    seen = _ranges(reference, names, inputs_of(model, pictures))
    prefix = {info.name: info.prefix for info in infos}
    for name in names:
        assert written.kind(prefix[name]) == "W8A8", name
        scale, offset = naive.input_parameters(*seen[name], False, torch.bfloat16)
        assert written.array(f"{prefix[name]}.input_scale") == scale, name
        assert written.array(f"{prefix[name]}.input_offset") == offset, name
        codes, _, _ = naive.weight_codes(reference.get_submodule(name).weight.detach())
        assert np.array_equal(written.array(f"{prefix[name]}.weight"), codes), name
    experts = [info for unit in model.running for info in unit.linears if ".experts." in info.name]
    assert all(written.kind(info.prefix) == "W8A8_DYNAMIC" for info in experts)
    assert bool(experts) == (family in ("qwen3_vl_moe", "glm4v_moe"))
    # Nothing else of the checkpoint is lost or renamed; stacks of experts become single ones.
    stored, _ = naive.read_tensors(folder)
    stacks = {name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert set(stored) - stacks <= set(written.tensors)
    floats = [name for name, kind in written.description.items() if kind == "FLOAT" and name in stored]
    assert all(torch.equal(written.tensors[name], stored[name]) for name in floats)


def _module(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _ranges(model: nn.Module, names: list[str], inputs: list[Any]) -> dict[str, tuple[float, float]]:
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            low, high = seen.get(name, (float("inf"), float("-inf")))
            seen[name] = min(low, float(args[0].min())), max(high, float(args[0].max()))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        for given in inputs:
            model(**given)
    for handle in handles:
        handle.remove()
    return seen


def test_both_layouts_of_stacked_experts_give_the_same_files(
    vlm_folder: VlmFolder, quantize: Quantize, rules: Any, naive: ModuleType, tmp_path: Path
) -> None:
    found = []
    for layout in ("published", "resaved"):
        quantize(vlm_folder("qwen3_vl_moe", layout=layout), tmp_path / layout, process=list(rules.values())[:2])
        found.append(naive.read(tmp_path / layout))
    first, second = found
    assert first.description == second.description
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    expert = re.compile(r"model\.language_model\.layers\.\d\.mlp\.experts\.\d\.(gate|up|down)_proj\.weight")
    assert sum(bool(expert.fullmatch(name)) for name in first.tensors) == 4 * 8 * 3


def test_the_tower_runs_once_for_every_sample_and_ahead_of_the_text(
    vlm_folder: VlmFolder, quantize: Quantize, rules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as qwen

    calls: list[str] = []
    for cls, name in ((qwen.Qwen3VLMoeVisionModel, "tower"), (qwen.Qwen3VLMoeTextDecoderLayer, "block")):
        monkeypatch.setattr(cls, "forward", _counted(cls.forward, name, calls))
    result = quantize(vlm_folder("qwen3_vl_moe"), tmp_path / "out", process=[rules["static"], rules["experts"]])
    # The first is the picture that shows which towers there are; it ends ahead of the first block. Another one runs
    # along with the samples, up to the last block.
    assert calls == ["tower"] + ["tower"] * (1 + 3) + ["block"] * (4 * 3 + 3)
    assert (result.samples, result.block_forwards) == (3, 15)
    assert [unit.name for unit in result.units] == [
        *("prologue", "model.visual"),
        *(f"model.language_model.layers.{i}" for i in range(4)),
        "epilogue",
    ]


def _counted(forward: Any, name: str, calls: list[str]) -> Any:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return forward(self, *args, **kwargs)

    return counted


def _losses(model: Any, folder: Path, pictures: Path) -> Tensor:
    """What the plain forward of a model loses on every token of the answers."""
    preparation, losses = Preparation(open_vlm(folder)), list[Tensor]()
    for sample in read_samples(pictures, "", answers=True):
        chat = conversation(sample, open_image(sample))
        asked = preparation.encoded(sample, chat, add_generation_prompt=True)["input_ids"].shape[1]
        answer = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        given = preparation.encoded(sample, [*chat, answer])
        with torch.no_grad():
            logits = model(**given).logits[0, asked - 1 : -1].float()
        losses.append(nn.functional.cross_entropy(logits, given["input_ids"][0, asked:], reduction="none"))
    return torch.cat(losses)


def test_scores_are_those_of_the_plain_model_on_the_answers(vlm_folder: VlmFolder, pictures: Path) -> None:
    folder = vlm_folder("qwen3_vl")
    request = EvalRequest(model_path=folder, dataset=str(pictures), device="cpu")
    scores = VlmService().evaluate(request, SilentProgress())
    every = _losses(plain(folder), folder, pictures)
    assert scores.tokens == len(every)
    assert scores.perplexity == pytest.approx(float(every.mean().exp()), rel=1e-5)


def test_a_text_is_scored_without_any_picture(vlm_folder: VlmFolder, tmp_path: Path) -> None:
    folder = vlm_folder("llava")
    (tmp_path / "text.txt").write_text("The sun rises in the east. The moon follows it at night.")
    request = EvalRequest(model_path=folder, text=tmp_path / "text.txt", device="cpu", sequence_length=16)
    assert VlmService().evaluate(request, SilentProgress()).tokens > 8


def test_the_written_files_compute_what_was_quantized(
    vlm_folder: VlmFolder, pictures: Path, quantize: Quantize, rules: Any, naive: ModuleType, tmp_path: Path
) -> None:
    folder = vlm_folder("qwen3_vl")
    quantize(folder, tmp_path / "out", process=[rules["static"]])
    request = EvalRequest(model_path=folder, quantized=tmp_path / "out", dataset=str(pictures), device="cpu")
    scores = VlmService().evaluate(request, SilentProgress())
    deployed = plain(folder)
    naive.deploy(deployed, naive.read(tmp_path / "out"))
    expected = float(_losses(deployed, folder, pictures).mean().exp())
    assert scores.quantized_perplexity == pytest.approx(expected, rel=2e-2)


def test_without_data_neither_pictures_nor_a_processor_are_needed(
    vlm_folder: VlmFolder, tiny_vlms: ModuleType, quantize: Quantize, rules: Any, naive: ModuleType, tmp_path: Path
) -> None:
    bare = tiny_vlms.build("internvl", tmp_path / "bare")
    for path in bare.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    quantize(bare, tmp_path / "a", process=[rules["dynamic"]], dataset="nowhere")
    quantize(vlm_folder("internvl"), tmp_path / "b", process=[rules["dynamic"]])
    one, other = naive.read(tmp_path / "a"), naive.read(tmp_path / "b")
    assert one.description == other.description
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in other.tensors)
    assert any("vision_tower" in name for name in one.quantized())


def test_recipes_may_use_the_names_of_the_checkpoint_or_of_the_model(
    vlm_folder: VlmFolder, quantize: Quantize, rules: Any, naive: ModuleType, tmp_path: Path
) -> None:
    folder = vlm_folder("qwen2_5_vl")
    for name, text, vision in (
        ("disk", "model.layers.*", "visual.*"),
        ("memory", "model.language_model.layers.*", "model.visual.*"),
    ):
        process = [{**rules["dynamic"], "include": [text, vision], "exclude": [f"{vision}merger*"]}]
        result = quantize(folder, tmp_path / name, process=process)
        assert not [text for text in result.warnings if "matches no" in text]
    one, other = naive.read(tmp_path / "disk"), naive.read(tmp_path / "memory")
    assert one.description == other.description
    assert one.kind("model.layers.0.self_attn.q_proj") == "W8A8_DYNAMIC"
    assert one.kind("visual.blocks.0.attn.qkv") == "W8A8_DYNAMIC"
    assert one.kind("visual.merger.mlp.0") == "FLOAT"


@pytest.mark.parametrize("propagate", ["float", "quantized"])
@pytest.mark.parametrize("processor", ["autoround", "gptq", "iter_smooth", "flex_smooth_quant"])
def test_processors_of_the_text_protocol_work_on_towers_and_text(
    processor: str, propagate: str, vlm_folder: VlmFolder, quantize: Quantize, rules: Any, tmp_path: Path
) -> None:
    static = rules["static"]["qconfig"]
    process: dict[str, list[Any]] = {
        "autoround": [
            {
                "type": "autoround_quant",
                "iters": 3,
                "strategies": [{"qconfig": {**static, "weight": {**static["weight"], "method": "autoround"}}}],
            }
        ],
        "gptq": [{"type": "linear_quant", "qconfig": {**static, "weight": {**static["weight"], "method": "gptq"}}}],
        "iter_smooth": [{"type": "iter_smooth"}, rules["static"]],
        "flex_smooth_quant": [{"type": "flex_smooth_quant"}, rules["static"]],
    }
    result = quantize(vlm_folder("qwen3_vl"), tmp_path / "out", process=process[processor], propagate=propagate)
    assert {linear.kind for linear in result.linears} == {"W8A8"}
    towers = [linear for linear in result.linears if "visual" in linear.name]
    assert towers
    assert all(linear.weight_sqnr_db > 25 for linear in towers)


def test_a_stage_ahead_learns_from_pictures_too(
    vlm_folder: VlmFolder, quantize: Quantize, rules: Any, pictures: Path, tmp_path: Path
) -> None:
    adapt = {"type": "adapt_rotation"}
    learning = {**adapt, "stage": 1, "steps": 2, "quant_dtype": "int8", "layer_type": ["up_proj"]}
    result = quantize(
        vlm_folder("glm4v_moe"),
        tmp_path / "out",
        process=[{**adapt, "stage": 2}, rules["dynamic"]],
        prior=[{"process": [learning], "dataset": str(pictures)}],
    )
    # The vision tower has linears called up_proj too, which do not read the text's hidden states.
    assert result.stage_forwards == 3 * (1 + 3)


def test_experts_below_the_quota_learn_from_extra_pictures(
    vlm_folder: VlmFolder, quantize: Quantize, rules: Any, pictures: Path, tmp_path: Path
) -> None:
    everything = {**rules["static"], "exclude": []}
    dataset = {"path": str(pictures), "num_samples": 2, "min_tokens_per_expert": 100_000, "extra_share": 1.0}
    result = quantize(vlm_folder("qwen3_vl_moe"), tmp_path / "out", process=[everything], dataset=dataset)
    assert (result.samples, result.extra_samples) == (2, 1)


def test_a_module_that_pictures_pass_twice_is_no_tower(vlm_folder: VlmFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llava.modeling_llava import LlavaModel

    once = LlavaModel.get_image_features

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        once(self, *args, **kwargs)
        return once(self, *args, **kwargs)

    monkeypatch.setattr(LlavaModel, "get_image_features", twice)
    model = open_vlm(vlm_folder("llava"))
    assert model.towers == ()
    assert "model.multi_modal_projector.linear_1.weight" in model.outside


def test_pixels_are_given_back_and_made_ahead(vlm_folder: VlmFolder, pictures: Path) -> None:
    model = open_vlm(vlm_folder("qwen3_vl"))
    samples = read_samples(pictures, "Describe it.")
    made: list[int] = []

    class Noted(Preparation):
        def inputs(self, sample: Any) -> Any:
            made.append(samples.index(sample))
            return super().inputs(sample)

    inputs = ImageInputs(samples, Noted(model))
    first = inputs[0]
    inputs[1]
    assert made == [0, 1, 2]
    taken: list[Any] = []

    class Kept(ImageInputs):
        def __getitem__(self, index: Any) -> Any:
            taken.append(super().__getitem__(index))
            return taken[-1]

    stream(model, Kept(samples, Preparation(model)))
    for inputs_left in taken:
        pixels = inputs_left["pixel_values"]
        assert pixels.untyped_storage().nbytes() <= 4
        assert bool(pixels.isnan().all())
        assert pixels.shape[0] > 1
    assert not bool(first["pixel_values"].isnan().any())


def test_the_processor_is_loaded_once(
    vlm_folder: VlmFolder,
    pictures: Path,
    quantize: Quantize,
    rules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from slim_vlm import preparation

    opened: list[Path] = []

    def counted(folder: Path, **options: Any) -> Any:
        opened.append(folder)
        return open_processor(folder, **options)

    monkeypatch.setattr(preparation, "open_processor", counted)
    folder = vlm_folder("llava")
    quantize(folder, tmp_path / "out", process=[{"type": "quarot", "block_size": 16}, rules["static"]])
    assert opened == [folder]
    request = EvalRequest(model_path=folder, quantized=tmp_path / "out", dataset=str(pictures), device="cpu")
    VlmService().evaluate(request, SilentProgress())
    assert opened == [folder] * 2

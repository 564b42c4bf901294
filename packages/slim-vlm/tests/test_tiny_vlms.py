"""The tiny models are what they say: real processors, real classes, tensors named as in published checkpoints."""

from __future__ import annotations

import filecmp
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText

from slim_vlm.processor import open_processor

CLASSES = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen3_5ForConditionalGeneration"),
    "glm4v": ("Glm4vProcessor", "Glm4vForConditionalGeneration"),
    "glm4v_moe": ("Glm4vProcessor", "Glm4vMoeForConditionalGeneration"),
    "glm46v": ("Glm46VProcessor", "Glm46VForConditionalGeneration"),
    "internvl": ("InternVLProcessor", "InternVLForConditionalGeneration"),
    "gemma3": ("Gemma3Processor", "Gemma3ForConditionalGeneration"),
    "llava": ("LlavaProcessor", "LlavaForConditionalGeneration"),
    "mistral3": ("PixtralProcessor", "Mistral3ForConditionalGeneration"),
    "idefics3": ("Idefics3Processor", "Idefics3ForConditionalGeneration"),
    "aya_vision": ("AyaVisionProcessor", "AyaVisionForConditionalGeneration"),
}
FAMILIES = sorted(CLASSES)
ALL = sorted([*CLASSES, "kimi_k25"])  # its image processor exists for torchvision only


def names_of(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    return model.eval(), report


def inputs_of(processor: Any, *pictures: Any, text: str = "What is in the picture?") -> Any:
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def logits_of(model: Any, inputs: Any) -> Tensor:
    return model(**inputs).logits.float()


def test_every_family_is_listed(tiny_vlms: ModuleType) -> None:
    assert sorted(tiny_vlms.FAMILIES) == sorted(tiny_vlms.PREFIXES) == ALL


@pytest.mark.parametrize("family", FAMILIES)
def test_processor_and_model_work_together(
    family: str, vlm_folder: Any, tiny_processors: ModuleType, tiny_vlms: ModuleType
) -> None:
    folder = vlm_folder(family)
    processor = open_processor(folder)
    model, _ = load(folder)
    assert (type(processor).__name__, type(model).__name__) == CLASSES[family]
    assert model.dtype == torch.bfloat16
    small, wide = tiny_processors.picture(48, 40), tiny_processors.picture(90, 33)
    config = model.config
    placeholder = getattr(config, "image_token_id", None) or config.image_token_index
    counts: list[int] = []
    for pictures in ((small,), (wide,), (small, wide)):
        inputs = inputs_of(processor, *pictures)
        assert int(inputs["input_ids"].max()) < tiny_vlms.VOCABULARY
        counts.append(int((inputs["input_ids"] == placeholder).sum()))
        logits = logits_of(model, inputs)
        assert logits.shape == (*inputs["input_ids"].shape, tiny_vlms.VOCABULARY)
        assert logits.isfinite().all()
        spread = logits[0].std(0).mean()
        assert spread > 0.1  # not the same for every token
    assert counts[0] > 0
    assert counts[2] == counts[0] + counts[1]
    inputs = inputs_of(processor, small)
    other = inputs_of(processor, tiny_processors.picture(48, 40, seed=1))
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert not torch.allclose(logits_of(model, inputs)[0, -1], logits_of(model, other)[0, -1], atol=0.02)


@pytest.mark.parametrize("family", ALL)
def test_tensors_are_named_as_in_published_checkpoints(family: str, vlm_folder: Any, tiny_vlms: ModuleType) -> None:
    folder = vlm_folder(family)
    names, prefixes = names_of(folder), tiny_vlms.PREFIXES[family]
    assert [name for name in names if not name.startswith(prefixes)] == []
    assert [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)] == []
    _, report = load(folder)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_where_the_template_puts_the_picture(
    family: str, vlm_folder: Any, tiny_processors: ModuleType
) -> None:
    processor = open_processor(vlm_folder(family))
    ids = inputs_of(processor, tiny_processors.picture(48, 40), text="red square")["input_ids"][0]
    text = processor.tokenizer.decode(ids)
    assert text.index("user") < text.index("red square") if family != "mistral3" else text.index("[INST]") == 3
    before = processor.tokenizer("red square", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(ids)) if ids[i : i + len(before)].tolist() == before)
    token = getattr(processor, "image_token_id", None)
    special = {token, *getattr(processor, "image_token_ids", [])}
    if family == "gemma3":
        special.add(tiny_processors.token_id(family, "<image_soft_token>"))
    places = [i for i, value in enumerate(ids.tolist()) if value in special]
    assert places
    assert max(places) < at
    for begin in tiny_processors.PROCESSORS[family].begins:  # once, not by the template and by the tokenizer too
        assert text.count(begin) == 1


def test_kimi_runs_on_patches(vlm_folder: Any) -> None:
    folder = vlm_folder("kimi_k25")
    model, _ = load(folder)
    assert type(model).__name__ == "Kimi_K25ForConditionalGeneration"
    ids = torch.arange(20)[None]
    ids[0, 5:9] = model.config.image_token_id
    patches = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = torch.tensor([[1, 4, 4]])
    one, other = (logits_of(model, {"input_ids": ids, "pixel_values": p, "image_grid_thw": grid}) for p in patches)
    assert one.isfinite().all()
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, -1], other[:, -1], atol=0.02)


def test_axes_of_fused_experts(vlm_folder: Any, tiny_processors: ModuleType) -> None:
    published, resaved = vlm_folder("qwen3_vl_moe"), vlm_folder("qwen3_vl_moe", layout="resaved")
    name = "model.language_model.layers.1.mlp.experts"
    shapes: list[tuple[list[int], list[int]]] = []
    for folder in (published, resaved):
        with safe_open(folder / "model.safetensors", "pt") as file:
            pair = [file.get_slice(f"{name}.{part}").get_shape() for part in ("gate_up_proj", "down_proj")]
        shapes.append((pair[0], pair[1]))
    assert shapes == [([8, 64, 48], [8, 24, 64]), ([8, 48, 64], [8, 64, 24])]
    inputs = inputs_of(open_processor(published), tiny_processors.picture(48, 40))
    one, other = (logits_of(load(folder)[0], inputs) for folder in (published, resaved))
    assert torch.equal(one, other)


def test_deepstack_features_reach_several_text_layers(vlm_folder: Any, tiny_processors: ModuleType) -> None:
    folder = vlm_folder("qwen3_vl_moe")
    model, _ = load(folder, dtype=torch.float32)
    inputs = inputs_of(open_processor(folder), tiny_processors.picture(48, 40))
    assert len(model.model.visual.deepstack_merger_list) == 3
    assert len(model.model.language_model.layers) == 4
    whole = logits_of(model, inputs)
    for merger in model.model.visual.deepstack_merger_list:
        kept = {name: value.clone() for name, value in merger.state_dict().items()}
        with torch.no_grad():
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
        assert not torch.allclose(logits_of(model, inputs), whole, atol=1e-3)
        merger.load_state_dict(kept)


def test_seed_decides_and_global_random_numbers_are_left_alone(tmp_path: Path, tiny_vlms: ModuleType) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    folders = [tiny_vlms.build("llava", tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(torch.rand(3), expected)
    same = [filecmp.cmp(folders[0] / "model.safetensors", folder / "model.safetensors", False) for folder in folders]
    assert same == [True, True, False]


def test_overrides(tmp_path: Path, tiny_vlms: ModuleType) -> None:
    folder = tiny_vlms.build(
        "qwen3_vl", tmp_path, dtype=torch.float16, text_config={"num_hidden_layers": 2}, tie_word_embeddings=True
    )
    model, _ = load(folder)
    assert len(model.model.language_model.layers) == 2
    assert model.dtype == torch.float16
    assert "lm_head.weight" not in names_of(folder)
    with pytest.raises(ValueError, match="flat"):
        tiny_vlms.build("qwen3_vl", tmp_path, layout="flat")


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers(family: str, vlm_folder: Any, tiny_processors: ModuleType) -> None:
    """The largest channel of what text blocks and vision blocks multiply, against the middle one."""

    def ratio(folder: Path) -> tuple[float, float]:
        model, _ = load(folder, dtype=torch.float32)
        seen: dict[str, list[float]] = {"text": [], "vision": []}

        def watch(name: str) -> Any:
            def hook(_: Any, args: tuple[Tensor, ...]) -> None:
                channels = args[0].abs().reshape(-1, args[0].shape[-1]).amax(0)
                seen[name].append(float(channels.max() / channels.median()))

            return hook

        for path, module in model.named_modules():
            if path.endswith((".q_proj", ".qkv", ".query")) and isinstance(module, torch.nn.Linear):
                name = "vision" if "vis" in path else "text"
                module.register_forward_pre_hook(watch(name))
        logits = logits_of(model, inputs_of(open_processor(folder), tiny_processors.picture(48, 40)))
        assert logits.isfinite().all()
        return max(seen["text"]), max(seen["vision"])

    plain, outlying = ratio(vlm_folder(family)), ratio(vlm_folder(family, outliers=True))
    assert outlying[0] > 6 > plain[0]
    assert outlying[1] > 6 > plain[1]

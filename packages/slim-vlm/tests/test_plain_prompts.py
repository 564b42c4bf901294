"""Families that are published without a chat template, or whose processor does not say what it makes of a size."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from slim_core.devices import Devices
from slim_core.errors import InvalidModelError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.calibration import BlockForwards
from slim_core.service import EvalRequest
from slim_vlm.dataset import read_samples
from slim_vlm.inputs import ImageInputs, ImageSamples
from slim_vlm.models import find_towers, open_vlm
from slim_vlm.preparation import Preparation
from slim_vlm.processor import has_template, open_processor
from slim_vlm.service import VlmService

CPU = torch.device("cpu")
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "vocab_size": 448,
    "head_dim": 16,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")
IMAGE = 384 + SPECIAL.index("<image>")
CONFIGS: dict[str, dict[str, Any]] = {
    "paligemma": {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "projection_dim": 64,
        "image_token_index": IMAGE,
        "pad_token_id": 386,
    },
    "idefics2": {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "text_config": {"model_type": "mistral", "pad_token_id": 386, **TEXT},
        "vision_config": {"model_type": "idefics2_vision", **VISION},
        "perceiver_config": {"model_type": "idefics2_perceiver", "resampler_n_latents": 4, "resampler_depth": 2}
        | {"hidden_size": 64, "resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2},
        "image_token_id": IMAGE,
    },
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "paligemma": {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 16}
    | {"size": {"height": 32, "width": 32}, "processor_class": "PaliGemmaProcessor"},
    "idefics2": {"image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": False}
    | {"size": {"shortest_edge": 16, "longest_edge": 32}, "processor_class": "Idefics2Processor"},
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_processors: ModuleType, tiny_vlms: ModuleType) -> Any:
    """A complete folder of each family."""
    made: dict[str, Path] = {}
    for family, config in CONFIGS.items():
        folder = made[family] = tmp_path_factory.mktemp(family) / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": family, "torch_dtype": "bfloat16", **config}))
        with torch.random.fork_rng(devices=[]):
            model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        tiny_vlms._randomize(model, torch.Generator().manual_seed(3))
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = tiny_processors._tokenizer()
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family]))
        if family == "idefics2":
            (folder / "chat_template.jinja").write_text(TEMPLATE)
            (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 4}))
    return made


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_run(
    family: str, folders: Any, pictures: Path, quantize: Callable[..., Any], rules: Any, tmp_path: Path
) -> None:
    """Unit by unit the logits are those of the plain forward; the files pass verify and can be scored."""
    folder = folders[family]
    model = open_vlm(folder)
    samples = read_samples(pictures, "Describe it.")
    assert has_template(open_processor(folder)) == (family == "idefics2")
    inputs = [Preparation(model).inputs(sample) for sample in samples]
    assert all(int((given["input_ids"] == IMAGE).sum()) in (4, 16) for given in inputs)
    assert all("labels" not in given and given["pixel_values"].dtype == torch.bfloat16 for given in inputs)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        expected = [reference(**given).logits for given in inputs]
    with torch.no_grad(), BlockForwards(model, inputs, CPU) as forwards:
        found = [output.logits for output in forwards.run_model()]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    quantize(folder, tmp_path / "out", process=[rules["static"]])
    report = verify_folder(tmp_path / "out", folder, "vllm-ascend")
    assert report.ok
    # The resampler's queries are its own latents, its keys and values see the picture as well.
    warned = [text for text in report.warnings if "cross-attention" in text]
    assert bool(warned) == (family == "idefics2")
    request = EvalRequest(model_path=folder, quantized=tmp_path / "out", dataset=str(pictures), device="cpu")
    score = VlmService().evaluate(request, SilentProgress())
    assert score.ratio is not None
    assert 0.8 < score.ratio < 1.25


def test_tokens_are_counted_where_the_processor_does_not_say(folders: Any, pictures: Path) -> None:
    model = open_vlm(folders["idefics2"])
    samples = ImageSamples("Describe it.", False, model)
    dataset = DatasetConfig(path=str(pictures))
    made = [Preparation(model).inputs(sample) for sample in read_samples(pictures, "Describe it.")]
    assert not hasattr(Preparation(model).processor, "_get_num_multimodal_tokens")
    assert samples.tokens(dataset) == [given["input_ids"].numel() for given in made]


def test_a_prompt_without_template_needs_a_processor_that_places_the_picture(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["idefics2"], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidModelError, match="the model has no chat template, which says where"):
        open_processor(folder)


def test_a_processor_that_does_not_fit_the_model(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["paligemma"], tmp_path / "model")
    settings = PROCESSORS["paligemma"] | {"image_seq_length": 9}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidModelError, match=r"the model's forward fails on a small picture: .*do not match"):
        open_vlm(folder)


def test_a_lone_linear_is_no_tower() -> None:
    """What happens to its input while it runs could not be seen."""
    text = nn.Module()
    text.layers = nn.ModuleList([nn.Linear(4, 4)])
    model = nn.Module()
    model.vision_tower = nn.Sequential(nn.Linear(4, 4))
    model.multi_modal_projector = nn.Linear(4, 4)
    model.language_model = text
    assert find_towers(model, "language_model.layers") == ("vision_tower",)


def test_several_devices_for_an_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slim"):
        assert Devices("cuda", (1,)).only() == torch.device("cuda", 1)
        assert not caplog.messages
        assert Devices("npu" if hasattr(torch, "npu") else "cuda", (2, 3)).only().index == 2
    assert "2 devices given, only the first" in caplog.messages[0]


def test_kimi_reads_its_fused_projections(vlm_folder: Any) -> None:
    """Its vision tower is stored with ``wqkv``, whose pairs of rotated channels lie side by side."""
    folder = vlm_folder("kimi_k25")
    model = open_vlm(folder)
    ids = torch.arange(20)[None]
    ids[0, 5:9] = model.config["image_token_id"]
    patches = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", experts_implementation="eager")
    model.load([name for unit in model.units for name in unit.parameters], CPU)
    with torch.no_grad():
        assert torch.equal(model.module(**inputs).logits, reference.eval()(**inputs).logits)
    tower = next(unit for unit in model.units if unit.name == "model.vision_tower")
    assert "vision_tower.encoder.blocks.0.wqkv.weight" in tower.tensors
    assert not any(info.name.endswith(("q_proj", "k_proj", "v_proj")) for info in tower.linears)
    assert tower.linears


class _Slow:
    """Makes an input when it is told to go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.made: list[Any] = []

    def inputs(self, sample: Any) -> Any:
        self.made.append(sample)
        if len(self.made) > 1:
            self.begun.set()
            self.go.wait(30)
        return {}


def test_what_was_begun_ahead_is_given_up_at_the_end() -> None:
    slow = _Slow()
    inputs: Any = ImageInputs(list(range(5)), slow)  # type: ignore[arg-type]
    assert inputs[0] == {}
    assert slow.begun.wait(30)  # the second is being made, the third waits
    inputs.close()
    slow.go.set()
    inputs._pool.shutdown(wait=True)
    assert slow.made == [0, 1]


def test_forwards_that_end_early_close_their_inputs(folders: Any, pictures: Path) -> None:
    model = open_vlm(folders["paligemma"])
    preparation = Preparation(model)
    inputs = ImageInputs(read_samples(pictures, "Describe it."), preparation)

    def interrupted() -> None:
        with torch.no_grad(), BlockForwards(model, inputs, CPU) as forwards:
            forwards.reach(model.running[0])
            raise KeyboardInterrupt

    inputs[0]
    assert inputs._coming
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not inputs._coming

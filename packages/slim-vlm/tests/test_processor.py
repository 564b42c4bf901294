"""Processors are opened without torchvision as they are with it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from slim_core.errors import UnsupportedError
from slim_vlm.processor import open_processor


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "internvl", "mistral3", "gemma3"])
def test_it_is_the_class_of_the_family(family: str, vlm_folder: Any, tiny_processors: ModuleType) -> None:
    before = {name for name in sys.modules if name.startswith("transformers.models.pixtral")}
    processor = open_processor(vlm_folder(family))
    assert type(processor).__name__ == tiny_processors.PROCESSORS[family].image["processor_class"]
    assert type(processor).__module__.startswith("transformers.models.")
    assert processor.chat_template == tiny_processors.PROCESSORS[family].template
    added = {name for name in sys.modules if name.startswith("transformers.models.pixtral")} - before
    assert "transformers.models.pixtral.image_processing_pixtral" not in added


def test_settings_of_processor_config_are_used(vlm_folder: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(vlm_folder("internvl"), tmp_path / "model")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_seq_length": 7}))
    assert open_processor(folder).image_seq_length == 7


def test_class_follows_from_the_model_type_if_no_file_names_it(vlm_folder: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(vlm_folder("qwen2_vl"), tmp_path / "model")
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        del settings["processor_class"]
        (folder / name).write_text(json.dumps(settings))
    assert type(open_processor(folder)).__name__ == "Qwen2VLProcessor"


def test_image_processor_that_needs_torchvision(vlm_folder: Any) -> None:
    with pytest.raises(UnsupportedError, match="Kimi_K25Processor cannot be loaded without torchvision"):
        open_processor(vlm_folder("kimi_k25"))


def test_kinds_of_tokens_are_made_where_the_model_asks_for_them(
    vlm_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosmos 3 Edge names them among its inputs, and its class does not make them by itself."""
    folder = vlm_folder("qwen2_vl")
    cls = type(open_processor(folder)).__mro__[1]  # without torchvision it is a class made of the family's
    cls = cls if cls.__name__ == "Qwen2VLProcessor" else type(open_processor(folder))
    monkeypatch.setattr(cls, "return_mm_token_type_ids", False)
    processor = open_processor(folder)
    assert "mm_token_type_ids" in processor.model_input_names
    picture = Image.new("RGB", (56, 56))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    kinds, ids = made["mm_token_type_ids"][0], made["input_ids"][0]
    assert kinds.tolist() == (ids == processor.image_token_id).int().tolist()
    assert 0 < kinds.sum() < len(ids)

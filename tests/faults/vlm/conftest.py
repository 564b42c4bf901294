"""The workplace of the other faults with a vision-language model, pictures that a file lists, and a recipe for them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parents[3] / "packages" / "slim-vlm" / "tests"
RECIPE = """\
apiversion: multimodal_vlm_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*"]
  save:
    - type: ascendv1_saver
  dataset: DATASET
  default_text: "What is this?"
"""
RECORDS = (
    {"image": "a.png", "text": "What is this?"},
    {"image": "more/b.jpg", "text": "这是什么？"},
    {"image": "a.png", "text": "Which colours are there?"},
)


CHAT = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def beside(name: str) -> Any:
    """A module of the tests of slim-vlm, which import one another by these names."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TINY / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def good_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("tiny_processors", "tiny_families", "tiny_vlms"):
        beside(name)
    return sys.modules["tiny_vlms"].build("qwen3_vl", tmp_path_factory.mktemp("vlm") / "model")


def with_pictures(base: Any) -> Any:
    """The class of the workplace below, whose base is that of the other faults."""

    class VlmWorkplace(base):
        @property
        def pictures(self) -> Path:
            """The folder of the calibration set."""
            return self.folder / "pictures"

        def list_records(self, *records: object) -> None:
            self.dataset.write_text("".join(json.dumps(record) + "\n" for record in records))

        def break_third(self, record: object) -> None:
            """A set of two good records, and this one."""
            self.list_records(*RECORDS[:2], record)

        def use_template(self, text: str) -> None:
            """Give the model another chat template."""
            (self.model / "chat_template.json").write_text(json.dumps({"chat_template": text}))

        def refuse_prompts_with(self, word: str) -> None:
            """Let the chat template take no prompt with this word."""
            prompt = "messages[0]['content'][1]['text']"
            self.use_template(f"{{% if '{word}' in {prompt} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{CHAT}")

        def become_text_model(self) -> None:
            """Put a language model in the place of the vision-language model."""
            import transformers

            shutil.rmtree(self.model)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
            config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=448)
            transformers.Qwen3ForCausalLM(config).save_pretrained(self.model)

    return VlmWorkplace


@pytest.fixture
def workplace(workplace, good_vlm: Path):
    place = with_pictures(type(workplace))(workplace.folder, workplace.patch, cleanup=workplace.cleanup)
    shutil.rmtree(place.model)
    shutil.copytree(good_vlm, place.model)
    place.dataset.unlink()
    (place.pictures / "more").mkdir(parents=True)
    picture = sys.modules["tiny_processors"].picture
    picture(48, 40).save(place.pictures / "a.png")
    picture(60, 33).save(place.pictures / "more" / "b.jpg")
    picture(20, 20).save(place.folder / "outside.png")
    place.dataset = place.pictures / "index.jsonl"
    place.list_records(*RECORDS)
    place.recipe.write_text(RECIPE.replace("DATASET", str(place.pictures)))
    return place

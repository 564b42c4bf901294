"""Tiny vision-language models, each made once."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _beside(name: str) -> ModuleType:
    """A module in this folder, which is no package; those beside it import it by this name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny_processors() -> ModuleType:
    """``tiny_processors.py`` in this folder."""
    return _beside("tiny_processors")


@pytest.fixture(scope="session")
def tiny_vlms(tiny_processors: ModuleType) -> ModuleType:
    """``tiny_vlms.py`` in this folder."""
    _beside("tiny_families")
    return _beside("tiny_vlms")


VlmFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_vlms: ModuleType) -> VlmFolder:
    """``vlm_folder(family, **options)``: the folder of a tiny model, only to be read; options are those of build."""
    made: dict[str, Path] = {}

    def folder(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = tiny_vlms.build(family, tmp_path_factory.mktemp(family) / "model", **options)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def naive() -> ModuleType:
    """The independent reader of written folders that slim-llm's tests have."""
    path = Path(__file__).parents[2] / "slim-llm" / "tests" / "naive.py"
    spec = importlib.util.spec_from_file_location("naive_reader", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["naive_reader"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, tiny_processors: ModuleType) -> Path:
    """A set of three pictures of different sizes, with prompts and answers."""
    folder = tmp_path_factory.mktemp("pictures")
    lines: list[str] = []
    for number, (width, height) in enumerate([(40, 56), (96, 32), (64, 64)]):
        tiny_processors.picture(width, height, number).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "text": f"What is it, number {number}?", "answer": "A few colours in a row."}
        lines.append(json.dumps(line))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
DYNAMIC = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}


@pytest.fixture(scope="session")
def rules() -> dict[str, Any]:
    """Processors: everything but experts static, experts dynamic, everything dynamic."""
    return {
        "static": {
            "type": "linear_quant",
            "qconfig": {"act": STATIC, "weight": WEIGHT},
            "exclude": ["*experts*"],
        },
        "experts": {
            "type": "linear_quant",
            "qconfig": {"act": DYNAMIC, "weight": WEIGHT},
            "include": ["*experts*"],
        },
        "dynamic": {"type": "linear_quant", "qconfig": {"act": DYNAMIC, "weight": WEIGHT}},
    }


@pytest.fixture
def quantize(pictures: Path) -> Callable[..., Any]:
    """``quantize(model, target, process=[...], **spec)``: run a recipe through the service; gives its outcome."""
    from slim_core.progress import SilentProgress
    from slim_core.recipe import recipe_from_dict
    from slim_core.service import QuantRequest
    from slim_vlm.service import VlmService

    def run(model: Path, target: Path, *, process: list[Any], options: Any = None, **spec: Any) -> Any:
        request = QuantRequest(
            model_path=model, save_path=target, model_type="tiny", force=True, **{"device": "cpu", **(options or {})}
        )
        spec = {"dataset": str(pictures), **spec, "process": process}
        recipe = recipe_from_dict({"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec})
        return VlmService().quantize(request, recipe, SilentProgress())

    return run

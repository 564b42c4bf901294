"""The service: how it is found, which folders and names it claims, and that it does what it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slim_core.dispatch import service_for
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import EvalRequest, QuantRequest, find_service
from slim_llm.service import LlmService
from slim_vlm.recipe import SpecVlm
from slim_vlm.service import VlmService

TEXT_MODEL = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
SPEC = {"process": [{"type": "linear_quant", "qconfig": {"act": {"scope": "per_token"}, "weight": {}}}]}


def test_it_is_found_by_its_apiversion() -> None:
    service = find_service("multimodal_vlm_modelslim_v1")
    assert isinstance(service, VlmService)
    assert service.apiversion == "multimodal_vlm_modelslim_v1"
    assert service.spec_type() is SpecVlm


def test_finding_it_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from slim_core.service import find_service\n"
        "service = find_service('multimodal_vlm_modelslim_v1')\n"
        "service.practice_folders(), service.pedigree('Qwen3-VL-30B-A3B-Instruct')\n"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "llava"])
def test_it_scores_vision_language_models(family: str, images: bool, vlm_folder: Any) -> None:
    assert VlmService().handles(vlm_folder(family), images=images)
    assert isinstance(service_for(vlm_folder(family), images=images), VlmService)


def test_it_leaves_text_models_alone() -> None:
    assert not VlmService().handles(TEXT_MODEL)
    assert not VlmService().handles(TEXT_MODEL, images=True)
    assert isinstance(service_for(TEXT_MODEL), LlmService)
    with pytest.raises(UnsupportedError, match=r"can score this kind of model on images \(score language models with"):
        service_for(TEXT_MODEL, images=True)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"there is no config\.json"):
        VlmService().handles(tmp_path)


def test_pedigrees() -> None:
    service = VlmService()
    assert service.pedigree("Qwen3-VL-30B-A3B-Instruct") == "qwen3_vl_moe"
    assert service.pedigree("Qwen3-8B") is None
    assert service.pedigree("qwen3-vl-30b-a3b-instruct") is None  # names are case-sensitive
    [folder] = service.practice_folders()
    assert (folder / "default").is_dir()


def test_it_plans_quantizes_and_scores(vlm_folder: Any, tiny_processors: Any, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    tiny_processors.picture(40, 40).save(pictures / "a.png")
    (pictures / "index.json").write_text(json.dumps({"image": "a.png", "answer": "A picture."}))
    model, out = vlm_folder("qwen3_vl"), tmp_path / "out"
    recipe = recipe_from_dict({"apiversion": "multimodal_vlm_modelslim_v1", "spec": {**SPEC, "runner": "auto"}})
    request = QuantRequest(model_path=model, save_path=out, model_type="any", device="cpu")
    service = VlmService()
    plan = service.plan(request, recipe)
    assert not out.exists()
    assert plan.runner.name == "layer_wise"
    assert plan.warnings[0].startswith("<recipe>: spec.runner: 'auto' becomes 'layer_wise'")
    shown: list[Any] = []
    result = service.quantize(request, recipe, SilentProgress(), shown.append)
    assert [one.assignments.keys() for one in shown] == [plan.assignments.keys()]
    assert {record.kind for record in result.linears} == {"W8A8_DYNAMIC"}
    asked = EvalRequest(model_path=model, quantized=out, dataset=str(pictures), device="cpu")
    scores = service.evaluate(asked, SilentProgress())
    assert scores.quantized_perplexity is not None
    assert scores.ratio == pytest.approx(1, abs=0.2)

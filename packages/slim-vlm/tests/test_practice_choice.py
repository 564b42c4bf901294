"""How a vision-language model comes to its practice: by name, by tags, or by what its folder holds; and what those
practices do that are for any model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from slim_core.dispatch import choose_recipe, match_practice, open_library
from slim_core.evaluation.verify import verify_folder
from slim_core.practices import PracticeLibrary
from slim_core.practices.registry import load_registry
from slim_core.progress import SilentProgress
from slim_core.recipe import load_recipe
from slim_core.runners.plan import Plan
from slim_core.service import QuantRequest
from slim_llm.resources import REGISTRY as TEXT_REGISTRY
from slim_llm.service import LlmService
from slim_vlm.recipe import SpecVlm
from slim_vlm.resources import PRACTICE_FOLDER, REGISTRY
from slim_vlm.service import VlmService

ROOT = Path(__file__).parents[3]
LAB = ROOT / "lab_practice"
DOCUMENTATION = ROOT / "docs" / "models.md"
API = "multimodal_vlm_modelslim_v1"
DEFAULTS = sorted(LAB.glob("default/default_vlm_*.yaml"))
FALLBACK_FAMILIES = ["aya_vision", "gemma3", "glm4v", "glm4v_moe", "idefics3", "internvl", "llava", "mistral3"]
FALLBACK_FAMILIES += ["qwen2_5_vl", "qwen3_5", "qwen3_vl_moe"]
# Quantization types that each family must have.
TYPES = {
    "glm4_1v": {"w8a8", "w8a16"},
    "glm4_6v": {"w8a8", "w4a8"},
    "internvl3_5": {"w8a8", "w8a16"},
    "internvl3_5_moe": {"w8a8", "w4a8"},
    "qwen2_5_vl": {"w8a8", "w8a16"},
    "qwen2_vl": {"w8a8", "w8a16"},
    "qwen3_vl": {"w8a8", "w8a16"},
    "qwen3_vl_embedding": {"w8a8"},
    "qwen3_vl_moe": {"w8a8", "w4a8"},
}
MICROSCALING = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")

Folder = Callable[..., Path]


def test_every_registered_model_type_reaches_its_practices_without_a_question() -> None:
    library, registry = PracticeLibrary([PRACTICE_FOLDER]), load_registry(REGISTRY)
    assert set(registry.values()) == set(TYPES)
    listed: dict[str, set[str]] = {}
    for practice in library.list():
        if practice.recipe.apiversion == API and practice.pedigree != "default":
            models = {*practice.metadata.verified_model_types, *practice.metadata.verified_tags}
            listed.setdefault(practice.pedigree, set()).update(models)
    assert listed == {family: {n for n, place in registry.items() if place == family} for family in TYPES}
    for name, family in registry.items():
        for quant_type in TYPES[family]:
            selection = library.select(family, name, quant_type)
            assert selection.question is None
            assert selection.practice.recipe.apiversion == API
            assert selection.practice.quant_type == quant_type
            assert "mxfp8" not in selection.practice.config_id
    assert library.warnings == []


def test_no_name_belongs_to_two_services() -> None:
    assert not set(load_registry(TEXT_REGISTRY)) & set(load_registry(REGISTRY))


@pytest.mark.parametrize("family", MICROSCALING)
def test_tags_choose_among_devices(family: str) -> None:
    library = PracticeLibrary([PRACTICE_FOLDER])
    for name in (name for name, place in load_registry(REGISTRY).items() if place == family):
        for tags in (["atlas_350"], ["Atlas_350", "vLLM_Ascend"]):
            selection = library.select(family, name, "w8a8", tags)
            assert (selection.practice.config_id, selection.question) == (f"{family}_w8a8_mxfp8", None)
        for tags in (["vLLM_Ascend"], ["Atlas_A2_Inference"], ["vllm_ascend", "atlas_a3_inference"]):
            selection = library.select(family, name, "w8a8", tags)
            assert re.fullmatch(rf"{family}(_tied)?_w8a8", selection.practice.config_id)
            assert selection.question is None
        assert "not verified with MindIE" in (library.select(family, name, "w8a8", ["MindIE"]).question or "")


@pytest.mark.parametrize("tied", ["Qwen3-VL-4B-Instruct", "Qwen2.5-VL-3B-Instruct", "Qwen2-VL-2B", "InternVL3_5-2B-HF"])
def test_a_size_that_shares_its_head_is_not_rotated(tied: str) -> None:
    selection = PracticeLibrary([PRACTICE_FOLDER]).select(load_registry(REGISTRY)[tied], tied, "w8a8")
    assert all(processor.type != "quarot" for processor in selection.practice.recipe.spec(SpecVlm).process)


def test_the_installed_services_list_each_practice_once() -> None:
    """In a checkout, both bring the same folder."""
    ids = [practice.config_id for practice in open_library().list()]
    assert len(ids) == len(set(ids)) == len(list(LAB.glob("*/*.yaml")))
    assert "qwen3_vl_moe_w8a8" in ids


@pytest.mark.parametrize(
    ("model_type", "config_id"),
    [
        ("Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe_w8a8"),
        ("Qwen3-VL-235B-A22B", "qwen3_vl_moe_w8a8"),
        ("Qwen2.5-VL-7B-Instruct", "qwen2_5_vl_w8a8"),
        ("GLM-4.6V", "glm4_6v_w8a8"),
        ("InternVL3_5-241B-A28B", "internvl3_5_moe_w8a8"),
        ("Some-VL-7B", "default-w8a8"),  # no folder says what it is
    ],
)
def test_a_name_alone(model_type: str, config_id: str) -> None:
    selection = match_practice(model_type, "w8a8")
    assert selection.practice.config_id == config_id
    assert (selection.question is None) == (config_id != "default-w8a8")


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


def test_a_type_instead_of_a_recipe(vlm_folder: Folder, tmp_path: Path) -> None:
    """The practice is found by name, and the set of images that comes with it is there."""
    model = vlm_folder("qwen3_vl_moe")
    name = "Qwen3-VL-30B-A3B-Instruct"
    request = QuantRequest(
        model_path=model, save_path=tmp_path / "out", model_type=name, quant_type="w8a8", device="cpu"
    )
    recipe, service = choose_recipe(request, never)
    assert recipe.metadata.config_id == "qwen3_vl_moe_w8a8"
    assert isinstance(service, VlmService)
    plan = service.plan(request, recipe)
    assert plan.warnings == []


@pytest.mark.parametrize("quant_type", ["w8a8", "w8a16"])
def test_an_unknown_name_gets_the_fallback_that_takes_its_folder(
    vlm_folder: Folder, tmp_path: Path, quant_type: str
) -> None:
    cases = {
        vlm_folder("internvl"): (f"default_vlm_{quant_type}", VlmService, "fits any vision-language model"),
        # transformers has these as language models too, and so has what was chosen before there was a choice.
        vlm_folder("gemma3"): (f"default-{quant_type}", LlmService, "fits any model"),
        ROOT / "examples" / "tiny-qwen3": (f"default-{quant_type}", LlmService, "fits any model"),
        # What is no model is for the run to complain of.
        tmp_path: (f"default-{quant_type}", LlmService, "fits any model"),
    }
    for model, (config_id, kind, said) in cases.items():
        asked: list[str] = []
        request = QuantRequest(
            model_path=model, save_path=tmp_path / "out", model_type="My-Tune", quant_type=quant_type, device="cpu"
        )
        recipe, service = choose_recipe(request, lambda question, asked=asked: asked.append(question) or True)
        assert (recipe.metadata.config_id, type(service)) == (config_id, kind)
        assert asked == [
            f"The {quant_type} practice {config_id!r} {said} but was not made for My-Tune. Quantize with {config_id!r}?"
        ]


@pytest.mark.parametrize(
    ("family", "path"),
    [
        pytest.param(
            family,
            path,
            # The other one takes the same linears.
            marks=() if path.stem.endswith("w8a8") or family in ("internvl", "qwen3_vl_moe") else pytest.mark.slow,
            id=f"{family}-{path.stem}",
        )
        for family in FALLBACK_FAMILIES
        for path in DEFAULTS
    ],
)
def test_the_fallback_quantizes_the_text_of_any_family(
    path: Path, family: str, vlm_folder: Folder, tmp_path: Path
) -> None:
    model, output = vlm_folder(family), tmp_path / "out"
    plans: list[Plan] = []
    request = QuantRequest(model_path=model, save_path=output, model_type="My-Tune", device="cpu")
    VlmService().quantize(request, load_recipe(path), SilentProgress(), plans.append)
    (plan,) = plans
    kind = "W8A16" if path.stem.endswith("w8a16") else "W8A8_DYNAMIC"
    linears = {linear.prefix: linear for unit in plan.model.units for linear in unit.linears}
    description = json.loads((output / "quant_model_description.json").read_text("utf-8"))
    blocks = [unit for unit in plan.model.units if unit.block is not None]
    text = {linear.prefix for unit in blocks for linear in unit.linears}
    assert text
    assert {name: description[f"{name}.weight"] for name in linears} == {
        name: kind if name in text else "FLOAT" for name in linears
    }
    engine = "mindie-llm" if kind == "W8A16" and any(".experts." in name for name in text) else "vllm-ascend"
    result = verify_folder(output, model, engine)
    assert result.ok, result.problems
    assert [warning for warning in plan.warnings if "W8A16 experts" not in warning] == []


def test_the_table_in_the_documentation() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (w[^|]+) \| [^|]+ \|$", DOCUMENTATION.read_text("utf-8"), re.M)
    assert {family: set(types.split(", ")) for family, _, types in rows} == TYPES

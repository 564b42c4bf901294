"""Old recipes run: every kind on a tiny model, with the layers that v0 made, one warning, the v1 text beside them."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slim_core.dispatch import choose_recipe, service_for
from slim_core.errors import InvalidDatasetError, SchemaValidateError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import Recipe, dump_recipe, load_recipe, plugin_names, recipe_from_dict
from slim_core.runners.run import RunResult
from slim_core.service import EvalRequest, Migrator, QuantRequest, find_service
from slim_llm.service import LlmService
from slim_llm.v0.service import LegacyService

HERE = Path(__file__).parent
RECIPES = sorted((HERE / "recipes").glob("*.yaml"))
# Static, sparse by share, sparse with histograms and a pattern, weight-only, mixed, pd_mix with an int8 cache.
ONE_OF_EACH = {
    *("qwen2-7b-w8a8", "qwen2.5-coder-7b-w8a8s", "qwen3-14b-w8a8s", "qwen1.5-110b-w8a16", "qwen3-30b-a3b-w8a8"),
    "qwen2.5-72b-w8a8c8-pdmix",
}
ModelFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def workplace(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where every calibration set that the recipes name is the one of the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("slim"), "propagate", True)
    names = ("boolq", "calib_prompt", "cn_en", "humaneval_x", "mix_calib", "pdmix_anti_prompt", "pdmix_calib_prompt")
    for name in names:
        (tmp_path / f"{name}.jsonl").symlink_to(dataset)
    return tmp_path


def request(model: Path, out: Path, **options: Any) -> QuantRequest:
    return QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True, **options)


def run(model: Path, out: Path, recipe: Recipe) -> RunResult:
    return find_service(recipe.apiversion).quantize(request(model, out), recipe, SilentProgress())


def deprecations(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]


def reduced(path: Path) -> tuple[Recipe, list[str]]:
    """A recipe without the parts whose processors are not installed, and the names of these."""
    recipe = load_recipe(path)
    wanted = [one["type"] for one in LegacyService().migrate(recipe).recipe.raw_spec["process"]]
    missing = [name for name in wanted if name not in plugin_names("slim.processors")]
    data = yaml.safe_load(path.read_text("utf-8"))
    if any("smooth" in name or name == "awq" for name in missing):
        del data["spec"]["anti_cfg"]
    if "dynamic_cache" in missing:
        del data["spec"]["calib_cfg"]["use_kvcache_quant"]
    return (recipe_from_dict(data, where=str(path)) if missing else recipe), missing


def expected(name: str, spec: dict[str, Any]) -> str:
    """The type of a linear, by the rules of v0, straight from the recipe."""
    calib, params = spec["calib_cfg"], spec.get("calib_params", {})
    base = "W8A16" if calib["a_bit"] == 16 else "W8A8S" if calib["w_bit"] == 4 else "W8A8"
    base = "W8A8_MIX" if calib.get("pdmix") else base
    mixed = {"w8a8": "W8A8", "w8a8_dynamic": "W8A8_DYNAMIC", "float": "FLOAT"}
    mix = params.get("mix_cfg", {})
    if name == "lm_head" or name in calib.get("disable_names", []):
        return "FLOAT"
    if name in mix:
        return mixed[mix[name]]
    return next((mixed[value] for key, value in mix.items() if fnmatch.fnmatchcase(name, key)), base)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in ONE_OF_EACH else [pytest.mark.slow])
        for path in RECIPES
    ],
)
def test_every_kind_of_recipe_runs(
    model_folder: ModelFolder, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, out = model_folder("qwen3"), tmp_path / "out"
    recipe, missing = reduced(path)
    if missing:
        with pytest.raises(SchemaValidateError, match=f"no installed package provides the processor '{missing[0]}'"):
            run(model, out, load_recipe(path))
        caplog.clear()
    result = run(model, out, recipe)
    spec = yaml.safe_load(path.read_text("utf-8"))["spec"]
    parts = [*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down"))]
    names = ["lm_head", *(f"model.layers.{i}.{part}" for i in range(3) for part in parts)]
    wanted = {name: expected(name, spec) for name in names}
    assert {record.name: record.kind for record in result.linears} == {
        name: kind for name, kind in wanted.items() if kind != "FLOAT"
    }
    described = json.loads((out / "quant_model_description.json").read_text())
    assert {name: described[f"{name}.weight"] for name in names} == wanted
    if recipe.raw_spec["calib_cfg"].get("use_kvcache_quant"):
        assert described["model.layers.0.self_attn.k_proj.kv_cache_scale"] == "C8"
        assert described["kv_cache_type"] == "C8"
    files = sorted(file.name for file in out.glob("*.safetensors"))
    one_file = "calib_save_params" not in spec
    assert files == [
        "quant_model_weights.safetensors" if one_file else "quant_model_weights-00001-of-00001.safetensors"
    ]
    assert len(deprecations(caplog)) == 1
    assert deprecations(caplog)[0].startswith(f"{path}: modelslim_v0 is deprecated")
    migration = LegacyService().migrate(recipe)
    assert (out / "tiny_best_practice.yaml").read_text() == dump_recipe(migration.recipe)
    assert result.warnings[: len(migration.approximations)] == list(migration.approximations)
    assert not [text for text in result.warnings if "lm_head" in text or "first wins" in text or "expert" in text]
    # One recipe keeps a gate_proj and not its up_proj, which engines fuse; that is the recipe's own doing.
    assert [problem for problem in verify_folder(out, model).problems if "engines fuse" not in problem] == []


@pytest.mark.parametrize("name", [pytest.param("qwen2-72b-w8a8c8", marks=pytest.mark.slow), "qwen3-30b-a3b-w8a8"])
def test_the_migrated_recipe_writes_the_same(model_folder: ModelFolder, tmp_path: Path, name: str) -> None:
    recipe, _ = reduced(HERE / "recipes" / f"{name}.yaml")
    model = model_folder("qwen2")
    run(model, tmp_path / "old", recipe)
    (tmp_path / "new.yaml").write_text(LegacyService().migrate(recipe).text(), "utf-8")
    run(model, tmp_path / "new", load_recipe(tmp_path / "new.yaml"))
    old, new = (
        {file.name: file.read_bytes() for file in (tmp_path / side).iterdir() if not file.name.startswith("report.")}
        for side in ("old", "new")
    )
    assert old == new


SPEC: dict[str, Any] = {
    "calib_cfg": {
        "a_bit": 16,
        "mm_tensor": False,
        "disable_names": ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.7.mlp.down_proj", "typo"],
    },
    "calib_params": {"disable_level": "L3"},
    "batch_size": 8,
}


def old_recipe(**spec: Any) -> Recipe:
    return recipe_from_dict({"apiversion": "modelslim_v0", "spec": {**SPEC, **spec}}, where="old.yaml")


def test_the_plan_has_the_approximations_and_the_names_that_are_missing(
    model_folder: ModelFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = LegacyService().plan(request(model_folder("qwen2"), tmp_path / "out"), old_recipe())
    assert plan.warnings[0].startswith("spec.calib_params.disable_level: L3 kept the 3 most sensitive linears")
    assert plan.warnings[1] == (
        "spec.calib_cfg.disable_names: 2 of 4 names are no linears of this model, e.g. model.layers.7.mlp.down_proj"
    )
    assert plan.counts() == {"W8A16": 20, "FLOAT": 2}
    (notice,) = deprecations(caplog)
    assert "fields without effect: spec.batch_size; " in notice


def test_names_of_smoothing_are_looked_up_too(model_folder: ModelFolder, tmp_path: Path) -> None:
    from slim_llm.v0.service import _remarks  # the processors themselves may not be installed

    plan = LegacyService().plan(request(model_folder("qwen2"), tmp_path / "out"), old_recipe())
    names = ["model.layers.0.self_attn.o_proj", "model.layers.9.self_attn.o_proj"]
    recipe = old_recipe(anti_cfg={"anti_method": "m6", "disable_anti_names": names}, calib_dataset="x")
    found = _remarks(recipe, LegacyService().migrate(recipe))(plan)
    assert found[-1] == f"spec.anti_cfg.disable_anti_names: 1 of 2 names are no linears of this model, e.g. {names[1]}"


def test_a_missing_calibration_set_is_told_by_the_old_name(model_folder: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("apiversion: modelslim_v0\nspec:\n  calib_cfg: {mm_tensor: false}\n  calib_dataset: no.jsonl\n")
    recipe = load_recipe(path)
    given = request(model_folder("qwen2"), tmp_path / "out")
    for ask in (
        lambda: LegacyService().plan(given, recipe),
        lambda: LegacyService().quantize(given, recipe, SilentProgress()),
    ):
        with pytest.raises(InvalidDatasetError) as caught:
            ask()
        assert caught.value.where == f"{path}:4: spec.calib_dataset"
        assert caught.value.what == "there is no calibration set 'no.jsonl'"
    (tmp_path / "no.jsonl").write_text("{\n")
    with pytest.raises(InvalidDatasetError, match=r"no.jsonl:1: not valid JSON"):
        LegacyService().plan(given, recipe)


def test_an_error_of_the_new_recipe_names_the_old_one(tmp_path: Path) -> None:
    """What the new protocol refuses is told of the recipe that the user has."""
    recipe = old_recipe(calib_cfg={"mm_tensor": False}, calib_dataset="x" * 5000)
    with pytest.raises(SchemaValidateError) as caught:
        LegacyService().plan(request(tmp_path, tmp_path / "out"), recipe)
    assert str(caught.value).startswith("old.yaml as modelslim_v1: spec.dataset: got ")


def test_a_practice_may_be_an_old_recipe(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``w8a8s`` is found by its label, whatever ``calib_cfg.w_bit`` says."""
    folder = tmp_path / "practices" / "qwen3"
    folder.mkdir(parents=True)
    data = yaml.safe_load((HERE / "recipes" / "qwen3-32b-w8a8s.yaml").read_text("utf-8"))
    data["metadata"] |= {"score": 1000, "verified_model_types": ["Qwen3-32B"]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    monkeypatch.setenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", str(tmp_path / "practices"))
    given = request(model_folder("qwen3"), tmp_path / "out").model_copy(
        update={"model_type": "Qwen3-32B", "quant_type": "w8a8s"}
    )
    recipe, service = choose_recipe(given, lambda question: pytest.fail(question))
    assert isinstance(service, LegacyService)
    assert recipe.document.path == folder / "mine.yaml"
    result = service.quantize(given, recipe, SilentProgress())
    assert {record.kind for record in result.linears} == {"W8A8S"}
    assert deprecations(caplog)[0].startswith(f"{folder / 'mine.yaml'}: ")


def test_it_serves_its_protocol_and_claims_nothing_else(model_folder: ModelFolder) -> None:
    service = find_service("modelslim_v0")
    assert isinstance(service, LegacyService)
    assert isinstance(service, Migrator)
    assert not isinstance(LlmService(), Migrator)
    assert service.practice_folders() == []
    assert service.pedigree("Qwen3-32B") is None
    assert isinstance(service_for(model_folder("qwen2")), LlmService)


def test_scores_are_those_of_the_new_service(model_folder: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A generator is a function that returns an iterator. " * 3)
    given = EvalRequest(
        model_path=model_folder("qwen2"), text=tmp_path / "text.txt", device="cpu", sequence_length=16, max_windows=1
    )
    old, new = (service().evaluate(given, SilentProgress()) for service in (LegacyService, LlmService))
    assert old == new
    assert torch.isfinite(torch.tensor(old.perplexity))


@pytest.mark.parametrize(
    ("calib", "kind"),
    [
        ({"w_method": "GPTQ"}, "W8A8"),
        pytest.param({"w_method": "GPTQ", "a_bit": 16, "w_sym": False}, "W8A16", marks=pytest.mark.slow),
        ({"is_dynamic": True, "use_fa_quant": True}, "W8A8_DYNAMIC"),
        ({"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "group_size": 32}, "W4A8_DYNAMIC"),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, "W4A4_DYNAMIC"),
        pytest.param({"w_bit": 4, "a_bit": 16}, "W4A16", marks=pytest.mark.slow),
    ],
)
def test_kinds_that_no_practice_had_run_too(
    model_folder: ModelFolder, tmp_path: Path, calib: dict[str, Any], kind: str
) -> None:
    recipe = old_recipe(
        calib_cfg={"mm_tensor": False, "disable_names": [f"model.layers.{i}.mlp.down_proj" for i in range(3)], **calib},
        calib_dataset="boolq.jsonl",
    )
    result = run(model_folder("qwen3"), tmp_path / "out", recipe)
    assert [record.kind for record in result.linears] == [kind] * 18
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert described["model_quant_type"] == kind
    assert ("fa_quant_type" in described) == bool(calib.get("use_fa_quant"))

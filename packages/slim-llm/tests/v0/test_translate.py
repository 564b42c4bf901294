"""Whole recipes: one of every kind against its golden translation; what is approximated, dropped or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slim_core.errors import SchemaValidateError
from slim_core.migration import Migration
from slim_core.recipe import Recipe, SpecV1, load_recipe, plugin_names, recipe_from_dict
from slim_llm.v0.translate import migrate

HERE = Path(__file__).parent
RECIPES = sorted((HERE / "recipes").glob("*.yaml"))
RECIPE = pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])


def types_in(recipe: Recipe) -> set[str]:
    return {processor["type"] for processor in recipe.raw_spec["process"]}


@RECIPE
def test_golden(path: Path) -> None:
    """The texts in ``golden`` are what ``slim recipe migrate`` prints."""
    assert migrate(load_recipe(path)).text() == (HERE / "golden" / path.name).read_text("utf-8")


def test_there_is_a_recipe_of_every_kind() -> None:
    assert len(RECIPES) == 22
    assert {path.name for path in RECIPES} == {path.name for path in (HERE / "golden").iterdir()}


@RECIPE
def test_translations_are_recipes(path: Path) -> None:
    """What an installed processor is missing for is refused for that reason alone."""
    migration = migrate(load_recipe(path))
    missing = types_in(migration.recipe) - set(plugin_names("slim.processors"))
    if missing:
        with pytest.raises(SchemaValidateError) as caught:
            migration.recipe.spec()
        said = str(caught.value).splitlines()
        assert len(said) == len(missing)
        assert all("no installed package provides the processor" in line for line in said)
    data = yaml.safe_load(migration.text())
    data["spec"]["process"] = [one for one in data["spec"]["process"] if one["type"] not in missing]
    assert isinstance(recipe_from_dict(data).spec(), SpecV1)


@RECIPE
def test_the_text_is_the_recipe(path: Path, tmp_path: Path) -> None:
    """Reading the text again gives the very recipe, and its label is that of the old one."""
    migration = migrate(load_recipe(path))
    written = tmp_path / "new.yaml"
    written.write_text(migration.text(), "utf-8")
    again = load_recipe(written)
    assert again == migration.recipe
    assert again.metadata == load_recipe(path).metadata
    assert again.apiversion == "modelslim_v1"


def translated(calib: dict[str, Any] | None = None, **spec: Any) -> Migration:
    body = {"calib_cfg": {"mm_tensor": False, **(calib or {})}, "calib_dataset": "set.jsonl", **spec}
    return migrate(recipe_from_dict({"apiversion": "modelslim_v0", "spec": body}))


LOWBIT = {"w_bit": 4, "is_lowbit": True}
GROUPS = {**LOWBIT, "open_outlier": False}
SMOOTH = {"anti_cfg": {"anti_method": "m4"}}


@pytest.mark.parametrize(
    ("calib", "spec", "field", "words"),
    [
        ({"act_method": 3}, {}, "calib_cfg.act_method", "every layer gets histogram"),
        ({"act_method": 2, "pdmix": True}, {}, "calib_cfg.act_method", "histogram is kept with pdmix"),
        ({"pr": 0.5}, {}, "calib_cfg.pr", "0.5 is taken as 1"),
        ({"disable_last_linear": False}, {}, "calib_cfg.disable_last_linear", "the head stays in floating point"),
        ({"use_kvcache_quant": True}, {}, "calib_cfg.use_kvcache_quant", "after the rotary embedding"),
        ({"is_lowbit": True}, {}, "calib_cfg.is_lowbit", "W8A8 layers are made in the ordinary way"),
        ({**GROUPS}, {}, "calib_cfg.open_outlier", "W8A8S layers always treat outliers apart; false is ignored"),
        ({"co_sparse": True, "is_dynamic": True}, {}, "calib_cfg.is_dynamic", "whose activations are static"),
        ({"pdmix": True, "is_dynamic": True}, {}, "calib_cfg.pdmix", "is_dynamic comes first"),
        (
            {},
            {"calib_params": {"disable_level": "L10"}},
            "calib_params.disable_level",
            "L10 kept the 10 most sensitive",
        ),
        (
            {},
            {**SMOOTH, "anti_dataset": "other.jsonl"},
            "anti_dataset",
            "calibrated on 'set.jsonl', not on 'other.jsonl'",
        ),
    ],
)
def test_approximations_are_told_one_by_one(
    calib: dict[str, Any], spec: dict[str, Any], field: str, words: str
) -> None:
    (said,) = translated(calib, **spec).approximations
    assert said.startswith(f"spec.{field}: ")
    assert words in said


def test_one_scale_per_weight_tensor_is_not_kept() -> None:
    def said(**calib: Any) -> tuple[str, ...]:
        data = {"apiversion": "modelslim_v0", "spec": {"calib_cfg": calib, "calib_dataset": "x"}}
        return migrate(recipe_from_dict(data)).approximations

    assert "spec.calib_cfg.mm_tensor: left out, it meant one scale per weight tensor" in said()[0]
    assert "spec.calib_cfg.mm_tensor" in said(a_bit=16)[0]
    assert said(mm_tensor=False) == ()
    assert said(**GROUPS, is_dynamic=True) == ()  # groups have scales of their own


@pytest.mark.parametrize(
    ("calib", "spec", "dropped"),
    [
        ({"dev_type": "npu", "dev_id": 3}, {}, ["calib_cfg.dev_type", "calib_cfg.dev_id"]),
        ({"pr": 1.0}, {}, ["calib_cfg.pr"]),
        ({"use_fa_quant": True, "fa_amp": 5}, {}, ["calib_cfg.fa_amp (no attention falls back to floating point)"]),
        ({"fa_amp": 0}, {}, ["calib_cfg.fa_amp"]),
        ({"kv_sym": True}, {}, ["calib_cfg.kv_sym (use_kvcache_quant is false)"]),
        ({**LOWBIT, "co_sparse": True}, {}, ["calib_cfg.co_sparse (is_lowbit overrides it)"]),
        ({"use_sigma": True}, {}, ["calib_cfg.use_sigma (only is_lowbit with W8A8S layers reads it)"]),
        ({"sigma_factor": 4.0}, {}, ["calib_cfg.sigma_factor (only use_sigma reads it)"]),
        ({"fraction": 0.02}, {}, ["calib_cfg.fraction (only W8A8S layers read it)"]),
        (
            {**LOWBIT, "use_sigma": True, "sigma_factor": 4.0, "fraction": 0.02},
            {},
            ["calib_cfg.fraction (use_sigma overrides it)"],
        ),
        ({"open_outlier": False}, {}, ["calib_cfg.open_outlier (only is_lowbit reads it)"]),
        ({"group_size": 128}, {}, ["calib_cfg.group_size (no weight is in groups)"]),
        ({"percdamp": 0.02}, {}, ["calib_cfg.percdamp (only w_method GPTQ reads it)"]),
        ({"is_dynamic": True, "act_method": 2}, {}, ["calib_cfg.act_method (no linear has static activations)"]),
        ({"is_dynamic": True, "a_bit": 16}, {}, ["calib_cfg.is_dynamic (activations stay in floating point)"]),
        (
            {"co_sparse": True, "w_bit": 8, "a_bit": 16},
            {},
            ["calib_cfg.w_bit (co_sparse sets it to 4)", "calib_cfg.a_bit (co_sparse sets it to 8)"],
        ),
        ({}, {"batch_size": 1}, ["batch_size"]),
        ({}, {"anti_params": {"norm_class_name": "RMSNorm"}}, ["anti_params.norm_class_name"]),
        ({}, {"calib_save_params": {"safetensors_name": "x"}}, ["calib_save_params.safetensors_name"]),
        ({}, {"anti_dataset": "x.jsonl"}, ["anti_dataset (nothing is smoothed)"]),
        # What is written as it is by default, and read.
        ({"w_bit": 8, "a_bit": 8, "w_sym": True, "act_method": 1, "w_method": "MinMax", "co_sparse": False}, {}, []),
        ({"use_kvcache_quant": True, "kv_sym": False}, {}, []),
        ({**GROUPS, "is_dynamic": True, "group_size": 32}, {}, []),
        ({"w_method": "GPTQ", "percdamp": 0.02}, {}, []),
        ({}, {"calib_params": {"disable_level": "L0", "mix_cfg": None}, "anti_dataset": None}, []),
    ],
)
def test_fields_without_effect_are_listed(calib: dict[str, Any], spec: dict[str, Any], dropped: list[str]) -> None:
    assert translated(calib, **spec).dropped == tuple(f"spec.{one}" for one in dropped)


def test_attention() -> None:
    migration = translated({"use_kvcache_quant": True, "kv_sym": False, "use_fa_quant": True})
    _, cache, attention = migration.recipe.raw_spec["process"]
    assert cache == {
        "type": "dynamic_cache",
        "qconfig": {"dtype": "int8", "scope": "per_channel", "symmetric": False, "method": "minmax"},
    }
    assert attention == {
        "type": "fa3_quant",
        "qconfig": {"dtype": "int8", "scope": "per_head", "symmetric": True, "method": "minmax"},
    }


@pytest.mark.parametrize(("given", "written"), [({}, 0), ({"part_file_size": None}, 0), ({"part_file_size": 8}, 8)])
def test_part_file_size(given: dict[str, Any], written: int) -> None:
    spec = translated(calib_save_params=given).recipe.raw_spec
    assert spec["save"] == [{"type": "ascendv1_saver", "part_file_size": written}]


NOTHING = object()


@pytest.mark.parametrize(
    ("calib", "spec", "dataset"),
    [
        ({}, {"calib_dataset": "a.jsonl"}, "a.jsonl"),
        ({"a_bit": 16}, {"calib_dataset": "a.jsonl"}, "a.jsonl"),
        ({"a_bit": 16}, {"calib_dataset": None}, None),
        ({"a_bit": 16}, {"calib_dataset": NOTHING}, None),
        ({"is_dynamic": True}, {"calib_dataset": None}, None),
        ({"is_dynamic": True}, {"calib_dataset": None, "anti_dataset": None}, None),
        ({}, {"calib_dataset": "teacher_qualification.jsonl"}, "teacher_qualification.jsonl"),
        ({}, {"calib_dataset": NOTHING}, "mix_calib.jsonl"),
        ({"is_dynamic": True}, {**SMOOTH, "calib_dataset": None, "anti_dataset": "b.jsonl"}, "b.jsonl"),
        ({"is_dynamic": True}, {**SMOOTH, "calib_dataset": NOTHING}, "mix_calib.jsonl"),
        ({}, {**SMOOTH, "calib_dataset": "a.jsonl", "anti_dataset": "a.jsonl"}, "a.jsonl"),
    ],
)
def test_dataset(calib: dict[str, Any], spec: dict[str, Any], dataset: str | None) -> None:
    spec = {"calib_dataset": "set.jsonl", "calib_cfg": {"mm_tensor": False, **calib}, **spec}
    spec = {key: value for key, value in spec.items() if value is not NOTHING}
    migration = migrate(recipe_from_dict({"apiversion": "modelslim_v0", "spec": spec}))
    assert migration.recipe.raw_spec.get("dataset") == dataset
    substituted = "calib_dataset" not in spec and dataset is not None
    assert [text.split(":")[0] for text in migration.approximations] == ["spec.calib_dataset"] * substituted


@pytest.mark.parametrize(
    ("calib", "spec", "why"),
    [
        ({}, {}, "static activations"),
        (LOWBIT, {}, "static activations"),
        ({"pdmix": True}, {}, "static activations"),
        ({"a_bit": 16, "w_method": "GPTQ"}, {}, "w_method GPTQ"),
        ({"a_bit": 16, "use_kvcache_quant": True}, {}, "use_kvcache_quant"),
        ({"a_bit": 16, "use_fa_quant": True}, {}, "use_fa_quant"),
        ({"is_dynamic": True}, SMOOTH, "smoothing"),
        ({}, SMOOTH, "static activations and smoothing"),
        ({}, {**SMOOTH, "anti_dataset": "b.jsonl"}, "static activations"),
        ({"is_dynamic": True}, {"calib_params": {"mix_cfg": {"*.mlp.*": "w8a8"}}}, "static activations"),
    ],
)
def test_no_data_for_what_needs_data(calib: dict[str, Any], spec: dict[str, Any], why: str) -> None:
    with pytest.raises(SchemaValidateError) as caught:
        translated(calib, **{"calib_dataset": None, **spec})
    assert str(caught.value) == (
        f"<recipe>: spec.calib_dataset: is null, but calibration data is needed for {why} (name a set)"
    )


def test_the_notice_names_file_command_and_dropped_fields(tmp_path: Path) -> None:
    path = tmp_path / "my old.yaml"
    path.write_text("apiversion: modelslim_v0\nspec:\n  batch_size: 2\n  calib_cfg: {mm_tensor: false, pr: 1.0}\n")
    notice = migrate(load_recipe(path)).notice()
    assert notice.startswith(f"{path}: modelslim_v0 is deprecated; the recipe is run as modelslim_v1, ")
    assert f"`slim recipe migrate '{path}'`" in notice
    assert "fields without effect: spec.calib_cfg.pr, spec.batch_size; " in notice
    assert "without weight_scale and weight_offset" in notice
    assert "\n" not in notice


def test_comments_cannot_be_broken_out_of() -> None:
    mix = {"*": "w8a8", "*.x\nspec: {}": "float"}
    text = translated(calib_params={"mix_cfg": mix}).text()
    assert "spec.calib_params.mix_cfg['*.x\\nspec: {}']" in text
    assert yaml.safe_load(text)["spec"]["process"][0]["include"] == ["*"]

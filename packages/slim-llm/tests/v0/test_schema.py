"""Bad v0 recipes are told what is wrong, where, and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slim_core.errors import SchemaValidateError
from slim_core.quantization.kinds import LayerKind
from slim_core.recipe import load_recipe, recipe_from_dict
from slim_llm.v0.schema import CalibConfig, SpecV0
from slim_llm.v0.translate import migrate


def refusal(spec: dict[str, Any]) -> str:
    with pytest.raises(SchemaValidateError) as caught:
        migrate(recipe_from_dict({"apiversion": "modelslim_v0", "spec": spec}, where="old"))
    return str(caught.value)


def test_every_field_has_its_default() -> None:
    spec = recipe_from_dict({"apiversion": "modelslim_v0", "spec": {"anti_cfg": {}}}).spec(SpecV0)
    assert spec.model_dump() == {
        "anti_cfg": {
            "anti_method": "m2",
            "w_bit": 8,
            "a_bit": 8,
            "w_sym": True,
            "disable_anti_names": (),
            "flex_config": None,
            "dev_type": None,
            "dev_id": None,
        },
        "anti_params": {"norm_class_name": None},
        "calib_cfg": {
            "w_bit": 8,
            "a_bit": 8,
            "disable_names": (),
            "disable_last_linear": True,
            "act_method": 1,
            "w_method": "MinMax",
            "w_sym": True,
            "mm_tensor": True,
            "is_dynamic": False,
            "pdmix": False,
            "use_kvcache_quant": False,
            "kv_sym": True,
            "use_fa_quant": False,
            "fa_amp": 0,
            "is_lowbit": False,
            "co_sparse": False,
            "use_sigma": False,
            "sigma_factor": 3.0,
            "fraction": 0.01,
            "do_smooth": False,
            "open_outlier": True,
            "group_size": 64,
            "pr": 1.0,
            "nonuniform": False,
            "percdamp": 0.01,
            "dev_type": None,
            "dev_id": None,
        },
        "calib_params": {"disable_level": "L0", "mix_cfg": None},
        "calib_save_params": {"part_file_size": None, "safetensors_name": None},
        "batch_size": 4,
        "anti_dataset": None,
        "calib_dataset": "teacher_qualification.jsonl",
    }


def test_empty_blocks_are_blocks_of_defaults() -> None:
    keys = ("anti_params", "calib_cfg", "calib_params", "calib_save_params")
    given = {**dict.fromkeys(keys), "anti_cfg": None}
    recipe = recipe_from_dict({"apiversion": "modelslim_v0", "spec": given})
    assert recipe.spec(SpecV0) == SpecV0()


LOWBIT = {"w_bit": 4, "is_lowbit": True, "mm_tensor": False}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("w_bit", 5, "got 5; must be 4 or 8"),
        ("w_bit", True, "got True; must be a number, not true or false"),
        ("a_bit", 6, "got 6; must be 4, 8 or 16"),
        ("a_bit", "eight", "got 'eight'; must be a valid integer"),
        ("disable_names", "lm_head", "got 'lm_head'; must be a list"),
        ("disable_names", [""], "got ''; must have at least 1 character"),
        ("disable_names", ["x" * 201], "a name has at most 200 characters"),
        ("disable_last_linear", "true", "got 'true'; must be true or false, without quotes"),
        ("act_method", 4, "got 4; must be 1, 2 or 3"),
        ("w_method", "minmax", "got 'minmax'; allowed: MinMax, GPTQ, HQQ, NF; did you mean 'MinMax'?"),
        ("w_method", "HQQ", "got 'HQQ'; modelslim_v1 has no such weight method; use MinMax or GPTQ"),
        ("w_method", "NF", "got 'NF'; modelslim_v1 has no such weight method; use MinMax or GPTQ"),
        ("mm_tensor", True, "modelslim_v1 has no weights with one scale per tensor; write false for one per channel"),
        ("nonuniform", True, "got True; modelslim_v1 has no levels at uneven distances; write false"),
        ("sigma_factor", 2.5, "got 2.5; must be greater than or equal to 3"),
        ("sigma_factor", 4.5, "got 4.5; must be less than or equal to 4"),
        ("fraction", 0.2, "got 0.2; must be less than or equal to 0.1"),
        ("fraction", 0.001, "got 0.001; must be greater than or equal to 0.01"),
        ("group_size", 100, "got 100; must be 32, 64, 128 or 256"),
        ("pr", 1.5, "got 1.5; must be less than or equal to 1"),
        ("percdamp", 0, "got 0; must be greater than 0"),
        ("fa_amp", -1, "got -1; must be greater than or equal to 0"),
        ("block_size", 128, "got 128; exists in the Python interface of modelslim_v0 only; remove it"),
        ("simulate_tp", 4, "got 4; exists in the Python interface of modelslim_v0 only; remove it"),
        ("timestep", 10, "got 10; exists in the Python interface of modelslim_v0 only; remove it"),
        ("mm_tensr", False, "unknown field; did you mean 'mm_tensor'? (fields: w_bit, a_bit, disable_names,"),
    ],
)
def test_a_wrong_value_in_calib_cfg(field: str, value: Any, words: str) -> None:
    said = refusal({"calib_cfg": {"mm_tensor": False, field: value}})
    assert said.startswith(f"old: spec.calib_cfg.{field}")
    assert words in said


def test_fields_that_are_always_refused_are_not_suggested() -> None:
    said = refusal({"calib_cfg": {"blocksize": 128}, "calib_params": {"all_tensor": 1}})
    assert "block_size" not in said
    assert "all_tensors" not in said


@pytest.mark.parametrize(
    ("calib", "field", "words"),
    [
        ({"w_sym": False}, "w_sym", "got False; an offset of the weights needs a_bit 16; use true"),
        ({"w_sym": False, "is_dynamic": True}, "w_sym", "an offset of the weights needs a_bit 16"),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True, "w_sym": False}, "w_sym", "an offset of the weights"),
        ({"w_bit": 4}, "w_bit", "got 4; 4 with a_bit 8 needs is_lowbit or co_sparse (W8A8S), or is_dynamic, is_low"),
        ({"w_bit": 4, "is_dynamic": True}, "w_bit", "4 with a_bit 8 needs"),
        ({**LOWBIT, "is_dynamic": True}, "w_bit", "open_outlier: false together (W4A8_DYNAMIC in groups)"),
        ({"w_bit": 4, "a_bit": 4}, "w_bit", "4 with a_bit 4 needs is_dynamic: true, w_method MinMax and w_sym: true"),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True, "w_method": "GPTQ"}, "w_bit", "4 with a_bit 4 needs"),
        ({"a_bit": 4}, "", "8 with a_bit 4 makes no layer; use a_bit 8, or w_bit 4"),
        ({**LOWBIT, "act_method": 3}, "act_method", "got 3; is_lowbit cannot choose a method for each layer; use 1 or"),
        ({"pdmix": True, "a_bit": 16}, "pdmix", "goes with w_bit 8 and a_bit 8 only, not with 8 and 16; use false"),
        ({**LOWBIT, "pdmix": True}, "pdmix", "goes with w_bit 8 and a_bit 8 only, not with 4 and 8; use false"),
        ({**LOWBIT, "w_method": "GPTQ"}, "w_method", "the sparse engines have a method of their own; use MinMax"),
        ({"co_sparse": True, "w_method": "GPTQ"}, "w_method", "the sparse engines have a method of their own"),
        ({"is_lowbit": True, "open_outlier": False}, "open_outlier", "which W8A8 layers do not have; use true"),
        (
            {"is_lowbit": True, "open_outlier": False, "pdmix": True},
            "open_outlier",
            "which W8A8_MIX layers do not have; use true",
        ),
    ],
)
def test_settings_of_calib_cfg_that_exclude_each_other(calib: dict[str, Any], field: str, words: str) -> None:
    said = refusal({"calib_cfg": {"mm_tensor": False, **calib}})
    assert said.startswith(f"old: spec.calib_cfg.{field}: " if field else "old: spec.calib_cfg: ")
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("spec", "where", "words"),
    [
        ({"anti_cfg": {"anti_method": "m7"}}, "anti_cfg.anti_method", "got 'm7'; allowed: m1, m2, m3, m4, m5, m6"),
        ({"anti_cfg": {"a_bit": 16}}, "anti_cfg.a_bit", "got 16; 16 is for anti_method m3 only; use 8"),
        ({"anti_cfg": {"anti_method": "m4", "w_sym": False}}, "anti_cfg.w_sym", "false is for anti_method m3 only"),
        ({"anti_cfg": {"w_bit": 16}}, "anti_cfg.w_bit", "got 16; must be 4 or 8"),
        (
            {"anti_cfg": {"anti_method": "m6", "flex_config": {"alpha": 1.5}}},
            "anti_cfg.flex_config.alpha",
            "less than 1",
        ),
        ({"anti_cfg": {"flex_config": {"gamma": 1}}}, "anti_cfg.flex_config.gamma", "unknown field"),
        ({"anti_cfg": {"disable_names": []}}, "anti_cfg.disable_names", "did you mean 'disable_anti_names'?"),
        ({"anti_params": {"norm_class": "x"}}, "anti_params.norm_class", "did you mean 'norm_class_name'?"),
        ({"calib_params": {"disable_level": "5"}}, "calib_params.disable_level", "must be L and a number, such as L0"),
        ({"calib_params": {"disable_level": 5}}, "calib_params.disable_level", "got 5; must be L and a number"),
        ({"calib_params": {"mix_cfg": {"*": "w4a4"}}}, "calib_params.mix_cfg.*", "allowed: w8a8, w8a16, w8a8_dynamic"),
        ({"calib_params": {"mix_cfg": ["*"]}}, "calib_params.mix_cfg", "got a list; must be a mapping"),
        ({"calib_params": {"mix_cfg": {"*" * 201: "w8a8"}}}, "calib_params.mix_cfg", "the pattern has 201 characters"),
        ({"calib_params": {"mix_cfg": {"": "w8a8"}}}, "calib_params.mix_cfg", "the pattern is empty"),
        ({"calib_params": {"all_tensors": {}}}, "calib_params.all_tensors", "exists in the Python interface"),
        (
            {"calib_save_params": {"part_file_size": 0}},
            "calib_save_params.part_file_size",
            "greater than or equal to 1",
        ),
        ({"calib_save_params": {"path": "x"}}, "calib_save_params.path", "unknown field"),
        ({"batch_size": 0}, "batch_size", "greater than or equal to 1"),
        ({"calib_dataset": ""}, "calib_dataset", "at least 1 character"),
        ({"calib_dataset": {"path": "x"}}, "calib_dataset", "must be a valid string"),
        ({"calib_cfg": 8}, "calib_cfg", "got 8; must be a mapping"),
        ({"layer_count": 2}, "layer_count", "unknown field"),
        ({"calib_dataest": "x"}, "calib_dataest", "did you mean 'calib_dataset'?"),
        ({"process": []}, "process", "unknown field"),
    ],
)
def test_a_wrong_value_elsewhere(spec: dict[str, Any], where: str, words: str) -> None:
    said = refusal({"calib_cfg": {"mm_tensor": False}, **spec})
    assert said.startswith(f"old: spec.{where}")
    assert words in said


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "apiversion: modelslim_v0\n"
        "spec:\n"
        "  anti_cfg:\n"
        "    anti_methd: m4\n"
        "  calib_cfg:\n"
        "    fraction: 0.5\n"
        "    timestep: 3\n"
        "  batchsize: 3\n"
    )
    with pytest.raises(SchemaValidateError) as caught:
        migrate(load_recipe(path))
    said = str(caught.value).splitlines()
    assert [line.removeprefix(str(path)).split(": ")[0:2] for line in said] == [
        [":4", "spec.anti_cfg.anti_methd"],
        [":6", "spec.calib_cfg.fraction"],
        [":7", "spec.calib_cfg.timestep"],
        [":8", "spec.batchsize"],
    ]


def test_a_conflict_is_reported_at_the_line_of_the_field(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "apiversion: modelslim_v0\nspec:\n  calib_cfg:\n    mm_tensor: false\n    w_bit: 4\n    pdmix: true\n"
    )
    with pytest.raises(SchemaValidateError) as caught:
        migrate(load_recipe(path))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:5: spec.calib_cfg.w_bit: got 4; ")
    assert second.startswith(f"{path}:6: spec.calib_cfg.pdmix: got True; ")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ("w_bit: 4, is_lowbit: true", LayerKind.W8A8S),
        ("w_bit: 4, is_lowbit: true, co_sparse: true", LayerKind.W8A8S),
        ("w_bit: 4, is_lowbit: true, open_outlier: false", LayerKind.W8A8S),
        ("w_bit: 4, co_sparse: true", LayerKind.W8A8S),
        ("co_sparse: true", LayerKind.W8A8S),
        ("w_bit: 4, a_bit: 16, co_sparse: true", LayerKind.W8A8S),
        ("co_sparse: true, is_lowbit: true", LayerKind.W8A8),
        ("w_bit: 4, is_dynamic: true, is_lowbit: true, open_outlier: false", LayerKind.W4A8_DYNAMIC),
        ("w_bit: 4, is_dynamic: true, is_lowbit: true, open_outlier: false, co_sparse: true", LayerKind.W4A8_DYNAMIC),
        ("w_bit: 4, a_bit: 4, is_dynamic: true", LayerKind.W4A4_DYNAMIC),
        ("is_dynamic: true", LayerKind.W8A8_DYNAMIC),
        ("is_dynamic: true, pdmix: true", LayerKind.W8A8_DYNAMIC),
        ("pdmix: true", LayerKind.W8A8_MIX),
        ("w_bit: 8", LayerKind.W8A8),
        ("a_bit: 16", LayerKind.W8A16),
        ("a_bit: 16, w_sym: false, is_dynamic: true", LayerKind.W8A16),
        ("w_bit: 4, a_bit: 16", LayerKind.W4A16),
    ],
)
def test_which_layer_results(settings: str, kind: LayerKind) -> None:
    assert CalibConfig.model_validate(yaml.safe_load(f"{{{settings}}}")).kind is kind

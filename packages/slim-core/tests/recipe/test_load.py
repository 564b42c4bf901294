"""Recipes that can be read: what comes out of them, and what a protocol may add."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest
from pydantic import Field

from slim_core.errors import SchemaValidateError
from slim_core.recipe import (
    DatasetConfig,
    LinearQConfig,
    SpecV1,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
    spec_model,
)

pytestmark = pytest.mark.usefixtures("install")


def test_remarks_are_placed_in_the_file(mixed, write):
    path = write(mixed)
    recipe, text = load_recipe(path), path.read_text().splitlines()
    remarks = recipe.placed(["process[1].configs[0].qconfig: odd", "process[0] is odd", "nowhere.at[3].all: odd"])
    places = [remark.removeprefix(f"{path}:").partition(": ") for remark in remarks]
    assert [rest for _, _, rest in places] == [
        "spec.process[1].configs[0].qconfig: odd",
        "spec.process[0] is odd",
        "spec.nowhere.at[3].all: odd",
    ]
    qconfig, smooth, spec = (text[int(line) - 1] for line, _, _ in places)
    assert "qconfig:" in qconfig
    assert "iter_smooth" in smooth
    assert spec == "spec:"
    assert recipe_from_dict({"apiversion": "x", "spec": {}}).placed(["a: b"]) == ["<recipe>: spec.a: b"]


def test_a_recipe_of_the_guide(mixed, write):
    recipe = load_recipe(write(mixed))
    assert recipe.apiversion == "modelslim_v1"
    assert list(recipe.extra) == ["default_w8a8_dynamic", "default_w8a8"]
    spec = recipe.spec()
    smooth, group = spec.process
    assert smooth.scale_min == 1e-5
    static, dynamic = group.configs
    assert (static.qconfig.act.scope, static.qconfig.act.symmetric) == ("per_tensor", False)
    assert (dynamic.qconfig.act.scope, dynamic.exclude) == ("per_token", ("*gate",))
    assert spec.save[0].part_file_size == 4
    assert spec.dataset == DatasetConfig(path="mix_calib.jsonl")
    assert (spec.runner, spec.propagate, spec.prior) == ("auto", "float", ())
    assert spec.warnings() == []


def test_merge_keys_work(write):
    text = """\
    apiversion: modelslim_v1
    base: &base {type: linear_quant, qconfig: {weight: {}}}
    spec:
      process:
        - <<: *base
          include: ["*q_proj"]
        - <<: *base
          qconfig: {act: {}, weight: {}}
    """
    first, second = load_recipe(write(dedent(text))).spec().process
    assert first.include == ("*q_proj",)
    assert first.qconfig.act is None
    assert second.qconfig.act.scope == "per_tensor"


def test_python_users_may_pass_objects(install):
    linear = install()[0].loaded.Config
    config = linear(type="linear_quant", qconfig=LinearQConfig.model_validate({"weight": {}}))
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}})
    assert recipe.spec().process == (config,)
    with pytest.raises(SchemaValidateError, match=r"^mine: spec.runner: got 'fast'; allowed: auto, "):
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"runner": "fast"}}, where="mine").spec()
    with pytest.raises(SchemaValidateError, match=r"^mine: a key must be a string, got 1"):
        recipe_from_dict({1: 2}, where="mine")  # pyright: ignore


def test_a_protocol_with_more_fields(write):
    class VlmSpec(SpecV1):
        default_text: str = Field(default="Describe this image in detail.", min_length=1)

    recipe = load_recipe(write("apiversion: v\nspec:\n  default_text: ''\n"))
    with pytest.raises(SchemaValidateError, match=r"recipe.yaml:3: spec.default_text: got ''; must have at least 1"):
        recipe.spec(VlmSpec)
    with pytest.raises(SchemaValidateError, match=r"recipe.yaml:3: spec.default_text: unknown field"):
        recipe.spec()
    recipe = load_recipe(write("apiversion: v\nspec: {default_text: Look!}\n"))
    assert recipe.spec(VlmSpec).default_text == "Look!"
    assert "default_text: Look!" in dump_recipe(recipe, recipe.spec(VlmSpec))


def test_metadata_and_version_need_no_plugins(mixed, write, install):
    points = install()
    recipe = load_recipe(write(mixed))
    assert recipe.metadata.config_id == "Unknown"
    assert sum(point.loads for point in points) == 0
    recipe.spec()
    assert {point.name for point in points if point.loads} == {"linear_quant", "group", "iter_smooth", "ascendv1_saver"}


def test_loading_imports_no_torch(mixed, write):
    import subprocess

    code = (
        "import sys; from pathlib import Path; from slim_core.recipe import load_recipe; import slim_core.practices;"
        f"load_recipe(Path({str(write(mixed))!r})); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_free_top_level_blocks_are_kept(write):
    recipe = load_recipe(write("apiversion: v\nspec: {}\ndefault_w8a8: {a: 1}\nspecial_block: [1]\nmeta_note: x\n"))
    assert recipe.extra == {"default_w8a8": {"a": 1}, "special_block": [1], "meta_note": "x"}


def test_warnings_carry_their_place(write):
    text = """\
    apiversion: modelslim_v1
    spec:
      process:
      - type: group
        configs:
        - type: linear_quant
          qconfig:
            weight: {method: ssz, ext: {group_size: 64}}
    """
    recipe = load_recipe(write(dedent(text)))
    assert recipe.spec().warnings() == [
        "process[0].configs[0].qconfig.weight.ext.group_size has no effect with method ssz and scope per_channel"
    ]


def test_spec_model_is_the_shared_form():
    assert spec_model() is SpecV1

"""The fields of ``multimodal_vlm_modelslim_v1``: what is filled in, what is refused, where the message points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slim_core.commands import effective_recipe
from slim_core.errors import SchemaValidateError
from slim_core.recipe import DatasetConfig, SpecV1, dump_recipe, load_recipe, recipe_from_dict, recipe_json_schema
from slim_vlm.recipe import SpecVlm

PROMPT = "Describe this image in detail."
LINEAR = {"type": "linear_quant", "qconfig": {"act": {"scope": "per_token"}, "weight": {}}}
LEARN, ROTATE = {"type": "adapt_rotation", "stage": 1}, {"type": "adapt_rotation", "stage": 2}


def spec_of(**fields: Any) -> SpecVlm:
    return recipe_from_dict({"apiversion": "multimodal_vlm_modelslim_v1", "spec": fields}).spec(SpecVlm)


def refusal(tmp_path: Path, spec: str) -> str:
    """What is said of a ``spec`` that begins on line 3, without the name of the file."""
    path = tmp_path / "r.yaml"
    path.write_text(f"apiversion: multimodal_vlm_modelslim_v1\nspec:\n{spec}\n", "utf-8")
    with pytest.raises(SchemaValidateError) as caught:
        load_recipe(path).spec(SpecVlm)
    return str(caught.value).replace(f"{path}:", "")


def test_defaults() -> None:
    spec = spec_of()
    assert spec.runner == "layer_wise"
    assert (spec.dataset, spec.default_text) == (DatasetConfig(path="calibImages"), PROMPT)
    assert (spec.process, spec.prior, spec.propagate) == ((), (), "float")
    assert [saver.type for saver in spec.save] == ["ascendv1_saver"]
    assert spec.warnings() == []


def test_it_has_the_fields_of_modelslim_v1_and_one_more() -> None:
    assert SpecVlm.model_fields.keys() - SpecV1.model_fields.keys() == {"default_text"}
    assert spec_of(process=[LINEAR]).process == SpecV1.model_validate({"process": [LINEAR]}).process


@pytest.mark.parametrize("runner", ["auto", "model_wise", "dp_layer_wise"])
def test_another_runner_becomes_layer_wise_with_a_warning(runner: str) -> None:
    spec = spec_of(runner=runner)
    assert spec.runner == "layer_wise"
    assert spec.coercions() == [f"runner: {runner!r} becomes 'layer_wise', the only one for vision-language models"]
    assert spec.warnings() == spec.coercions()


def test_layer_wise_is_nothing_to_warn_of() -> None:
    assert spec_of(runner="layer_wise").warnings() == []


def test_what_a_processor_ignores_is_warned_of_too() -> None:
    ignored = {"type": "linear_quant", "qconfig": {"weight": {"ext": {"group_size": 32}}}}
    first, second = spec_of(runner="auto", process=[ignored]).warnings()
    assert first.startswith("runner: ")
    assert second.startswith("process[0].qconfig.weight.ext.group_size has no effect")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("  default_text: ''", "3: spec.default_text: got ''; must not be empty; leave it out for the default prompt"),
        ('  default_text: " \\t"', "3: spec.default_text: got ' \\t'; must not be empty"),
        ("  default_text: 3", "3: spec.default_text: got 3; must be a valid string"),
        (f"  default_text: {'x' * 10_001}", "must have at most 10000 characters"),
        ("  runner: layers", "3: spec.runner: got 'layers'; allowed: auto, layer_wise, dp_layer_wise, model_wise"),
        ("  runner: ''", "3: spec.runner: got ''; allowed: auto"),
        ("  defaul_text: x", "3: spec.defaul_text: unknown field; did you mean 'default_text'?"),
        (
            "  dataset: {path: p, max_length: 5}",
            "3: spec.dataset.max_length: got 5; it would cut through the tokens of an image; leave it out",
        ),
        (
            "  dataset:\n    path: p\n    batch_size: 2",
            "5: spec.dataset.batch_size: got 2; must be 1: images differ in size, one runs at a time",
        ),
        ("  dataset: ''", "3: spec.dataset: got ''; must have at least 1 character"),
        (
            "  dataset: {path: p, num_sample: 1}",
            "3: spec.dataset.num_sample: unknown field; did you mean 'num_samples'?",
        ),
    ],
)
def test_refused(tmp_path: Path, spec: str, message: str) -> None:
    assert message in refusal(tmp_path, spec)


def test_stages_ahead_are_held_to_the_same(tmp_path: Path) -> None:
    said = refusal(
        tmp_path,
        f"  process: [{ROTATE}]\n"
        f"  prior:\n"
        f"    - process: [{LEARN}]\n"
        f"      dataset: {{path: p, max_length: 5}}\n"
        f"    - process: [{LEARN}]\n"
        f"    - process: [{LEARN}]\n"
        f"      dataset: {{path: p, batch_size: 5}}",
    ).splitlines()
    assert [line.partition(": got")[0] for line in said] == [
        "6: spec.prior[0].dataset.max_length",
        "9: spec.prior[2].dataset.batch_size",
    ]
    assert "would cut through" in said[0]
    assert "must be 1" in said[1]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, "  runner: fast\n  default_text: ''\n  dataset: {path: p, max_length: 1}")
    assert [line[:2] for line in said.splitlines()] == ["3:", "4:", "5:"]


def test_num_samples_is_welcome() -> None:
    assert spec_of(dataset={"path": "p", "num_samples": 3}).dataset.num_samples == 3


def test_a_dump_is_the_same_recipe() -> None:
    fields = {
        "runner": "auto",
        "process": [LINEAR],
        "default_text": "这是什么？",
        "dataset": {"path": "p", "num_samples": 3},
    }
    recipe = recipe_from_dict({"apiversion": "multimodal_vlm_modelslim_v1", "spec": fields})
    spec = recipe.spec(SpecVlm)
    again = recipe_from_dict(yaml.safe_load(dump_recipe(recipe, spec))).spec(SpecVlm)
    assert again.model_dump() == spec.model_dump()
    assert again.warnings() == []


def test_check_fills_in_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("apiversion: multimodal_vlm_modelslim_v1\nspec:\n  process: []\n  runner: model_wise\n")
    with caplog.at_level("WARNING", "slim"):
        effective = yaml.safe_load(effective_recipe(path))["spec"]
    assert effective["runner"] == "layer_wise"
    assert effective["dataset"] == "calibImages"
    assert effective["default_text"] == PROMPT
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:4: spec.runner: 'model_wise' becomes 'layer_wise', the only one for vision-language models"
    ]


def test_the_schema_for_editors() -> None:
    fields = recipe_json_schema(SpecVlm)["$defs"]["SpecVlm"]["properties"]
    assert fields["default_text"]["default"] == PROMPT
    assert fields["runner"]["default"] == "layer_wise"
    assert fields["runner"]["enum"] == ["auto", "layer_wise", "dp_layer_wise", "model_wise"]


def test_the_example_is_valid() -> None:
    path = Path(__file__).parents[3] / "examples" / "vlm-w8a8.yaml"
    recipe = load_recipe(path)
    assert recipe.spec(SpecVlm).warnings() == []

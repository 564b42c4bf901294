"""`slim inspect`, `verify`, `practices`, `recipe`, `schema`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import yaml


def test_practices_list_is_a_table(slim) -> None:
    found = slim("practices", "list")
    assert found.exit_code == 0, found.output
    header, *rows = found.stdout.splitlines()
    assert header.split() == ["pedigree", "id", "quant", "type", "score", "models"]
    assert ["default", "default-w8a8", "w8a8", "50", "any"] in [row.split() for row in rows]


def test_practices_show_prints_a_recipe(slim) -> None:
    found = slim("practices", "show", "default-w8a16")
    assert found.exit_code == 0, found.output
    assert yaml.safe_load(found.stdout)["apiversion"] == "modelslim_v1"
    missing = slim("practices", "show", "default-w8a15")
    assert missing.exit_code == 1
    assert "did you mean" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "config_id", "question"),
    [
        (["Qwen3-8B", "--quant_type", "w8a8"], "qwen3-w8a8", "none"),
        (["Qwen3-8B"], "qwen3-w8a8", "No quant_type was given"),
        (["Qwen3-8B", "--quant-type", "w4a4c8"], "qwen3-w8a8", "There is no practice for Qwen3-8B with w4a4c8"),
        (["never-heard-of", "--quant_type", "w8a16"], "default-w8a16", "was not made for never-heard-of"),
    ],
)
def test_practices_match_answers_as_quant_would(slim, arguments: list[str], config_id: str, question: str) -> None:
    found = slim("practices", "match", *arguments)
    assert found.exit_code == 0, found.output
    practice, _, asked = found.stdout.splitlines()
    assert practice.split()[1] == config_id
    assert question in asked


def test_practices_match_refuses_an_unknown_type(slim) -> None:
    found = slim("practices", "match", "Qwen3-8B", "--quant_type", "w9a9")
    assert found.exit_code == 1
    assert "error 203 SchemaValidateError: quant_type: " in found.stderr


def test_recipe_check_prints_the_effective_recipe(slim, recipe: Path) -> None:
    found = slim("recipe", "check", recipe)
    assert found.exit_code == 0, found.output
    effective = yaml.safe_load(found.stdout)
    assert effective["spec"]["process"][0]["exclude"] == ["*layers.0.mlp.down_proj"]
    assert effective["spec"]["runner"] == "auto"


def test_recipe_check_tells_errors(slim, recipe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(recipe.read_text().replace("int8", "int7", 1))
    found = slim("recipe", "check", broken)
    assert found.exit_code == 1
    assert found.stderr.startswith("error 203 SchemaValidateError: ")
    assert f"{broken}:6" in found.stderr


def test_recipe_check_of_a_vision_language_model(slim, recipe: Path, tmp_path: Path) -> None:
    """The fields and defaults of its own protocol, and a warning about the one that does not stay as it was given."""
    images = tmp_path / "images.yaml"
    images.write_text(
        recipe.read_text().replace("modelslim_v1\nspec:", "multimodal_vlm_modelslim_v1\nspec:\n  runner: auto")
    )
    found = slim("recipe", "check", images)
    assert found.exit_code == 0, found.output
    spec = yaml.safe_load(found.stdout)["spec"]
    assert (spec["runner"], spec["dataset"]) == ("layer_wise", "calibImages")
    assert spec["default_text"] == "Describe this image in detail."
    [warning] = found.stderr.splitlines()
    assert warning.endswith(
        f"WARNING {images}:3: spec.runner: 'auto' becomes 'layer_wise', the only one for vision-language models"
    )
    images.write_text(images.read_text().replace("auto", "automatic"))
    assert f"{images}:3: spec.runner: got 'automatic'; allowed: auto" in slim("recipe", "check", images).stderr


def test_recipe_check_warns_of_what_has_no_effect(slim, recipe: Path, tmp_path: Path) -> None:
    idle = tmp_path / "idle.yaml"
    idle.write_text(recipe.read_text().replace("method: minmax}\n      include", "ext: {step: 2}}\n      include"))
    found = slim("recipe", "check", idle)
    assert found.exit_code == 0, found.output
    path = "spec.process[0].qconfig.weight.ext.step"
    assert f"WARNING {idle}:7: {path} has no effect with method minmax and scope per_channel" in found.stderr


def test_recipe_check_refuses_what_it_cannot_check(slim, recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("modelslim_v1", "modelslim_v9"))
    found = slim("recipe", "check", other)
    assert found.exit_code == 1
    assert "error 301 UnsupportedError: " in found.stderr


def test_schema_to_standard_output_and_to_a_file(slim, tmp_path: Path) -> None:
    target = tmp_path / "recipe.schema.json"
    assert slim("schema", "--output", target).exit_code == 0
    assert json.loads(target.read_text()) == json.loads(slim("schema").stdout)
    refused = slim("schema", "--output", tmp_path / "no" / "such" / "folder.json")
    assert refused.exit_code == 1
    assert "error 100 EnvError: " in refused.stderr


@pytest.mark.parametrize(
    ("apiversion", "field"),
    [
        ("modelslim_v1", "propagate"),
        ("multimodal_vlm_modelslim_v1", "default_text"),
        ("multimodal_sd_modelslim_v1", "multimodal_sd_config"),
        ("modelslim_v0", "calib_cfg"),
    ],
)
def test_schema_of_each_protocol(slim, apiversion: str, field: str) -> None:
    found = slim("schema", "--apiversion", apiversion)
    assert found.exit_code == 0, found.output
    schema = json.loads(found.stdout)
    spec = schema["$defs"][schema["properties"]["spec"]["$ref"].rpartition("/")[2]]
    assert field in spec["properties"]


def test_schema_of_what_is_not_served(slim, tmp_path: Path) -> None:
    found = slim("schema", "--apiversion", "multimodal_vlm", "--output", tmp_path / "schema.json")
    assert found.exit_code == 1
    assert "--apiversion: unknown apiversion 'multimodal_vlm' (did you mean 'multimodal_vlm_model" in found.stderr
    assert not (tmp_path / "schema.json").exists()


@dataclass
class _Verification:
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        return "\n".join(["checked", *self.problems])


@pytest.mark.parametrize(("problems", "status"), [([], 0), (["scale is not finite"], 3)])
def test_verify_exits_3_when_it_finds_problems(
    slim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problems: list[str], status: int
) -> None:
    calls = []
    module = ModuleType("slim_core.evaluation.verify")
    module.verify_folder = lambda *arguments: calls.append(arguments) or _Verification(problems)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("slim_core.dispatch.original_opener", lambda folder: ("opener of", folder))
    monkeypatch.setattr("slim_core.dispatch.original_parts", lambda folder: ("parts of", folder))
    found = slim("verify", tmp_path, "--model", "original", "--engine", "vllm-ascend")
    assert found.exit_code == status
    assert found.stdout.splitlines() == ["checked", *problems]
    assert calls == [(tmp_path, Path("original"), "vllm-ascend", ("opener of", tmp_path), ("parts of", tmp_path))]


def test_inspect_prints_what_it_finds(slim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("slim_core.evaluation.inspect")
    module.inspect_folder = lambda path: _Verification([str(path)])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert slim("inspect", tmp_path).stdout.splitlines() == ["checked", str(tmp_path)]

from __future__ import annotations

import json
from typing import Any

import pytest

from slim_core.recipe import SpecV1, recipe_json_schema

pytestmark = pytest.mark.usefixtures("install")


def walk(node: Any):
    yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from walk(inner)


def test_every_reference_resolves_and_nothing_is_left_over():
    schema = recipe_json_schema()
    json.dumps(schema)
    for node in walk(schema):
        if isinstance(node, dict):
            assert "x-slim-plugins" not in node
            if isinstance(node.get("$ref"), str):
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]


def test_processors_and_savers_are_told_apart_by_type():
    definitions = recipe_json_schema()["$defs"]
    assert definitions["AnyProcessor"]["properties"]["type"]["enum"] == ["group", "iter_smooth", "linear_quant"]
    assert definitions["AnySaver"]["discriminator"]["mapping"] == {"ascendv1_saver": "#/$defs/AscendConfig"}
    reference = {"$ref": "#/$defs/AnyProcessor"}
    assert definitions["SpecV1"]["properties"]["process"]["items"] == reference
    assert definitions["GroupConfig"]["properties"]["configs"]["items"] == reference


def test_a_dataset_is_a_name_or_a_mapping():
    dataset = recipe_json_schema()["$defs"]["SpecV1"]["properties"]["dataset"]
    assert {"type": "string"} in dataset["anyOf"]
    assert {"$ref": "#/$defs/DatasetConfig"} in dataset["anyOf"]


def test_every_field_of_ours_is_described():
    definitions = recipe_json_schema()["$defs"]
    for name, definition in definitions.items():
        for field, content in definition.get("properties", {}).items():
            if name not in ("AnyProcessor", "AnySaver"):
                assert content.get("description") or "$ref" in content, f"{name}.{field}"


def test_unknown_keys_are_refused_inside_and_free_blocks_allowed_outside():
    schema = recipe_json_schema()
    assert "additionalProperties" not in schema
    assert schema["$defs"]["SpecV1"]["additionalProperties"] is False
    assert schema["$defs"]["WeightConfig"]["additionalProperties"] is False


def test_another_protocol():
    class MySpec(SpecV1):
        more: int = 1

    schema = recipe_json_schema(MySpec)
    assert schema["properties"]["spec"] == {"$ref": "#/$defs/MySpec"}
    assert "more" in schema["$defs"]["MySpec"]["properties"]

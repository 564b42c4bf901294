"""JSON Schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from slim_core.recipe.plugins import PROCESSOR_GROUP, SAVER_GROUP, PluginConfig, plugin_names
from slim_core.recipe.schema import Metadata, SpecV1

__all__ = ["recipe_json_schema"]

_NAMES = {PROCESSOR_GROUP: "AnyProcessor", SAVER_GROUP: "AnySaver"}
_VERSIONS = ["modelslim_v1", "multimodal_vlm_modelslim_v1", "multimodal_sd_modelslim_v1", "modelslim_v0"]


def recipe_json_schema(spec: type[BaseModel] = SpecV1) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe with the processors and savers installed here.

    Args:
        spec: typed form of ``spec``.

    Raises:
        EnvError: an entry point is broken.
    """
    configs = {
        group: {name: PluginConfig(group).config_class(name) for name in plugin_names(group)} for group in _NAMES
    }
    models = [spec, Metadata, *dict.fromkeys(config for named in configs.values() for config in named.values())]
    references, schema = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = schema["$defs"]
    for group, named in configs.items():
        targets = {name: references[config, "validation"]["$ref"] for name, config in named.items()}
        definitions[_NAMES[group]] = {
            "title": _NAMES[group],
            "description": "Told apart by `type`",
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": list(named)}},
            "oneOf": [{"$ref": target} for target in dict.fromkeys(targets.values())],
            "discriminator": {"propertyName": "type", "mapping": targets},
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Slim recipe",
        "description": "What to quantize, how, and in which format to write it",
        "type": "object",
        "required": ["apiversion", "spec"],
        "properties": {
            "apiversion": {
                "title": "Apiversion",
                "description": "Protocol that spec follows",
                "type": "string",
                "examples": _VERSIONS,
            },
            "metadata": references[Metadata, "validation"],
            "spec": references[spec, "validation"],
        },
        "$defs": _link(definitions),
    }


def _link(node: Any) -> Any:
    """The schema with the placeholders of plug-in fields replaced by references."""
    if isinstance(node, dict):
        node = cast("dict[str, Any]", node)
        if group := node.get("x-slim-plugins"):
            rest = {key: _link(value) for key, value in node.items() if key != "x-slim-plugins"}
            return {"$ref": f"#/$defs/{_NAMES[group]}", **rest}
        return {key: _link(value) for key, value in node.items()}
    return [_link(item) for item in cast("list[Any]", node)] if isinstance(node, list) else node

"""Recipes of every processor that Slim brings: what is not known is refused, and what is written is read back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from slim_core.errors import SchemaValidateError
from slim_core.recipe import dump_recipe, load_recipe, recipe_from_dict
from slim_core.recipe.plugins import PROCESSOR_GROUP, plugin_names

INT8, INT4 = {"dtype": "int8"}, {"dtype": "int4"}
GROUPS: dict[str, Any] = {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 64}}
LINEAR: dict[str, Any] = {
    "type": "linear_quant",
    "qconfig": {
        "act": INT8
        | {"scope": "per_tensor", "method": "histogram", "ext": {"metric": "percentile", "percentile": 99.9}},
        "weight": INT8 | {"method": "gptq", "ext": {"percdamp": 1e-3, "actorder": False}},
    },
    "include": ["*.{q,k}_proj", "model.layers.{0..3}.*"],
    "exclude": ["*.1.*"],
}
LEARNED = {
    "act": INT4 | {"scope": "per_token"},
    "weight": GROUPS | {"ext": {"group_size": 64, "scale_dtype": "float16"}},
}
# One of every kind, with settings that are not the usual ones.
PROCESSORS: dict[str, dict[str, Any]] = {
    "linear_quant": LINEAR,
    "group": {"type": "group", "configs": [LINEAR, {"type": "group", "configs": [LINEAR]}]},
    "autoround_quant": {
        "type": "autoround_quant",
        "iters": 3,
        "lr": 0.01,
        "seed": 7,
        "strategies": [{"qconfig": LEARNED, "include": ["*.up_proj"]}, {"qconfig": {"weight": INT8}}],
    },
    "float_sparse": {"type": "float_sparse", "sparse_ratio": 0.4, "exclude": ["*.0.*"]},
    "dynamic_cache": {
        "type": "dynamic_cache",
        "details": {"key": INT8 | {"symmetric": False}, "value": INT8 | {"ext": {"aggregation_type": "mean"}}},
    },
    "fa3_quant": {
        "type": "fa3_quant",
        "details": {
            "fa_q": INT8 | {"scope": "per_head", "ext": {"ratio": 0.999}},
            "fa_k": {"dtype": "fp8_e4m3", "scope": "per_token"},
        },
    },
    "kv_smooth": {"type": "kv_smooth", "smooth_factor": 0.7},
    "smooth_quant": {"type": "smooth_quant", "alpha": 0.25, "symmetric": False},
    "iter_smooth": {"type": "iter_smooth", "alpha": 0.3, "scale_min": 1e-3, "enable_subgraph_type": ["norm-linear"]},
    "flex_smooth_quant": {"type": "flex_smooth_quant", "alpha": 0.5, "beta": 0.25},
    "flex_awq_ssz": {"type": "flex_awq_ssz", "qconfig": {"act": INT8 | {"scope": "per_token"}, "weight": INT4}},
    "awq": {"type": "awq", "weight_qconfig": INT4 | {"method": "ssz", "ext": {"step": 5}}, "n_grid": 7},
    "quarot": {"type": "quarot", "online": True, "block_size": 8, "down_proj_online_layers": [-1, 2]},
    "adapt_rotation": {"type": "adapt_rotation", "stage": 2, "block_size": 16},
    "online_quarot": {"type": "online_quarot", "include": ["*self_attn*"], "exclude": ["*.0.*"], "block_size": 16},
}
LEARNING = {
    "type": "adapt_rotation",
    "stage": 1,
    "block_size": 16,
    "steps": 4,
    "quant_dtype": "int8",
    "max_samples": 100,
}


def recipe(name: str, processor: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {"process": [processor], "save": [{"type": "ascendv1_saver"}], "dataset": "some.jsonl"}
    if name == "adapt_rotation":
        spec["prior"] = [{"process": [LEARNING], "dataset": {"path": "other.jsonl", "num_samples": 3}}]
    return {"apiversion": "modelslim_v1", "spec": spec}


def test_all_of_them() -> None:
    assert sorted(PROCESSORS) == plugin_names(PROCESSOR_GROUP)


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    given = recipe_from_dict(recipe(name, PROCESSORS[name]))
    text = dump_recipe(given)
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.spec() == given.spec()
    assert dump_recipe(again) == text
    (processor,) = again.spec().process
    assert processor.type == name
    assert processor.model_dump(mode="json", exclude_unset=False) == given.spec().process[0].model_dump(mode="json")
    if name == "adapt_rotation":
        assert again.spec().prior[0].dataset == given.spec().prior[0].dataset != again.spec().dataset


def leaves(node: Any, path: str = "") -> list[str]:
    """Where the methods of a processor have their settings: at every qconfig leaf."""
    if isinstance(node, list):
        return [found for i, one in enumerate(node) for found in leaves(one, f"{path}[{i}]")]
    if not isinstance(node, dict):
        return []
    own = [path] if "dtype" in node else []
    return own + [found for key, one in node.items() for found in leaves(one, f"{path}.{key}")]


def at(node: Any, path: str) -> Any:
    for part in path.replace("[", ".[").split("."):
        if part:
            node = node[int(part[1:-1])] if part.startswith("[") else node[part]
    return node


PLACES = [(name, place) for name, processor in PROCESSORS.items() for place in leaves(processor)]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_an_unknown_setting_of_a_method_is_refused_where_it_stands(name: str, place: str) -> None:
    processor = copy.deepcopy(PROCESSORS[name])
    leaf = at(processor, place)
    leaf["ext"] = leaf.get("ext", {}) | {"nonsense": 1}
    with pytest.raises(SchemaValidateError, match="unknown field") as caught:
        recipe_from_dict(recipe(name, processor)).spec()
    assert f"spec.process[0]{place}.ext.nonsense" in str(caught.value)


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_unknown_field_is_refused(name: str) -> None:
    with pytest.raises(SchemaValidateError, match=r"spec\.process\[0\]\.nonsense: unknown field"):
        recipe_from_dict(recipe(name, PROCESSORS[name] | {"nonsense": 1})).spec()

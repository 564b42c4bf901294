"""A recipe that is written out is explicit, and the same recipe when it is read again."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slim_core.recipe import (
    DatasetConfig,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
)

pytestmark = pytest.mark.usefixtures("install")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("boolq.jsonl", DatasetConfig(path="boolq.jsonl")),
        ({"path": "a.jsonl", "extra_share": 0.5}, DatasetConfig(path="a.jsonl", extra_share=0.5)),
        ({"path": "a.jsonl", "max_length": 2048}, DatasetConfig(path="a.jsonl", max_length=2048)),
    ],
)
def test_datasets_by_name_or_in_full(dataset, expected):
    recipe = recipe_from_dict(
        {"apiversion": "modelslim_v1", "spec": {"dataset": dataset, "prior": [{"process": [], "dataset": dataset}]}}
    )
    assert recipe.spec().dataset == expected
    assert recipe.spec().prior[0].dataset == expected
    again = yaml.safe_load(dump_recipe(recipe))["spec"]["dataset"]
    assert DatasetConfig.model_validate(again if isinstance(again, dict) else {"path": again}) == expected


def test_a_dump_is_explicit_and_ordered(mixed, write):
    text = dump_recipe(load_recipe(write(mixed)))
    data = yaml.safe_load(text)
    assert list(data) == ["apiversion", "spec", "metadata", "default_w8a8_dynamic", "default_w8a8"]
    assert list(data["spec"]) == ["runner", "process", "save", "dataset", "propagate", "prior"]
    assert data["spec"]["dataset"] == "mix_calib.jsonl"
    assert data["spec"]["process"][1]["configs"][0]["exclude"] == []
    assert "&" not in text
    assert "*id" not in text


def assert_same(first: Recipe, second: Recipe) -> None:
    assert first.spec() == second.spec()
    assert (first.apiversion, first.metadata, first.extra) == (second.apiversion, second.metadata, second.extra)


acts = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["int8", "int4", "float"]),
        "scope": st.sampled_from(["per_tensor", "per_token", "pd_mix"]),
        "symmetric": st.booleans(),
    },
)
linears = st.fixed_dictionaries(
    {
        "type": st.just("linear_quant"),
        "qconfig": st.fixed_dictionaries(
            {
                "act": acts,
                "weight": st.fixed_dictionaries(
                    {},
                    optional={
                        "method": st.sampled_from(["minmax", "ssz"]),
                        "ext": st.dictionaries(st.sampled_from(["step", "bins"]), st.integers(2, 9)),
                    },
                ),
            }
        ),
    },
    optional={"include": st.lists(st.sampled_from(["*", "*q_proj", "*.{a,b}"]), max_size=3)},
)
processors = st.recursive(
    linears | st.fixed_dictionaries({"type": st.just("iter_smooth"), "alpha": st.floats(0, 1)}),
    lambda inner: st.fixed_dictionaries({"type": st.just("group"), "configs": st.lists(inner, min_size=1, max_size=3)}),
    max_leaves=4,
)
recipes = st.fixed_dictionaries(
    {
        "apiversion": st.sampled_from(["modelslim_v1", "1.0", "yes"]),
        "spec": st.fixed_dictionaries(
            {"process": st.lists(processors, max_size=3)},
            optional={
                "dataset": st.text(min_size=1, max_size=9),
                "runner": st.sampled_from(["auto", "layer_wise"]),
                "prior": st.lists(st.fixed_dictionaries({"process": st.lists(processors, max_size=1)}), max_size=2),
            },
        ),
    },
    optional={
        "metadata": st.fixed_dictionaries(
            {},
            optional={
                "config_id": st.text(max_size=9),
                "score": st.floats(0, 1e9),
                "label": st.dictionaries(
                    st.text(max_size=3), st.none() | st.text(max_size=5) | st.integers(), max_size=2
                ),
                "verified_tags": st.dictionaries(
                    st.text(max_size=5), st.lists(st.lists(st.text(max_size=3))), max_size=2
                ),
            },
        ),
        "zz_anchor": st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(recipes)
def test_a_dumped_recipe_is_the_same_recipe(tmp_path, data):
    recipe = recipe_from_dict(data)
    path = tmp_path / "dump.yaml"
    path.write_bytes(dump_recipe(recipe).encode())
    again = load_recipe(path)
    assert_same(recipe, again)
    assert dump_recipe(again) == dump_recipe(recipe)

"""Every linear becomes what it became in v0: kept names, then exact keys, then the first pattern, then the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.migration import Migration
from slim_core.quantization.kinds import LayerKind, layer_form
from slim_core.recipe import LinearQConfig, NameFilter, recipe_from_dict
from slim_llm.v0.translate import migrate

PARTS = [
    *(f"self_attn.{one}_proj" for one in "qkvo"),
    "mlp.gate",
    *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
]
NAMES = ["lm_head", *(f"model.layers.{i}.{part}" for i in range(3) for part in PARTS), "odd[0]", "odd{a,b}", "odd*"]
KINDS = {
    "w8a8": LayerKind.W8A8,
    "w8a16": LayerKind.W8A16,
    "w8a8_dynamic": LayerKind.W8A8_DYNAMIC,
    "w4a8_dynamic": LayerKind.W4A8_DYNAMIC,
    "float": LayerKind.FLOAT,
}


def translated(calib: dict[str, Any] | None = None, **spec: Any) -> Migration:
    body = {"calib_cfg": {"mm_tensor": False, **(calib or {})}, "calib_dataset": "set.jsonl", **spec}
    return migrate(recipe_from_dict({"apiversion": "modelslim_v0", "spec": body}))


def rules(migration: Migration) -> list[dict[str, Any]]:
    """The ``linear_quant`` of a recipe, in order."""
    found: list[dict[str, Any]] = []
    for processor in migration.recipe.raw_spec["process"]:
        found += processor["configs"] if processor["type"] == "group" else [processor]
    return [rule for rule in found if rule["type"] == "linear_quant"]


def outcome(migration: Migration, names: Iterable[str]) -> dict[str, LayerKind]:
    """What v1 makes of the names; no name may fall to two rules, which the plan would warn about."""
    kinds = dict.fromkeys(names, LayerKind.FLOAT)
    for rule in rules(migration):
        chosen = NameFilter(tuple(rule["include"]), tuple(rule["exclude"]))
        kind = layer_form(LinearQConfig.model_validate(rule["qconfig"])).kind
        for name in kinds:
            if chosen.matches(name):
                assert kinds[name] is LayerKind.FLOAT, (name, rules(migration))
                kinds[name] = kind
    return kinds


def naive(name: str, mix: Mapping[str, str], kept: Iterable[str], base: LayerKind) -> LayerKind:
    if name in kept:
        return LayerKind.FLOAT
    if name in mix:
        return KINDS[mix[name]]
    for key, value in mix.items():
        if fnmatch.fnmatchcase(name, key):
            return KINDS[value]
    return base


KEYS = st.sampled_from(
    [
        "*",
        "*.mlp.*",
        "*down_proj",
        "*.[02].*",
        "*.self_attn.?_proj",
        "model.layers.[!1].*",
        "*gate*",
        "*{a,b}",
        "odd[[]*",
    ]
    + [name for name in NAMES if not set(name) & set("*?[")]
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(KEYS, st.sampled_from(sorted(KINDS)), max_size=6),
    st.lists(st.sampled_from(NAMES), max_size=5),
    st.booleans(),
)
def test_priorities_are_those_of_v0(mix: dict[str, str], disabled: list[str], keep_head: bool) -> None:
    migration = translated(
        {"disable_names": disabled, "disable_last_linear": keep_head, "is_dynamic": True, "is_lowbit": True},
        calib_params={"mix_cfg": mix},
    )
    kept = {*disabled, *(["lm_head"] if keep_head else [])}
    wanted = {name: naive(name, mix, kept, LayerKind.W8A8_DYNAMIC) for name in NAMES}
    assert outcome(migration, NAMES) == wanted


def test_the_order_of_patterns_matters() -> None:
    narrow, wide = {"*.mlp.down_proj": "w8a16"}, {"*.mlp.*": "w8a8_dynamic"}
    name = "model.layers.1.mlp.down_proj"
    first = translated(calib_params={"mix_cfg": narrow | wide})
    second = translated(calib_params={"mix_cfg": wide | narrow})
    assert outcome(first, [name]) == {name: LayerKind.W8A16}
    assert outcome(second, [name]) == {name: LayerKind.W8A8_DYNAMIC}


def test_names_with_glob_characters_are_taken_literally() -> None:
    names = ["a.b[0].c", "a.*", "a.{b,c}", "a.?"]
    exclude = rules(translated({"disable_names": names}))[0]["exclude"]
    assert exclude == ["a.b\\[0\\].c", "a.\\*", "a.\\{b,c\\}", "a.\\?", "lm_head"]
    chosen = NameFilter(exclude=tuple(exclude))
    assert not any(chosen.matches(name) for name in names)
    assert all(chosen.matches(name) for name in ("a.b0.c", "a.x", "a.b", "a.c", "a.bc"))


def test_without_mix_cfg_there_is_one_rule() -> None:
    migration = translated({"disable_names": ["lm_head", "model.layers.0.mlp.down_proj"]})
    (rule,) = rules(migration)
    assert rule["include"] == ["*"]
    assert rule["exclude"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert migration.recipe.raw_spec["process"] == [rule]


def test_what_is_out_of_reach_is_told() -> None:
    mix = {"*": "w8a8_dynamic", "*.mlp.*": "w8a8", "[z-a]": "float", "lm_head": "w8a8"}
    migration = translated(calib_params={"mix_cfg": mix})
    assert outcome(migration, ["model.layers.0.mlp.up_proj"]) == {"model.layers.0.mlp.up_proj": LayerKind.W8A8_DYNAMIC}
    assert migration.dropped == (
        "spec.calib_params.mix_cfg['lm_head'] (disable_names keeps it in floating point)",
        "spec.calib_params.mix_cfg['*.mlp.*'] (never reached behind '*')",
        "spec.calib_params.mix_cfg['[z-a]'] (no name can match it)",
    )


def test_everything_float_leaves_no_rule() -> None:
    migration = translated(calib_params={"mix_cfg": {"*": "float"}})
    assert migration.recipe.raw_spec["process"] == []


INT8 = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
INT4 = {**INT8, "dtype": "int4"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
TOKEN = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
MIXED = {**STATIC, "scope": "pd_mix"}
SPARSE = {**INT8, "method": "sparse"}
LOWBIT = {"w_bit": 4, "is_lowbit": True}
GROUPS = {**LOWBIT, "open_outlier": False}


@pytest.mark.parametrize(
    ("calib", "act", "weight"),
    [
        ({}, STATIC, INT8),
        ({"act_method": 2}, {**STATIC, "method": "histogram"}, INT8),
        ({"act_method": 3}, {**STATIC, "method": "histogram"}, INT8),
        ({"w_method": "GPTQ"}, STATIC, {**INT8, "method": "gptq", "ext": {"percdamp": 0.01}}),
        ({"w_method": "GPTQ", "percdamp": 0.1}, STATIC, {**INT8, "method": "gptq", "ext": {"percdamp": 0.1}}),
        ({"pdmix": True}, MIXED, INT8),
        ({"pdmix": True, "act_method": 2}, {**MIXED, "method": "histogram"}, INT8),
        ({"is_dynamic": True, "act_method": 2}, TOKEN, INT8),
        ({"is_dynamic": True, "is_lowbit": True}, TOKEN, INT8),
        (
            {"is_dynamic": True, "is_lowbit": True, "open_outlier": False},
            TOKEN,
            {**INT8, "scope": "per_group", "ext": {"group_size": 64}},
        ),
        ({"a_bit": 16}, None, INT8),
        ({"a_bit": 16, "w_sym": False}, None, {**INT8, "symmetric": False}),
        ({"w_bit": 4, "a_bit": 16}, None, INT4),
        ({**GROUPS, "a_bit": 16, "group_size": 32}, None, {**INT4, "scope": "per_group", "ext": {"group_size": 32}}),
        ({**GROUPS, "is_dynamic": True}, TOKEN, {**INT4, "scope": "per_group", "ext": {"group_size": 64}}),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, {**TOKEN, "dtype": "int4"}, INT4),
        (LOWBIT, STATIC, {**SPARSE, "ext": {"fraction": 0.01}}),
        ({**LOWBIT, "act_method": 2}, {**STATIC, "method": "histogram"}, {**SPARSE, "ext": {"fraction": 0.01}}),
        ({**LOWBIT, "fraction": 0.05, "use_sigma": False}, STATIC, {**SPARSE, "ext": {"fraction": 0.05}}),
        (
            {**LOWBIT, "use_sigma": True, "sigma_factor": 3.5, "fraction": 0.05},
            STATIC,
            {**SPARSE, "ext": {"use_sigma": True, "sigma_factor": 3.5}},
        ),
        (
            {"co_sparse": True, "use_sigma": True, "sigma_factor": 3.5, "fraction": 0.05},
            STATIC,
            {**SPARSE, "ext": {"fraction": 0.05}},
        ),
    ],
)
def test_qconfigs(calib: dict[str, Any], act: dict[str, Any] | None, weight: dict[str, Any]) -> None:
    (rule,) = rules(translated(calib))
    assert rule["qconfig"] == ({"weight": weight} if act is None else {"act": act, "weight": weight})
    layer_form(LinearQConfig.model_validate(rule["qconfig"]))


def test_types_of_mix_cfg_take_methods_from_calib_cfg() -> None:
    mix = {"a": "w8a8", "b": "w8a8_dynamic", "c": "w8a16", "d": "w4a8_dynamic", "e": "float"}
    found = {
        rule["include"][0]: rule["qconfig"]
        for rule in rules(translated({"act_method": 2, "group_size": 32, **LOWBIT}, calib_params={"mix_cfg": mix}))
    }
    assert found == {
        "a": {"act": {**STATIC, "method": "histogram"}, "weight": INT8},
        "b": {"act": TOKEN, "weight": INT8},
        "c": {"weight": INT8},
        "d": {"act": TOKEN, "weight": {**INT4, "scope": "per_group", "ext": {"group_size": 32}}},
        "*": {"act": {**STATIC, "method": "histogram"}, "weight": {**SPARSE, "ext": {"fraction": 0.01}}},
    }


def test_keys_of_one_type_share_a_rule() -> None:
    mix = {"a.0.x": "w8a16", "a.1.x": "w8a16", "*.q": "w8a8_dynamic", "*.k": "w8a8_dynamic", "*.v": "w8a8"}
    found = rules(translated(calib_params={"mix_cfg": mix}))
    assert [(rule["include"], rule["exclude"]) for rule in found] == [
        (["a.{0,1}.x"], []),
        (["*.q", "*.k"], []),
        (["*"], ["lm_head", "a.{0,1}.x", "*.q", "*.k"]),
    ]

"""``anti_cfg``: which processor takes the place of which method, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from slim_core.migration import Migration
from slim_core.recipe import recipe_from_dict
from slim_llm.v0.translate import migrate

ALL = ["norm-linear", "linear-linear", "ov", "up-down"]
ITERATIVE = {
    "type": "iter_smooth",
    "alpha": 0.9,
    "scale_min": 1e-5,
    "symmetric": True,
    "enable_subgraph_type": ALL,
    "exclude": ["*expert*"],
}
NORM_ONLY = {**ITERATIVE, "enable_subgraph_type": ["norm-linear"]}
INT8 = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
LAYER = "model.layers.3"


def translated(anti: dict[str, Any] | None, **calib: Any) -> Migration:
    body = {"calib_cfg": {"mm_tensor": False, **calib}, "calib_dataset": "set.jsonl"}
    body |= {} if anti is None else {"anti_cfg": anti}
    return migrate(recipe_from_dict({"apiversion": "modelslim_v0", "spec": body}))


def process(migration: Migration) -> list[dict[str, Any]]:
    return migration.recipe.raw_spec["process"]


@pytest.mark.parametrize(
    ("anti", "processor"),
    [
        ({"anti_method": "m1"}, {"type": "smooth_quant", "alpha": 0.5, "symmetric": True, "exclude": ["*expert*"]}),
        ({}, NORM_ONLY),
        ({"anti_method": "m2"}, NORM_ONLY),
        ({"anti_method": "m4"}, ITERATIVE),
        ({"anti_method": "m5"}, NORM_ONLY),
        ({"anti_method": "m6"}, {"type": "flex_smooth_quant", "exclude": ["*expert*"]}),
        (
            {"anti_method": "m6", "flex_config": {"alpha": 0.75, "beta": 0.1}},
            {"type": "flex_smooth_quant", "alpha": 0.75, "beta": 0.1, "exclude": ["*expert*"]},
        ),
        (
            {"anti_method": "m6", "flex_config": {"alpha": 0.75}},
            {"type": "flex_smooth_quant", "exclude": ["*expert*"]},
        ),
        (
            {"anti_method": "m3"},
            {
                "type": "awq",
                "weight_qconfig": INT8,
                "enable_subgraph_type": ["norm-linear"],
                "exclude": ["*expert*"],
            },
        ),
    ],
)
def test_methods(anti: dict[str, Any], processor: dict[str, Any]) -> None:
    first, second = process(translated(anti))
    assert first == processor
    assert second["type"] == "linear_quant"


def test_no_anti_cfg_no_smoothing() -> None:
    assert [one["type"] for one in process(translated(None))] == ["linear_quant"]


@pytest.mark.parametrize(("method", "warned"), [("m1", 0), ("m2", 1), ("m3", 0), ("m4", 0), ("m5", 1), ("m6", 0)])
def test_methods_without_an_equivalent_are_told(method: str, warned: int) -> None:
    approximations = translated({"anti_method": method}).approximations
    assert len(approximations) == warned
    assert all(f"spec.anti_cfg.anti_method: {method} has no equivalent; iter_smooth" in text for text in approximations)


@pytest.mark.parametrize(
    ("method", "names", "exclude"),
    [
        ("m4", [f"{LAYER}.self_attn.q_proj"], [f"{LAYER}.input_layernorm"]),
        ("m4", [f"{LAYER}.self_attn.{one}_proj" for one in "qk"], [f"{LAYER}.input_layernorm"]),
        ("m6", [f"{LAYER}.self_attn.v_proj"], [f"{LAYER}.input_layernorm", f"{LAYER}.self_attn.v_proj"]),
        ("m6", [f"{LAYER}.self_attn.o_proj"], [f"{LAYER}.self_attn.v_proj"]),
        ("m4", [f"{LAYER}.mlp.gate_proj"], [f"{LAYER}.post_attention_layernorm"]),
        ("m4", [f"{LAYER}.mlp.up_proj"], [f"{LAYER}.post_attention_layernorm", f"{LAYER}.mlp.up_proj"]),
        ("m4", [f"{LAYER}.mlp.down_proj"], [f"{LAYER}.mlp.up_proj"]),
        ("m3", [f"{LAYER}.self_attn.v_proj"], [f"{LAYER}.input_layernorm"]),
        ("m3", [f"{LAYER}.mlp.down_proj"], []),
        ("m1", [f"{LAYER}.self_attn.q_proj"], []),
    ],
)
def test_names_of_linears_become_names_of_what_feeds_them(method: str, names: list[str], exclude: list[str]) -> None:
    """v0 leaves a group alone if one of its linears is named; v1 names a group by the module in front of it."""
    migration = translated({"anti_method": method, "disable_anti_names": names})
    assert process(migration)[0]["exclude"] == [*exclude, "*expert*"]
    assert not migration.approximations
    assert migration.dropped == (("spec.anti_cfg.disable_anti_names (m1 never read it)",) if method == "m1" else ())


def test_names_of_all_layers_share_a_pattern() -> None:
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(80)]
    migration = translated({"anti_method": "m6", "disable_anti_names": names})
    assert process(migration)[0]["exclude"] == ["model.layers.{0..79}.self_attn.v_proj", "*expert*"]


def test_a_name_of_an_unknown_family_is_kept_and_told() -> None:
    migration = translated({"anti_method": "m4", "disable_anti_names": ["h.0.c_attn[1]", "x"]})
    assert process(migration)[0]["exclude"] == ["h.0.c_attn\\[1\\]", "x", "*expert*"]
    assert [text.split("known for ")[1].split(";")[0] for text in migration.approximations] == [
        "'h.0.c_attn[1]'",
        "'x'",
    ]


def test_awq_rounds_as_the_linears_are_rounded() -> None:
    anti = {"anti_method": "m3", "w_bit": 4, "a_bit": 16, "w_sym": False}
    plain = translated(anti, a_bit=16, w_bit=4, w_sym=False)
    assert process(plain)[0]["weight_qconfig"] == {**INT8, "dtype": "int4", "symmetric": False}
    assert plain.approximations == ()
    assert plain.dropped == ("spec.anti_cfg.a_bit",)
    other = translated(anti, w_bit=4, is_lowbit=True)
    assert process(other)[0]["weight_qconfig"] == INT8
    assert other.approximations == (
        "spec.anti_cfg.w_bit: the search rounds weights as calib_cfg says, to int8",
        "spec.anti_cfg.w_sym: the search rounds weights as calib_cfg says, symmetric",
    )


def test_fields_that_no_method_reads_are_listed() -> None:
    anti = {"anti_method": "m4", "w_bit": 8, "a_bit": 8, "w_sym": True, "dev_type": "npu", "dev_id": 0}
    assert translated(anti | {"flex_config": {"alpha": 0.5}}).dropped == (
        *(f"spec.anti_cfg.{name}" for name in ("w_bit", "a_bit", "w_sym", "dev_type", "dev_id")),
        "spec.anti_cfg.flex_config (only m6 reads it)",
    )
    assert translated({"anti_method": "m6", "flex_config": {"beta": 0.5}}).dropped == (
        "spec.anti_cfg.flex_config.beta (both exponents are searched unless both are given)",
    )


def test_the_smoothing_of_the_low_bit_engine() -> None:
    alone = translated(None, do_smooth=True, is_lowbit=True, w_bit=4)
    assert process(alone)[0] == ITERATIVE
    assert alone.approximations == (
        "spec.calib_cfg.do_smooth: the smoothing of the low-bit engine is replaced by iter_smooth",
    )
    both = translated({"anti_method": "m4"}, do_smooth=True, is_lowbit=True, w_bit=4)
    assert [one["type"] for one in process(both)] == ["iter_smooth", "linear_quant"]
    assert both.approximations == ("spec.calib_cfg.do_smooth: left out, since anti_cfg smooths already",)
    idle = translated(None, do_smooth=True)
    assert [one["type"] for one in process(idle)] == ["linear_quant"]
    assert idle.dropped == ("spec.calib_cfg.do_smooth (only is_lowbit reads it)",)


def test_smoothing_for_float_activations_is_told() -> None:
    said = "spec.anti_cfg: no linear has quantized activations, so smoothing can only lose accuracy"
    assert translated({"anti_method": "m4"}, a_bit=16).approximations == (said,)
    assert translated({"anti_method": "m3"}, a_bit=16).approximations == ()

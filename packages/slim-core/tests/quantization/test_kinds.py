"""The legality table, as a recipe meets it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from slim_core.errors import SchemaValidateError, UnsupportedError
from slim_core.processors.linear_quant import LinearQuantConfig
from slim_core.quantization.kinds import LayerKind, layer_form
from slim_core.recipe import LinearQConfig, load_recipe


def scheme(dtype: str, scope: str, symmetric: bool, method: str) -> dict[str, Any]:
    return {"dtype": dtype, "scope": scope, "symmetric": symmetric, "method": method}


def names(dtypes: list[str], scopes: list[str]) -> dict[str, dict[str, Any] | None]:
    method = {"dual_scale": "dualscale"}
    return {
        f"{dtype} {scope} {'sym' if symmetric else 'asym'}": scheme(
            dtype, scope, symmetric, method.get(scope, "minmax")
        )
        for dtype, scope, symmetric in itertools.product(dtypes, scopes, (True, False))
    }


EXT = {"per_group": {"group_size": 32}, "dual_scale": {"dual_block_size": 64}}
ACTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "float": {"dtype": "float", "scope": "per_tensor", "symmetric": True, "method": "none"},
} | names(
    ["int8", "int4", "fp8_e4m3", "mxfp8", "mxfp4"],
    ["per_tensor", "per_token", "per_channel", "pd_mix", "per_block", "dual_scale"],
)
WEIGHTS = {
    name: block | {"ext": EXT.get(block["scope"], {})}
    for name, block in names(
        ["int8", "int4", "fp8_e4m3", "mxfp8", "mxfp4"],
        ["per_tensor", "per_channel", "per_group", "per_block", "dual_scale"],
    ).items()
    if block
}
WEIGHT_ONLY = {
    (act, f"int{bits} {scope} {side}"): f"W{bits}A16"
    for act, bits, scope, side in itertools.product(
        ("none", "float"), (8, 4), ("per_channel", "per_group"), ("sym", "asym")
    )
}
LEGAL: dict[tuple[str, str], str] = WEIGHT_ONLY | {
    ("int8 per_tensor sym", "int8 per_channel sym"): "W8A8",
    ("int8 per_tensor asym", "int8 per_channel sym"): "W8A8",
    ("int8 pd_mix asym", "int8 per_channel sym"): "W8A8_MIX",
    ("int8 per_token sym", "int8 per_channel sym"): "W8A8_DYNAMIC",
    ("int8 per_token sym", "int8 per_group sym"): "W8A8_DYNAMIC",
    ("int8 per_token sym", "int4 per_channel sym"): "W4A8_DYNAMIC",
    ("int8 per_token sym", "int4 per_group sym"): "W4A8_DYNAMIC",
    ("int4 per_token sym", "int4 per_channel sym"): "W4A4_DYNAMIC",
    ("int4 per_token sym", "int4 per_channel asym"): "W4A4_DYNAMIC",
    ("int4 per_token sym", "int4 per_group sym"): "W4A4_DYNAMIC",
    ("int4 per_token sym", "int4 per_group asym"): "W4A4_DYNAMIC",
    ("fp8_e4m3 per_token sym", "fp8_e4m3 per_channel sym"): "WFP8AFP8_DYNAMIC",
    ("mxfp8 per_block sym", "mxfp8 per_block sym"): "W8A8_MXFP8",
    ("mxfp8 per_block sym", "mxfp4 per_block sym"): "W4A8_MXFP",
    ("mxfp4 per_block sym", "mxfp4 per_block sym"): "W4A4_MXFP4",
    ("mxfp4 dual_scale sym", "mxfp4 dual_scale sym"): "W4A4_MXFP4_DUALSCALE",
}


def recipe(folder: Path, qconfig: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        "apiversion: modelslim_v1\nspec:\n  process:\n    - type: linear_quant\n      qconfig:\n"
        + "".join(f"        {key}: {yaml.safe_dump(part, default_flow_style=True)}" for key, part in qconfig.items())
        + "  save:\n    - type: ascendv1_saver\n"
    )
    return path


def block(act: str, weight: str) -> dict[str, Any]:
    return ({} if ACTS[act] is None else {"act": ACTS[act]}) | {"weight": WEIGHTS[weight]}


@pytest.mark.parametrize("act", list(ACTS))
def test_every_pair(act: str) -> None:
    for weight in WEIGHTS:
        config = LinearQConfig.model_validate(block(act, weight))
        if kind := LEGAL.get((act, weight)):
            form = layer_form(config)
            assert form.kind is LayerKind(kind)
            assert form.kind.is_microscaling == weight.startswith("mx")
            assert form.symmetric is weight.endswith(" sym")
            assert form.group_size == (32 if "per_group" in weight else 0)
            assert form.outer_block == (64 if "dual_scale" in weight else 0)
            assert form.for_width(32).group_size == 0
            continue
        with pytest.raises(UnsupportedError, match="the nearest legal pair is act "):
            layer_form(config)


@pytest.mark.parametrize(
    ("act", "weight"), [("int8 per_token asym", "int8 per_channel sym"), ("none", "mxfp4 per_block sym")]
)
def test_an_illegal_pair_is_refused_when_the_recipe_is_read(tmp_path: Path, act: str, weight: str) -> None:
    file = recipe(tmp_path, block(act, weight))
    with pytest.raises(SchemaValidateError) as caught:
        load_recipe(file).spec()
    text = str(caught.value)
    assert text.startswith((f"{file}:4: spec.process[0]", f"{file}:5: spec.process[0]"))
    assert "the nearest legal pair is act " in text


@pytest.mark.parametrize(
    ("act", "weight", "near"),
    [
        (
            "int8 per_token asym",
            "int8 per_channel sym",
            "act int8 per_token symmetric, weight int8 per_channel symmetric",
        ),
        (
            "int8 per_tensor asym",
            "int8 per_channel asym",
            "act int8 per_tensor asymmetric, weight int8 per_channel symmetric",
        ),
        (
            "int8 per_tensor sym",
            "int4 per_channel sym",
            "act int8 per_token symmetric, weight int4 per_channel symmetric",
        ),
        (
            "int8 per_token sym",
            "int8 per_group asym",
            "act int8 per_token symmetric, weight int8 per_group symmetric",
        ),
        ("none", "mxfp8 per_block sym", "act mxfp8 per_block symmetric, weight mxfp8 per_block symmetric"),
    ],
)
def test_the_pair_suggested_is_the_obvious_one(act: str, weight: str, near: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        layer_form(LinearQConfig.model_validate(block(act, weight)))
    assert f"the nearest legal pair is {near} (" in str(caught.value)


@pytest.mark.parametrize(
    ("act", "weight", "side", "method", "allowed"),
    [
        ("int8 per_token sym", "int8 per_channel sym", "act", "histogram", "use 'minmax'"),
        ("none", "int8 per_channel asym", "weight", "ssz", "use 'minmax' or 'gptq'"),
        ("none", "int4 per_channel sym", "weight", "sparse", "use 'minmax' or 'ssz' or 'gptq'"),
        ("none", "int8 per_channel sym", "weight", "mse_round", "use 'minmax' or 'ssz' or 'gptq' or 'sparse'"),
        ("none", "int8 per_channel sym", "weight", "sparse", "use act int8 per_tensor, or another weight method"),
        ("mxfp8 per_block sym", "mxfp8 per_block sym", "weight", "ceil_x", "use 'minmax' or 'mse_round'"),
    ],
)
def test_methods_belong_to_schemes(tmp_path: Path, act: str, weight: str, side: str, method: str, allowed: str) -> None:
    qconfig = block(act, weight)
    qconfig[side] = qconfig[side] | {"method": method}
    with pytest.raises(SchemaValidateError, match=rf"recipe\.yaml:\d+: spec\.process\[0\].*{method}.*{allowed}"):
        load_recipe(recipe(tmp_path, qconfig)).spec()


def test_a_sparse_weight_makes_another_kind() -> None:
    qconfig = block("int8 per_tensor asym", "int8 per_channel sym")
    qconfig["weight"] = qconfig["weight"] | {"method": "sparse"}
    assert layer_form(LinearQConfig.model_validate(qconfig)).kind is LayerKind.W8A8S


@pytest.mark.parametrize(
    ("act", "weight", "ext", "text"),
    [
        ("none", "int8 per_group sym", {}, "scope per_group needs ext.group_size"),
        ("mxfp4 dual_scale sym", "mxfp4 dual_scale sym", {}, "scope dual_scale needs ext.dual_block_size"),
        ("mxfp4 dual_scale sym", "mxfp4 dual_scale sym", {"dual_block_size": 48}, "48, which 32 does not divide"),
    ],
)
def test_sizes_that_a_scope_needs(act: str, weight: str, ext: dict[str, int], text: str) -> None:
    qconfig = block(act, weight)
    qconfig["weight"] = qconfig["weight"] | {"ext": ext}
    with pytest.raises(UnsupportedError, match=text):
        layer_form(LinearQConfig.model_validate(qconfig))


def test_gptq_has_a_group_size_of_its_own() -> None:
    qconfig = block("none", "int4 per_group sym")
    qconfig["weight"] = qconfig["weight"] | {"ext": {}, "method": "gptq"}
    assert layer_form(LinearQConfig.model_validate(qconfig)).group_size == 128


def test_defaults(tmp_path: Path) -> None:
    config = load_recipe(recipe(tmp_path, {"act": {}, "weight": {}})).spec().process[0]
    assert isinstance(config, LinearQuantConfig)
    assert layer_form(config.qconfig).kind is LayerKind.W8A8
    assert {kind for kind in LayerKind if kind.has_static_input} == {"W8A8", "W8A8S", "W8A8_MIX"}

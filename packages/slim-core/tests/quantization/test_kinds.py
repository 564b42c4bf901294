"""The legality table, as a recipe meets it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from slim_core.errors import SchemaValidateError, UnsupportedError
from slim_core.processors.linear_quant import LinearQuantConfig
from slim_core.quantization.kinds import LayerKind, layer_kind
from slim_core.recipe import LinearQConfig, load_recipe

ACTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "float": {"dtype": "float", "scope": "per_tensor", "symmetric": True, "method": "none"},
} | {
    f"{dtype} {scope} {'sym' if symmetric else 'asym'}": {
        "dtype": dtype,
        "scope": scope,
        "symmetric": symmetric,
        "method": "minmax",
    }
    for dtype in ("int8", "int4", "fp8_e4m3")
    for scope in ("per_tensor", "per_token", "per_channel")
    for symmetric in (True, False)
}
WEIGHTS: dict[str, dict[str, Any]] = {
    f"{dtype} {scope} {'sym' if symmetric else 'asym'}": {
        "dtype": dtype,
        "scope": scope,
        "symmetric": symmetric,
        "method": "minmax",
    }
    for dtype in ("int8", "int4", "fp8_e4m3")
    for scope in ("per_tensor", "per_channel", "per_group")
    for symmetric in (True, False)
}
LEGAL = {
    ("none", "int8 per_channel sym"): LayerKind.W8A16,
    ("float", "int8 per_channel sym"): LayerKind.W8A16,
    ("none", "int8 per_channel asym"): LayerKind.W8A16,
    ("float", "int8 per_channel asym"): LayerKind.W8A16,
    ("int8 per_tensor sym", "int8 per_channel sym"): LayerKind.W8A8,
    ("int8 per_tensor asym", "int8 per_channel sym"): LayerKind.W8A8,
    ("int8 per_token sym", "int8 per_channel sym"): LayerKind.W8A8_DYNAMIC,
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


@pytest.mark.parametrize(("act", "weight"), list(itertools.product(ACTS, WEIGHTS)))
def test_every_pair(tmp_path: Path, act: str, weight: str) -> None:
    file = recipe(tmp_path, block(act, weight))
    if kind := LEGAL.get((act, weight)):
        config = load_recipe(file).spec().process[0]
        assert isinstance(config, LinearQuantConfig)
        assert layer_kind(config.qconfig) is kind
        return
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
            "act int8 per_tensor symmetric, weight int8 per_channel symmetric",
        ),
        ("none", "int4 per_channel sym", "act float, weight int8 per_channel symmetric"),
        ("float", "int8 per_group asym", "act float, weight int8 per_channel asymmetric"),
    ],
)
def test_the_pair_suggested_is_the_obvious_one(act: str, weight: str, near: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        layer_kind(LinearQConfig.model_validate(block(act, weight)))
    assert f"the nearest legal pair is {near} (" in str(caught.value)


@pytest.mark.parametrize(("side", "method"), [("act", "histogram"), ("weight", "gptq"), ("weight", "ssz")])
def test_methods_that_are_not_there_yet(tmp_path: Path, side: str, method: str) -> None:
    qconfig = block("int8 per_tensor asym", "int8 per_channel sym")
    qconfig[side] = qconfig[side] | {"method": method}
    file = recipe(tmp_path, qconfig)
    with pytest.raises(SchemaValidateError, match=rf"recipe\.yaml:\d+: spec\.process\[0\].*{method}.*use 'minmax'"):
        load_recipe(file).spec()


def test_defaults(tmp_path: Path) -> None:
    config = load_recipe(recipe(tmp_path, {"act": {}, "weight": {}})).spec().process[0]
    assert isinstance(config, LinearQuantConfig)
    assert layer_kind(config.qconfig) is LayerKind.W8A8
    assert [kind.needs_data for kind in LayerKind] == [False, True, False, False]

"""``quarot`` and ``adapt_rotation``: their fields, and where they may stand in a recipe."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import SchemaValidateError, UnexpectedError, UnsupportedError
from slim_core.processors.adapt_rotation import AdaptRotation, AdaptRotationConfig
from slim_core.processors.base import create_processor
from slim_core.processors.quarot import Quarot, QuarotConfig
from slim_core.recipe import Phase, SpecV1, dump_recipe, recipe_from_dict

FIRST: dict[str, Any] = {"type": "adapt_rotation", "stage": 1}
SECOND: dict[str, Any] = {"type": "adapt_rotation", "stage": 2}
QUAROT: dict[str, Any] = {"type": "quarot"}
SMOOTH: dict[str, Any] = {"type": "iter_smooth"}


def spec(process: list[dict[str, Any]], *stages: list[dict[str, Any]]) -> SpecV1:
    content = {"process": process, "prior": [{"process": stage} for stage in stages]}
    return recipe_from_dict({"apiversion": "modelslim_v1", "spec": content}).spec()


def problems(process: list[dict[str, Any]], *stages: list[dict[str, Any]]) -> list[str]:
    with pytest.raises(SchemaValidateError) as caught:
        spec(process, *stages)
    return [line.split(": ", 1)[1] if line.startswith("<") else line for line in str(caught.value).splitlines()]


def quarot(**fields: Any) -> QuarotConfig:
    (config,) = spec([QUAROT | fields]).process
    assert isinstance(config, QuarotConfig)
    return config


def test_defaults_of_quarot() -> None:
    config = quarot()
    assert (config.online, config.block_size, config.max_tp_size) == (False, -1, 4)
    assert (config.down_proj_online_layers, config.export_extra_info) == ((), True)
    assert QuarotConfig.phase is Phase.ROTATION


@given(st.integers(-3, 300))
def test_sizes_are_powers_of_two(value: int) -> None:
    power = value >= 1 and value.bit_count() == 1
    for field, allowed in (("block_size", power or value == -1), ("max_tp_size", power)):
        if allowed:
            assert getattr(quarot(**{field: value}), field) == value
        else:
            (text,) = problems([QUAROT | {field: value}])
            assert f"spec.process[0].{field}: got {value}; must be" in text
            assert "a power of two" in text


@pytest.mark.parametrize("layers", [[], [-1], [0, 3, 999]])
def test_layers_are_not_checked_before_the_model_is_known(layers: list[int]) -> None:
    assert quarot(down_proj_online_layers=layers).down_proj_online_layers == tuple(layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"online": "yes"}, "online: got 'yes'; must be true or false"),
        ({"online": 1}, "online: got 1; must be true or false"),
        ({"block_size": True}, "block_size: got True; must be a number"),
        ({"block_size": 8.5}, "block_size: got 8.5; must be a valid integer"),
        ({"max_tp_size": None}, "max_tp_size: got nothing; must be a valid integer"),
        ({"down_proj_online_layers": [1.5]}, "down_proj_online_layers[0]: got 1.5"),
        ({"down_proj_online_layers": 3}, "down_proj_online_layers: got 3; must be a list"),
        ({"export_extra_info": "no"}, "export_extra_info: got 'no'"),
        ({"include": ["*"]}, "include: unknown field"),
        ({"stage": 2}, "stage: unknown field"),
    ],
)
def test_bad_fields_of_quarot(fields: dict[str, Any], message: str) -> None:
    (text,) = problems([QUAROT | fields])
    assert f"spec.process[0].{message}" in text


def adapt(stage: int, **fields: Any) -> AdaptRotationConfig:
    parts = [FIRST | fields] if stage == 1 else [FIRST], [SECOND | fields] if stage == 2 else [SECOND]
    made = spec(parts[1], parts[0])
    config = made.prior[0].process[0] if stage == 1 else made.process[0]
    assert isinstance(config, AdaptRotationConfig)
    return config


def test_defaults_of_adapt_rotation() -> None:
    first, second = adapt(1), adapt(2)
    assert (first.steps, first.quant_dtype, first.layer_type, first.max_samples) == (20, "int4", ("up_proj",), 2048)
    assert first.block_size == second.block_size == -1
    assert (second.online, second.max_tp_size, second.down_proj_online_layers) == (False, 4, ())
    assert (first.stage, second.stage) == (1, 2)


BOUNDS = [
    (1, "steps", [1, 1000], [0, 1001, -1]),
    (1, "max_samples", [1, 100_000], [0, 100_001]),
    (1, "quant_dtype", ["int4", "int8"], ["int16", "float"]),
    (1, "layer_type", [["a"], ["x" * 128, "y"]], [[], [""], ["  "], ["x" * 129], "up_proj"]),
    (2, "max_tp_size", [1, 2, 64], [0, 3, 128]),
    (2, "down_proj_online_layers", [[], [0, 5]], [[-1], [True]]),
    (2, "online", [True, False], ["true", 2]),
]


@pytest.mark.parametrize(("stage", "field", "inside", "outside"), BOUNDS)
def test_bounds(stage: int, field: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(adapt(stage, **{field: value}), field) == expected
    for value in outside:
        with pytest.raises(SchemaValidateError, match=rf"\.{field}"):
            adapt(stage, **{field: value})


@pytest.mark.parametrize("value", [0, 3, "one", True, None, 1.5])
def test_there_are_two_stages(value: Any) -> None:
    (text,) = problems([{"type": "adapt_rotation", "stage": value}])
    assert "spec.process[0].stage: got" in text
    (text,) = problems([{"type": "adapt_rotation"}])
    assert "spec.process[0].stage: required field is missing" in text


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [
        *((1, "online", False), (1, "max_tp_size", 4), (1, "down_proj_online_layers", [])),
        *((2, "steps", 20), (2, "quant_dtype", "int4"), (2, "layer_type", ["up_proj"]), (2, "max_samples", 2048)),
    ],
)
def test_a_field_of_the_other_stage(stage: int, field: str, value: Any) -> None:
    """Even with its default value; the message lists the stage's own fields."""
    (text,) = problems(
        [SECOND | ({field: value} if stage == 2 else {})], [FIRST | ({field: value} if stage == 1 else {})]
    )
    assert f"stage {stage} has no field {field!r}; its fields are type, stage, block_size, " in text
    assert ("spec.prior[0].process[0]" if stage == 1 else "spec.process[0]") in text
    assert ("steps" in text.split("its fields are")[1]) == (stage == 1)
    (text,) = problems([SECOND | {"export_extra_info": True}], [FIRST])
    assert "export_extra_info: unknown field" in text


def test_the_right_places_pass() -> None:
    assert spec([SECOND, SMOOTH], [FIRST]).process[1].type == "iter_smooth"
    assert spec([{"type": "group", "configs": [SECOND, SMOOTH]}], [{"type": "group", "configs": [FIRST]}]).prior
    assert spec([QUAROT, SMOOTH]).process


@pytest.mark.parametrize(
    ("process", "stages", "where", "message"),
    [
        ([FIRST], [], "spec.process[0]", "stage 1 only learns, so it stands in a stage of prior"),
        ([FIRST, SECOND], [], "spec.process[0]", "stage 1 only learns"),
        ([SECOND], [], "spec.process[0]", "stage 2 uses the rotation that stage 1 learns; add adapt_rotation with"),
        ([SMOOTH], [[FIRST]], "spec.prior[0].process[0]", "stage 1 learns a rotation that nothing uses"),
        ([SECOND], [[FIRST], [FIRST]], "spec.prior[0].process[0]", "two stages learn a rotation"),
        ([], [[FIRST, SECOND]], "spec.prior[0].process[1]", "rotates the model that is written; move it to process"),
        ([SECOND, QUAROT], [[FIRST]], "spec.process[0]", "quarot rotates the model too; keep one of them"),
        ([QUAROT, QUAROT], [], "spec.process[1]", "quarot rotates the model too; keep one of them"),
        ([SMOOTH], [[QUAROT]], "spec.prior[0].process[0]", "quarot rotates the model that is written"),
        (
            [{"type": "group", "configs": [SMOOTH, {"type": "group", "configs": [SMOOTH]}]}],
            [[{"type": "group", "configs": [QUAROT]}]],
            "spec.prior[0].process[0].configs[0]",
            "move it to process",
        ),
        (
            [SECOND | {"block_size": 8}],
            [[FIRST]],
            "spec.process[0]",
            "block_size is 8 here and -1 in stage 1; they must",
        ),
        ([SMOOTH, QUAROT], [], "spec.process[1]", "move quarot above process[0] (iter_smooth)"),
        ([SMOOTH, SECOND], [[FIRST]], "spec.process[1]", "move adapt_rotation above process[0] (iter_smooth)"),
    ],
)
def test_wrong_places(
    process: list[dict[str, Any]], stages: list[list[dict[str, Any]]], where: str, message: str
) -> None:
    found = problems(process, *stages)
    assert any(f"{where}: " in text and message in text for text in found), found


def test_the_effective_recipe_reads_back() -> None:
    content = {"process": [SECOND | {"online": True}], "prior": [{"process": [FIRST | {"steps": 3}]}]}
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": content})
    import yaml

    again = recipe_from_dict(yaml.safe_load(dump_recipe(recipe)))
    assert again.spec() == recipe.spec()
    assert set(again.raw_spec["process"][0]) == (
        {"type", "stage", "block_size", "online", "max_tp_size", "down_proj_online_layers"}
    )


def test_a_service_without_examples_cannot_rotate() -> None:
    processor = create_processor(quarot(), "process[3]")
    assert isinstance(processor, Quarot)
    model: Any = None
    with pytest.raises(UnsupportedError, match=r"spec\.process\[3\].*gives no example of its input"):
        processor.prepare(model, None)
    with pytest.raises(UnexpectedError, match="was not prepared"):
        processor.notes()
    second = create_processor(adapt(2), "process[0]")
    assert isinstance(second, AdaptRotation)
    assert not second.learns
    with pytest.raises(UnexpectedError, match="no stage has learned a rotation"):
        second.inherit({}, model)
    first = create_processor(adapt(1), "prior[0].process[0]")
    assert first.learns
    with pytest.raises(UnexpectedError, match="no processor uses the rotation"):
        first.watches([], [processor])

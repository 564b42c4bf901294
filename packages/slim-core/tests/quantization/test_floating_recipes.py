"""What recipes may say of FP8 and of the microscaling formats."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from slim_core.errors import UnsupportedError
from slim_core.model.units import LinearInfo
from slim_core.quantization.building import check_shape, needs_of
from slim_core.quantization.kinds import LayerForm, LayerKind, layer_form
from slim_core.recipe import LinearQConfig
from slim_core.recipe.qconfig import WeightConfig

MXFP4 = {"dtype": "mxfp4", "scope": "per_block"}
DUAL = {"dtype": "mxfp4", "scope": "dual_scale", "method": "dualscale"}


def blocks(act: dict[str, Any] | None = None, weight: dict[str, Any] | None = None) -> LinearQConfig:
    """MXFP4 on both sides, with these settings added."""
    return LinearQConfig.model_validate({"act": MXFP4 | (act or {}), "weight": MXFP4 | (weight or {})})


def dual(act: int | None, weight: int) -> LinearQConfig:
    ext = {"ext": {"dual_block_size": act}} if act else {}
    return LinearQConfig.model_validate({"act": DUAL | ext, "weight": DUAL | {"ext": {"dual_block_size": weight}}})


@pytest.mark.parametrize("axes", [-1, 1, [-1], [1]])
def test_axes_that_run_along_the_input(axes: int | list[int]) -> None:
    assert layer_form(blocks(weight={"ext": {"axes": axes}})).kind is LayerKind.W4A4_MXFP4


@pytest.mark.parametrize(
    ("side", "axes"), [("weight", 0), ("weight", -2), ("weight", [0]), ("weight", [0, 1]), ("weight", []), ("act", 1)]
)
def test_axes_that_do_not(side: str, axes: int | list[int]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        layer_form(blocks(**{side: {"ext": {"axes": axes}}}))
    assert str(caught.value) == (
        f"qconfig.{side}.ext.axes: ext.axes is {axes}, but the blocks of a linear run along its input features "
        "(use -1, or leave it out)"
    )


def test_axes_without_blocks_are_only_warned_about() -> None:
    config = LinearQConfig.model_validate({"weight": {"ext": {"axes": 0}}})
    assert layer_form(config).kind is LayerKind.W8A16
    assert config.warnings() == ["weight.ext.axes has no effect with method minmax and scope per_channel"]


def test_outer_blocks_of_both_sides() -> None:
    assert layer_form(dual(None, 64)).outer_block == layer_form(dual(64, 64)).outer_block == 64
    with pytest.raises(UnsupportedError, match=r"dual_block_size is 128 for the activation and 64 for the weight"):
        layer_form(dual(128, 64))
    with pytest.raises(UnsupportedError, match=r"dual_block_size is 48, which 32 does not divide"):
        layer_form(dual(None, 48))


def test_outer_blocks_must_divide_the_width() -> None:
    form = layer_form(dual(None, 64))
    check_shape(form, LinearInfo("l", "l", 128, 4, has_bias=False, in_block=True))
    for width, remedy in (
        (96, "use a multiple of 32 that divides 96, or exclude this linear"),
        (80, "exclude this linear"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            check_shape(form, LinearInfo("l", "l", width, 4, has_bias=False, in_block=True))
        assert (caught.value.where, caught.value.remedy) == ("l", remedy)
        assert f"ext.dual_block_size 64 does not divide its {width} input features" in str(caught.value)
    check_shape(LayerForm(LayerKind.W4A4_MXFP4), LinearInfo("l", "l", 40, 4, has_bias=False, in_block=True))


@pytest.mark.parametrize("config", [blocks(), dual(None, 64)])
def test_no_data_is_needed(config: LinearQConfig) -> None:
    assert needs_of(config) == frozenset()


def ceil_x(**ext: Any) -> WeightConfig:
    return WeightConfig.model_validate(MXFP4 | {"method": "ceil_x", "ext": ext})


def test_settings_of_the_search_without_effect() -> None:
    assert ceil_x(ceil_x_value=8).warnings() == []
    assert ceil_x(enable_search=True, search_min=7, search_step=0.5).warnings() == []
    assert ceil_x(enable_search=True, ceil_x_value=8).warnings() == [
        "ext.ceil_x_value has no effect with ext.enable_search true"
    ]
    assert ceil_x(search_min=7, search_max=9).warnings() == [
        "ext.search_min has no effect with ext.enable_search false",
        "ext.search_max has no effect with ext.enable_search false",
    ]


def test_a_search_of_too_many_values() -> None:
    with pytest.raises(ValidationError, match=r"ext\.search_step \(0\.001\) makes more than 1000 values to try"):
        ceil_x(enable_search=True, search_step=0.001)

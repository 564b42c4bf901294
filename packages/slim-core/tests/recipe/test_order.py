"""Rotation before smoothing before quantization, whatever way the processors are grouped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slim_core.errors import SchemaValidateError
from slim_core.recipe import Phase, ProcessorConfig, SpecV1, load_recipe, recipe_from_dict
from slim_core.recipe.order import in_order

W8A16: dict[str, Any] = {
    "type": "linear_quant",
    "qconfig": {"weight": {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}},
}
SMOOTH: dict[str, Any] = {"type": "iter_smooth"}
CACHE: dict[str, Any] = {"type": "dynamic_cache"}


class Rotates(ProcessorConfig):
    phase = Phase.ROTATION
    type: Literal["rotates"] = "rotates"


class Smooths(ProcessorConfig):
    phase = Phase.SMOOTHING
    type: Literal["smooths"] = "smooths"


class Quantizes(ProcessorConfig):
    phase = Phase.QUANTIZATION
    type: Literal["quantizes"] = "quantizes"


class Anything(ProcessorConfig):
    """What a third party brings: it says nothing of its place."""

    type: Literal["anything"] = "anything"


class Several(ProcessorConfig):
    type: Literal["several"] = "several"
    configs: tuple[ProcessorConfig, ...] = ()
    unrelated: ClassVar[tuple[int, ...]] = (1, 2)


ONE = st.sampled_from([Rotates(), Smooths(), Quantizes(), Anything()])
TREE = st.recursive(
    st.lists(ONE, max_size=4), lambda inner: st.lists(ONE | inner.map(lambda xs: Several(configs=tuple(xs))))
)


def leaves(configs: Any) -> list[Any]:
    return [leaf for one in configs for leaf in (leaves(one.configs) if isinstance(one, Several) else [one])]


@given(TREE)
def test_a_recipe_is_accepted_if_its_phases_are_sorted(configs: list[Any]) -> None:
    phases = [leaf.phase for leaf in leaves(configs) if leaf.phase is not None]
    given = tuple(configs)
    if phases == sorted(phases):
        assert in_order(given) is given
        return
    with pytest.raises(ValidationError) as caught:
        in_order(given)
    late = [i for i, phase in enumerate(phases) if phase < max(phases[: i + 1])]
    assert caught.value.error_count() == len(late)
    for details in caught.value.errors():
        found: Any = given
        for step in details["loc"]:
            found = found[step] if isinstance(step, int) else getattr(found, step)
        assert details["msg"].startswith(f"{found.type} ")


def problems(*process: dict[str, Any]) -> list[str]:
    with pytest.raises(SchemaValidateError) as caught:
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": list(process)}}).spec()
    return str(caught.value).removeprefix("[SchemaValidateError] ").splitlines()


def test_the_message_says_what_to_move_where(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "apiversion: modelslim_v1\n"
        "spec:\n"
        "  process:\n"
        "    - type: linear_quant\n"
        "      qconfig: {weight: {dtype: int8, scope: per_channel, symmetric: true, method: minmax}}\n"
        "    - type: iter_smooth\n"
    )
    with pytest.raises(SchemaValidateError) as caught:
        load_recipe(path).spec()
    assert f"{path}:6: spec.process[1]: iter_smooth smooths float weights, but linear_quant before it quantizes; " in (
        str(caught.value)
    )
    assert str(caught.value).endswith("move iter_smooth above process[0] (linear_quant)")


def test_groups_count_as_what_they_hold() -> None:
    inner = {"type": "group", "configs": [W8A16]}
    (text,) = problems({"type": "group", "configs": [inner, CACHE]}, {"type": "group", "configs": [SMOOTH]})
    assert "spec.process[1].configs[0]: iter_smooth" in text
    assert text.endswith("above process[0].configs[0].configs[0] (linear_quant)")
    (text,) = problems({"type": "group", "configs": [CACHE, SMOOTH]})
    assert "spec.process[0].configs[1]: iter_smooth smooths float weights, but dynamic_cache before it" in text


def test_every_processor_that_stands_too_late_is_named() -> None:
    found = problems(W8A16, SMOOTH, CACHE, {"type": "smooth_quant"})
    assert [text.split(": ")[1] for text in found] == ["spec.process[1]", "spec.process[3]"]


def test_prior_stages_are_held_to_it_too() -> None:
    recipe = {"process": [], "prior": [{"process": [W8A16, SMOOTH]}]}
    with pytest.raises(SchemaValidateError, match=r"spec\.prior\[0\]\.process\[1\]: iter_smooth"):
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": recipe}).spec()


def test_the_right_order_passes() -> None:
    process = [SMOOTH, {"type": "smooth_quant"}, CACHE, {"type": "group", "configs": [W8A16, CACHE]}, W8A16]
    spec = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": process}}).spec()
    assert isinstance(spec, SpecV1)
    assert [config.type for config in spec.process] == [
        *("iter_smooth", "smooth_quant", "dynamic_cache", "group", "linear_quant")
    ]

"""The fields of the closed-form smoothers: what is accepted, refused, and left out."""

from __future__ import annotations

from typing import Any

import pytest

from slim_core.errors import SchemaValidateError
from slim_core.recipe import ProcessorConfig, recipe_from_dict


class TestConfiguration:
    @pytest.mark.parametrize(
        ("kind", "field", "value", "stored"),
        [
            *(("iter_smooth", "alpha", value, float(value)) for value in (0, 0.0, 1e-5, "1e-5", 0.5, 1, 1.0)),
            *(("smooth_quant", "alpha", value, float(value)) for value in (0, "1e-1", 0.999, 1)),
            *(("iter_smooth", "scale_min", value, float(value)) for value in ("1e-5", 1e-300, 0.999)),
            *(("kv_smooth", "smooth_factor", value, float(value)) for value in ("1e-5", 0.5, 1, 7.5)),
            ("iter_smooth", "symmetric", False, False),
            ("smooth_quant", "symmetric", True, True),
            ("iter_smooth", "enable_subgraph_type", ["ov"], ("ov",)),
            ("iter_smooth", "enable_subgraph_type", [], ()),
            ("iter_smooth", "include", None, ()),
            ("smooth_quant", "exclude", None, ()),
            ("iter_smooth", "include", ["*" * 200], ("*" * 200,)),
            ("kv_smooth", "include", [], ()),
        ],
    )
    def test_what_is_accepted(self, kind: str, field: str, value: Any, stored: Any) -> None:
        (config,) = spec_of({"type": kind, field: value})
        assert getattr(config, field) == stored

    @pytest.mark.parametrize(
        ("kind", "field", "value", "message"),
        [
            *(("iter_smooth", "alpha", value, "alpha") for value in (-1e-9, 1.0001, "x", None, True, float("nan"))),
            *(("smooth_quant", "alpha", value, "alpha") for value in (-0.1, 1.5, None, [])),
            *(("iter_smooth", "scale_min", value, "scale_min") for value in (0, 1, 1.0, -1, None)),
            *(("kv_smooth", "smooth_factor", value, "smooth_factor") for value in (0, -1, None, float("inf"), False)),
            *(("iter_smooth", "symmetric", value, "must be true or false") for value in ("no", 1)),
            ("iter_smooth", "enable_subgraph_type", ["non-fusion"], "allowed: norm-linear, linear-linear, ov, up-down"),
            ("iter_smooth", "enable_subgraph_type", "ov", "must be a list"),
            ("iter_smooth", "enable_subgraph_type", None, "must be a list"),
            ("iter_smooth", "include", ["*" * 201], "at most 200 are allowed"),
            ("iter_smooth", "include", ["a["], "never closed"),
            ("kv_smooth", "include", None, "must be a list"),
            ("smooth_quant", "enable_subgraph_type", ["norm-linear"], "unknown field"),
            ("smooth_quant", "scale_min", 0.1, "unknown field"),
            ("kv_smooth", "alpha", 0.1, "unknown field"),
            ("iter_smooth", "beta", 0.1, "unknown field"),
        ],
    )
    def test_what_is_refused(self, kind: str, field: str, value: Any, message: str) -> None:
        with pytest.raises(SchemaValidateError) as caught:
            spec_of({"type": kind, field: value})
        assert f"spec.process[0].{field}" in str(caught.value)
        assert message in str(caught.value)

    def test_defaults(self) -> None:
        one, other, keys = spec_of({"type": "iter_smooth"}, {"type": "smooth_quant"}, {"type": "kv_smooth"})
        assert one.model_dump() == {
            "type": "iter_smooth",
            "alpha": 0.9,
            "scale_min": 1e-5,
            "symmetric": True,
            "include": (),
            "exclude": (),
            "enable_subgraph_type": ("norm-linear", "linear-linear", "ov", "up-down"),
        }
        plain = {"alpha": 0.5, "symmetric": True, "include": (), "exclude": ()}
        assert other.model_dump() == {"type": "smooth_quant"} | plain
        assert keys.model_dump() == {"type": "kv_smooth", "smooth_factor": 1.0, "include": ("*",), "exclude": ()}


def spec_of(*process: dict[str, Any]) -> tuple[ProcessorConfig, ...]:
    return recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": list(process)}}).spec().process

"""The smoothers that search: their fields, and what they ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slim_core.errors import SchemaValidateError, UnsupportedError
from slim_core.processors.smoothing import Smoother
from slim_core.quantization.statistics import Need
from slim_core.recipe import ProcessorConfig, recipe_from_dict

Bench = Any  # of conftest.py
EXPERTS = 12
UNIT = "layers.0"
INT8: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
INT4 = INT8 | {"dtype": "int4", "method": "ssz"}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
FLEX: dict[str, Any] = {"type": "flex_smooth_quant"}
SSZ: dict[str, Any] = {"type": "flex_awq_ssz", "qconfig": {"act": TOKEN, "weight": INT4}}
AWQ: dict[str, Any] = {"type": "awq", "weight_qconfig": INT4}
ALL = [FLEX, SSZ, AWQ]


def configured(**config: Any) -> ProcessorConfig:
    return recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}}).spec().process[0]


class TestConfiguration:
    def test_defaults(self) -> None:
        shared = {
            "include": (),
            "exclude": (),
            "enable_subgraph_type": ("norm-linear", "linear-linear", "ov", "up-down"),
        }
        assert configured(**FLEX).model_dump() == {**FLEX, "alpha": None, "beta": None, **shared}
        assert configured(**AWQ).model_dump() == {**AWQ, "weight_qconfig": INT4 | {"ext": {}}, "n_grid": 20, **shared}
        found = configured(**SSZ).model_dump()
        assert found.pop("qconfig")["weight"] == INT4 | {"ext": {}}
        assert found == {"type": "flex_awq_ssz", "alpha": None, "beta": None, **shared}
        assert configured(type="flex_awq_ssz", qconfig={"weight": INT4}).model_dump()["qconfig"]["act"] is None

    @pytest.mark.parametrize(
        "config",
        [
            *(FLEX | {"alpha": value, "beta": value} for value in (0, 0.0, "1e-5", 0.5, 1)),
            *(SSZ | {"alpha": value} for value in (0, "1e-5", 1.0)),
            *(SSZ | {"beta": value} for value in (0, 0.5, 1)),
            *(AWQ | {"n_grid": value} for value in (1, 7, 5000)),
            *(one | {"include": None, "exclude": ["*" * 200], "enable_subgraph_type": ["ov"]} for one in ALL),
            SSZ | {"qconfig": {"act": {"dtype": "float"}, "weight": INT4}},
            SSZ | {"qconfig": {"act": {}, "weight": INT8}},
            AWQ | {"weight_qconfig": {}},
            AWQ | {"weight_qconfig": {"dtype": "mxfp4", "scope": "per_block"}},
            AWQ | {"weight_qconfig": {"dtype": "fp8_e4m3"}},
            AWQ | {"weight_qconfig": {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 8}}},
            AWQ | {"weight_qconfig": {"method": "sparse"}},
            AWQ
            | {
                "weight_qconfig": {
                    "dtype": "mxfp4",
                    "scope": "dual_scale",
                    "method": "dualscale",
                    "ext": {"dual_block_size": 64},
                }
            },
        ],
    )
    def test_what_is_accepted(self, config: dict[str, Any]) -> None:
        configured(**config)

    @pytest.mark.parametrize(
        ("config", "field", "message"),
        [
            *((FLEX | {"alpha": v, "beta": 0.5}, "alpha", "alpha") for v in (-1e-9, 1.0001, "x", True, math.nan)),
            *((FLEX | {"alpha": 0.5, "beta": v}, "beta", "beta") for v in (-0.1, 2, [])),
            (FLEX | {"alpha": 0.5}, "", "beta is missing; give it beside alpha, or leave both out"),
            (FLEX | {"beta": 0.5}, "", "alpha is missing; give it beside beta, or leave both out"),
            (FLEX | {"scale_min": 0.1}, "scale_min", "unknown field"),
            *((SSZ | {"alpha": value}, "alpha", "alpha") for value in (-0.1, 1.1)),
            *((SSZ | {"beta": value}, "beta", "beta") for value in (-0.1, 1.1)),
            ({"type": "flex_awq_ssz"}, "qconfig", "qconfig"),
            (SSZ | {"qconfig": {"act": TOKEN}}, "qconfig.weight", "weight"),
            (SSZ | {"qconfig": {"act": {}, "weight": INT4}}, "", "no layer has activations int8 per_tensor"),
            (
                SSZ | {"qconfig": {"weight": INT4 | {"method": "gptq"}}},
                "",
                "method 'gptq' cannot be tried in a search",
            ),
            *((AWQ | {"n_grid": value}, "n_grid", "n_grid") for value in (0, -1, 2.5, None)),
            ({"type": "awq"}, "weight_qconfig", "weight_qconfig"),
            (AWQ | {"weight_qconfig": {"method": "gptq"}}, "", "search with 'ssz' or 'minmax'"),
            (AWQ | {"weight_qconfig": {"scope": "per_tensor"}}, "", "no layer has activations float"),
            (AWQ | {"alpha": 0.5}, "alpha", "unknown field"),
            *((one | {"enable_subgraph_type": ["qk"]}, "enable_subgraph_type", "allowed: norm-linear") for one in ALL),
            *((one | {"include": ["*" * 201]}, "include", "at most 200") for one in ALL),
        ],
    )
    def test_what_is_refused(self, config: dict[str, Any], field: str, message: str) -> None:
        with pytest.raises(SchemaValidateError) as caught:
            configured(**config)
        assert f"spec.process[0]{'.' if field else ''}{field}" in str(caught.value)
        assert message in str(caught.value)

    def test_what_has_no_effect_is_told(self, bench: Bench) -> None:
        notes = bench.smoother(bench.norm, **SSZ | {"beta": 0.5}).notes()
        assert notes == ["process[0]: beta has no effect: weights have no part in the scale"]
        (note,) = bench.smoother(bench.norm, **AWQ | {"weight_qconfig": INT4 | {"ext": {"percdamp": 0.1}}}).notes()
        assert "weight_qconfig.ext.percdamp has no effect" in note
        assert bench.smoother(bench.norm, **FLEX).notes() == []

    def test_groups_must_divide_the_width(self, bench: Bench) -> None:
        grouped = {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 5}}
        linears = [info for unit in bench.model.units for info in unit.linears]
        for config in (SSZ | {"qconfig": {"weight": grouped}}, AWQ | {"weight_qconfig": grouped}):
            with pytest.raises(UnsupportedError, match=r"layers\.0\.q: ext\.group_size 5 does not divide its 16"):
                bench.smoother(bench.norm, **config).check(linears, {})
            other = [info for info in linears if info.name == f"{UNIT}.o"]
            bench.smoother(bench.norm, **config).check(other, {})
        bench.smoother(bench.norm, **SSZ | {"qconfig": {"weight": grouped}, "alpha": 0.5}).check(linears, {})


class TestRequests:
    def test_tokens_are_kept_once_for_an_input(self, bench: Bench) -> None:
        linears = [info for unit in bench.model.units for info in unit.linears]
        smoother = bench.smoother(bench.norm, bench.ov, bench.ups[0], **FLEX)
        wanted = smoother.requests(linears, {})
        assert {name for name, needs in wanted.items() if Need.TOKENS in needs} == {
            *bench.at("q", "o", "experts.0.down_proj")
        }
        assert all(Need.CHANNELS in needs for needs in wanted.values())
        assert set(wanted) == {*bench.at("q", "k", "v", "o", "experts.0.down_proj")}
        assert smoother.working_bytes(linears, {}) > Smoother.working_bytes(smoother, linears, {})

    def test_of_many_experts_only_some_keep_tokens(self, bench: Bench) -> None:
        wanted = bench.smoother(bench.moe, **AWQ).requests([], {})
        kept = sorted(name for name, needs in wanted.items() if Need.TOKENS in needs)
        assert len(kept) == 8
        assert all(name.endswith("gate_proj") for name in kept)
        assert len(wanted) == 2 * EXPERTS  # the router is no linear

    @pytest.mark.parametrize("config", [FLEX | {"alpha": 0.5, "beta": 0.5}, SSZ | {"alpha": 0.5}])
    def test_what_is_given_is_not_searched(self, bench: Bench, config: dict[str, Any]) -> None:
        smoother = bench.smoother(bench.norm, **config)
        linears = [info for unit in bench.model.units for info in unit.linears]
        assert set(smoother.requests(linears, {}).values()) == {frozenset({Need.CHANNELS})}
        changed = [info for info in linears if info.name in bench.at("q", "k", "v")]
        assert smoother.working_bytes(linears, {}) == 4 * sum(info.in_features * info.out_features for info in changed)

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slim_core.recipe import ActConfig, LinearQConfig, QConfig, WeightConfig
from slim_core.recipe.qconfig import METHODS, Ext


def test_documented_defaults():
    act, weight = ActConfig(), WeightConfig()
    assert (act.dtype, act.scope, act.symmetric, act.method, act.ext) == ("int8", "per_tensor", False, "minmax", {})
    assert (weight.dtype, weight.scope, weight.symmetric, weight.method) == ("int8", "per_channel", True, "minmax")


@pytest.mark.parametrize(
    ("given", "symmetric"),
    [
        ({"scope": "per_token"}, True),
        ({"scope": "per_block"}, True),
        ({"scope": "per_head"}, True),
        ({"scope": "dual_scale", "dtype": "mxfp4"}, True),
        ({"scope": "pd_mix"}, False),
        ({"scope": "per_channel"}, False),
        ({"dtype": "fp8_e4m3"}, True),
        ({"scope": "per_token", "symmetric": False}, False),
    ],
)
def test_symmetric_follows_the_scope_unless_given(given, symmetric):
    assert ActConfig.model_validate(given).symmetric is symmetric


def test_the_bare_leaf_has_no_defaults():
    with pytest.raises(ValidationError) as caught:
        QConfig.model_validate({})
    assert {error["loc"] for error in caught.value.errors()} == {("dtype",), ("scope",), ("symmetric",), ("method",)}


@pytest.mark.parametrize("act", [None, {"dtype": "float"}, {"dtype": "float", "scope": "per_tensor", "method": "none"}])
def test_float_activations_have_one_form(act):
    assert LinearQConfig.model_validate({"act": act, "weight": {}}).act is None
    assert LinearQConfig.model_validate({"weight": {}}).act is None


def test_configurations_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        WeightConfig().dtype = "int4"  # pyright: ignore


def test_ext_takes_numbers_in_the_spelling_of_yaml_1_1():
    config = WeightConfig.model_validate({"method": "gptq", "ext": {"percdamp": "1e-2", "block_size": 64}})
    assert config.ext == {"percdamp": 0.01, "block_size": 64}
    assert config.warnings() == []


@pytest.mark.parametrize(
    ("ext", "place"),
    [
        ({"percdamp": 0}, ("ext", "percdamp")),
        ({"percdamp": True}, ("ext", "percdamp")),
        ({"step": 1.5}, ("ext", "step")),
        ({"step": True}, ("ext", "step")),
        ({"enable_search": "False"}, ("ext", "enable_search")),
        ({"ceil_x_value": 20}, ("ext", "ceil_x_value")),
        ({"aggregation_type": "median"}, ("ext", "aggregation_type")),
        ({"percentile": 101}, ("ext", "percentile")),
        ({"metric": "l2"}, ("ext", "metric")),
        ({"bins": 1}, ("ext", "bins")),
        ({"bins": 32769}, ("ext", "bins")),
        ({"weighted": "yes please"}, ("ext", "weighted")),
        ({"percdmp": 1}, ("ext", "percdmp")),
        ({"search_min": 9, "search_max": 8}, ()),
        ({"search_min": 12}, ()),
    ],
)
def test_ext_values_are_checked(ext, place):
    with pytest.raises(ValidationError) as caught:
        WeightConfig.model_validate({"method": "ceil_x", "ext": ext})
    assert [error["loc"] for error in caught.value.errors()] == [place]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [ActConfig, WeightConfig])
def test_a_key_that_no_method_reads_is_refused_at_every_method(method, side):
    with pytest.raises(ValidationError) as caught:
        side.model_validate({"method": method, "ext": {"nonsense": 1}})
    assert [(error["loc"], error["type"]) for error in caught.value.errors()] == [
        (("ext", "nonsense"), "extra_forbidden")
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_known_key_is_read_by_its_methods_and_ignored_by_the_others(method):
    values = {"aggregation_type": "max", "scale_dtype": "float32", "metric": "mse", "axes": -1, "fraction": 0.05}
    values |= dict.fromkeys(("weighted", "actorder", "use_sigma", "enable_search"), True)
    values |= {"search_min": 6, "search_max": 7, "ceil_x_value": 7, "percdamp": 0.1, "bins": 64, "percentile": 99}
    for key in Ext.__annotations__:
        scope = {"axes": "per_block", "group_size": "per_group"}.get(key, "per_channel")
        config = WeightConfig.model_validate({"method": method, "scope": scope, "ext": {key: values.get(key, 3)}})
        ignored = f"ext.{key} has no effect with method {method} and scope {scope}"
        assert (ignored in config.warnings()) == (key not in METHODS[method])


def test_keys_without_effect_are_warned_about():
    config = LinearQConfig.model_validate(
        {
            "act": {"scope": "per_token", "ext": {"aggregation_type": "mean"}},
            "weight": {"method": "ssz", "ext": {"group_size": 64, "step": 10, "percdamp": 0.1}},
        }
    )
    assert config.warnings() == [
        "act.ext.aggregation_type has no effect with method minmax and scope per_token",
        "weight.ext.percdamp has no effect with method ssz and scope per_channel",
        "weight.ext.group_size has no effect with method ssz and scope per_channel",
    ]
    grouped = WeightConfig.model_validate({"scope": "per_group", "method": "ssz", "ext": {"group_size": 64}})
    assert grouped.warnings() == []


def test_a_percentile_needs_its_metric():
    config = ActConfig.model_validate({"method": "histogram", "ext": {"percentile": 99}})
    assert config.warnings() == ["ext.percentile has no effect with ext.metric mse"]
    config = ActConfig.model_validate({"method": "histogram", "ext": {"percentile": 99, "metric": "percentile"}})
    assert config.warnings() == []
    assert WeightConfig.model_validate({"method": "ssz", "ext": {"weighted": True}}).warnings() == []


def test_every_key_belongs_to_a_method():
    assert set(Ext.__annotations__) == {key for keys in METHODS.values() for key in keys}


def test_a_processor_can_bring_its_own_methods():
    class Mine(WeightConfig):
        methods: ClassVar = {**METHODS, "mine": frozenset({"step"})}

    assert Mine(method="mine", ext={"step": 3}).warnings() == []
    with pytest.raises(ValidationError):
        WeightConfig(method="mine")


@given(st.builds(lambda **fields: fields, scope=st.sampled_from(["per_tensor", "per_token", "pd_mix", "per_block"])))
def test_a_dumped_configuration_is_the_same_again(fields):
    config = ActConfig.model_validate(fields)
    assert ActConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("ext", "warnings"),
    [
        ({}, []),
        ({"fraction": 0.02}, []),
        ({"use_sigma": True, "sigma_factor": 3.5}, []),
        ({"fraction": 0.3}, ["ext.fraction is 0.3; the protocol documents 0.01 to 0.1"]),
        ({"sigma_factor": 3}, ["ext.sigma_factor has no effect with ext.use_sigma false"]),
        (
            {"use_sigma": True, "sigma_factor": 5, "fraction": 0.02},
            [
                "ext.fraction has no effect with ext.use_sigma true",
                "ext.sigma_factor is 5.0; the protocol documents 3 to 4",
            ],
        ),
    ],
)
def test_settings_of_sparse_weights(ext, warnings):
    assert WeightConfig.model_validate({"method": "sparse", "ext": ext}).warnings() == warnings


@pytest.mark.parametrize("ext", [{"fraction": 1.1}, {"fraction": -0.1}, {"sigma_factor": 0}, {"use_sigma": 1}])
def test_settings_of_sparse_weights_that_are_refused(ext):
    with pytest.raises(ValidationError):
        WeightConfig.model_validate({"method": "sparse", "ext": ext})

"""``dynamic_cache`` and ``fa3_quant``: what a recipe may say, and what they make of observed ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from slim_core.errors import SchemaValidateError, SpecError
from slim_core.model.attention import AttentionInfo
from slim_core.processors.base import AttentionAssignment, AttentionWork, UnitWork, create_processor
from slim_core.processors.dynamic_cache import DynamicCache, DynamicCacheConfig
from slim_core.processors.fa3_quant import Fa3Quant, Fa3QuantConfig
from slim_core.quantization.attention import AttentionForm, QuantizedAttention
from slim_core.quantization.statistics.attention import AttentionStatistics
from slim_core.recipe import dump_recipe, recipe_from_dict

INFO = AttentionInfo("layers.0.attn", "layers.0.attn", 4, 2, 3, 5)


def cache(**config: Any) -> DynamicCache:
    return DynamicCache(DynamicCacheConfig.model_validate({"type": "dynamic_cache", **config}), "process[0]")


def kernel(**config: Any) -> Fa3Quant:
    return Fa3Quant(Fa3QuantConfig.model_validate({"type": "fa3_quant", **config}), "process[0]")


def form(processor: Any) -> AttentionForm:
    (rule,) = processor.attention_rules()
    assert rule.position == "process[0]"
    return rule.form


def finished(processor: Any, *, tokens: int = 8, dtype: torch.dtype | None = None) -> tuple[QuantizedAttention, Any]:
    """The attention that a processor makes of random states, and those states."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, tokens, 3), (1, 2, tokens, 3), (1, 2, tokens, 5))
    states = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    seen = AttentionStatistics.of(form(processor), INFO, tokens)
    if tokens:
        seen.observe(*states)
    work = AttentionWork(INFO, AttentionAssignment(form(processor), "process[0]", ""), seen)
    elsewhere = AttentionWork(INFO, AttentionAssignment(form(processor), "process[1]", ""), None)
    done: list[QuantizedAttention] = []
    attentions = {"a": work, "b": elsewhere}
    device = torch.device("cpu")
    unit = UnitWork(
        *("u", {}, {}, dtype, device, lambda *_: None),
        attentions=attentions,
        finish_attention=lambda _work, quantized: done.append(quantized),
    )
    processor.process(unit)
    (made,) = done
    return made, states


EXPLICIT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}


def test_the_defaults_of_the_cache_are_the_documented_ones() -> None:
    assert form(cache()) == form(cache(qconfig=EXPLICIT)) == form(cache(qconfig={}))
    assert form(cache()) == form(cache(details={}))
    assert str(form(cache())) == "C8 int8 per_channel"
    assert form(cache()).query is None
    assert form(cache()).key is not None
    (rule,) = cache().attention_rules()
    assert rule.filter.matches("anything")
    (rule,) = cache(include=["a.*"], exclude=["a.b"]).attention_rules()
    assert [rule.filter.matches(name) for name in ("a.a", "a.b", "b.a")] == [True, False, False]


def test_the_defaults_of_the_kernel_are_the_documented_ones() -> None:
    explicit = {"dtype": "int8", "scope": "per_head", "symmetric": True, "method": "minmax"}
    assert form(kernel()) == form(kernel(qconfig=explicit))
    found = form(kernel())
    assert found.query is not None
    assert found.value is not None
    assert (found.query.share, found.value.share) == (0.9999, 1.0)
    for dtype in ("mxfp4", "mxfp8"):
        assert form(kernel(qconfig={"dtype": dtype})).query.scope == "per_block"  # pyright: ignore
    ratio = form(kernel(qconfig={"ext": {"ratio": 0.995}}))
    assert [state.share for _, state in ratio.states()] == [0.995] * 3


def test_keys_and_values_apart() -> None:
    found = form(cache(details={"key": {"symmetric": False}, "value": {"method": "histogram"}}))
    assert found.key is not None
    assert found.value is not None
    assert (found.key.symmetric, found.key.share) == (False, 1.0)
    assert (found.value.symmetric, found.value.share) == (True, 0.9999)
    details = {"fa_q": {"dtype": "fp8_e4m3"}, "fa_v": {"dtype": "int8", "scope": "per_token"}}
    assert [name for name, _ in form(kernel(details=details)).states()] == ["query", "value"]


@pytest.mark.parametrize(
    ("made", "config", "message"),
    [
        (cache, {"qconfig": {"dtype": "fp8_e4m3"}}, "the cache is int8 per_channel, not fp8_e4m3 per_channel"),
        (cache, {"qconfig": {"scope": "per_token"}}, "not int8 per_token"),
        (cache, {"qconfig": {"method": "ssz"}}, "allowed: minmax, histogram"),
        (cache, {"qconfig": {}, "details": {}}, "qconfig and details exclude each other"),
        (cache, {"qconfig": {"method": "histogram", "ext": {"percentile": 98}}}, "must be at least 99"),
        (cache, {"qconfig": {"ext": {"percentil": 99.9}}}, "percentil"),
        (cache, {"details": {"keys": {}}}, "keys"),
        (kernel, {"qconfig": {"dtype": "mxfp8", "scope": "per_head"}}, "not quantized to mxfp8 per_head"),
        (kernel, {"qconfig": {"dtype": "int4"}}, "attention is not quantized to int4 per_head"),
        (kernel, {"qconfig": {"scope": "per_channel"}}, "not quantized to int8 per_channel"),
        (kernel, {"qconfig": {"symmetric": False}}, "without offset"),
        (kernel, {"qconfig": {"ext": {"ratio": 0.5}}}, "greater than or equal to 0.99"),
        (kernel, {"details": {}}, "give at least one of fa_q, fa_k and fa_v"),
        (kernel, {"details": {"fa_q": None}}, "give at least one of fa_q, fa_k and fa_v"),
        (kernel, {"details": {"fa_q": {}}, "qconfig": {}}, "qconfig and details exclude each other"),
    ],
)
def test_what_a_recipe_may_not_say(made: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(**config)


def test_errors_of_a_recipe_name_the_field() -> None:
    process = [{"type": "dynamic_cache", "qconfig": {"scope": "per_head"}}]
    with pytest.raises(SchemaValidateError, match=r"spec\.process\[0\].*the cache is int8 per_channel"):
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": process}}).spec()


def test_what_has_no_effect_is_warned_about() -> None:
    assert cache().notes() == []
    assert kernel().notes() == []
    assert "ext.group_size has no effect" in cache(qconfig={"ext": {"group_size": 32}}).notes()[0]
    assert "ignores" in cache(qconfig={"symmetric": False}).notes()[0]
    assert (
        "ext.ratio has no effect with scope per_token"
        in kernel(qconfig={"scope": "per_token", "ext": {"ratio": 1}}).notes()[0]
    )
    assert "details.fa_v" in kernel(details={"fa_v": {"scope": "per_token", "ext": {"ratio": 1}}}).notes()[0]


def test_a_recipe_survives_being_written_and_read() -> None:
    process = [
        {"type": "dynamic_cache", "details": {"key": {"symmetric": False}}, "exclude": ["*.3.*"]},
        {"type": "group", "configs": [{"type": "fa3_quant", "qconfig": {"ext": {"ratio": 0.999}}}]},
    ]
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": process}})
    import yaml

    again = recipe_from_dict(yaml.safe_load(dump_recipe(recipe)))
    assert again.spec() == recipe.spec()


def test_a_group_hands_on_the_rules_of_its_members() -> None:
    spec = {"process": [{"type": "group", "configs": [{"type": "fa3_quant"}, {"type": "dynamic_cache"}]}]}
    (config,) = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}).spec().process
    members = create_processor(config, "process[0]").leaves()
    positions = [rule.position for member in members for rule in member.attention_rules()]
    assert positions == ["process[0].configs[0]", "process[0].configs[1]"]


def test_scales_are_those_of_the_observed_ranges() -> None:
    made, (_, key, value) = finished(cache())
    assert made.query is None
    for state, seen in ((made.key, key), (made.value, value)):
        assert state is not None
        assert state.scale is not None
        assert torch.equal(state.scale, seen.abs().amax((0, 2)).flatten() / 127)
    made, (query, key, value) = finished(kernel(qconfig={"ext": {"ratio": 1}}), dtype=torch.bfloat16)
    for state, seen in ((made.query, query), (made.key, key), (made.value, value)):
        assert state is not None
        assert state.scale is not None
        assert torch.equal(state.scale, (seen.abs().amax((0, 2, 3)) / 127).bfloat16().float())


def test_dynamic_states_need_no_data_and_static_ones_do() -> None:
    made, _ = finished(kernel(qconfig={"scope": "per_token"}), tokens=0)
    assert [state.scale for _, state in made.states()] == [None] * 3
    with pytest.raises(SpecError, match=r"layers\.0\.attn: no calibration sample reached"):
        finished(cache(), tokens=0)

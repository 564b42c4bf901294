"""Which attentions become what: first rule wins, and whatever does not fit is said."""

from __future__ import annotations

import pytest

from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.processors.base import AttentionRule
from slim_core.quantization.attention import AttentionForm, AttentionKind, StateForm
from slim_core.recipe import NameFilter
from slim_core.runners.plan_attention import assign_attentions, planned_attentions
from slim_core.savers.loaders import engines, loads_attention, unloadable_attentions

CHANNEL, HEAD, TOKEN = (StateForm("int8", scope) for scope in ("per_channel", "per_head", "per_token"))
CACHE = AttentionForm(AttentionKind.C8, None, CHANNEL, CHANNEL)
KERNEL = AttentionForm(AttentionKind.FAQUANT, HEAD, HEAD, HEAD)
INFOS = [AttentionInfo(f"layers.{i}.attn", f"layers.{i}.attn", 4, 2, 8, 8) for i in range(3)]
LATENT = AttentionInfo("layers.3.attn", "layers.3.attn", 4, 1, 8, 8, latent=True)


def rule(
    position: str, form: AttentionForm, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> AttentionRule:
    return AttentionRule(position, NameFilter(include, exclude), form)


def test_the_first_rule_that_names_an_attention_has_it() -> None:
    rules = [rule("process[0]", CACHE, ("*.0.*",)), rule("process[1]", KERNEL, exclude=("*.2.*",))]
    assigned, warnings = assign_attentions(INFOS, rules)
    assert {name: (a.form, a.position, a.reason) for name, a in assigned.items()} == {
        "layers.0.attn": (CACHE, "process[0]", "spec.process[0]"),
        "layers.1.attn": (KERNEL, "process[1]", "spec.process[1]"),
    }
    assert warnings == [
        "spec.process[1] names 1 attentions that spec.process[0] has taken (first wins), e.g. layers.0.attn"
    ]
    planned = planned_attentions(INFOS, assigned, rules)
    assert [(p.becomes, p.reason) for p in planned] == [
        ("C8 int8 per_channel", "spec.process[0]"),
        ("FAQuant int8 per_head", "spec.process[1]"),
        ("FLOAT", "excluded by spec.process[1].exclude"),
    ]
    named = [rule("process[0]", CACHE, ("*.0.*",))]
    assert planned_attentions(INFOS, assign_attentions(INFOS, named)[0], named)[1].reason == "named by no rule"
    assert planned_attentions(INFOS, {}, []) == ()


def test_patterns_that_match_nothing_are_reported() -> None:
    _, warnings = assign_attentions(INFOS, [rule("process[0]", CACHE, ("*.7.*",), ("nothing",))])
    assert warnings == [
        "spec.process[0].include: pattern '*.7.*' matches no attention of the decoder blocks",
        "spec.process[0].exclude: pattern 'nothing' matches no attention of the decoder blocks",
        "spec.process[0] quantizes no attention",
    ]


def test_models_and_attentions_that_cannot_do_it() -> None:
    assert assign_attentions([], []) == ({}, [])
    with pytest.raises(
        UnsupportedError, match=r"spec\.process\[0\]: no attention that keeps keys and values was found"
    ):
        assign_attentions([], [rule("process[0]", CACHE)])
    with pytest.raises(UnsupportedError, match=r"layers\.3\.attn: cannot become C8"):
        assign_attentions([*INFOS, LATENT], [rule("process[0]", CACHE)])
    assigned, _ = assign_attentions([*INFOS, LATENT], [rule("process[0]", CACHE, exclude=("*.3.*",))])
    assert len(assigned) == 3


def test_what_the_main_engine_cannot_load_is_said_once_for_each_type() -> None:
    dynamic = AttentionForm(AttentionKind.FAQUANT, TOKEN, TOKEN, TOKEN)
    assert unloadable_attentions(dict.fromkeys(INFOS, CACHE)) == []
    assert unloadable_attentions({LATENT: KERNEL}) == []
    assert unloadable_attentions(dict.fromkeys(INFOS, KERNEL)) == [
        "vllm-ascend has no class for standard attention that is FAKQuant (3 attentions, e.g. layers.0.attn); "
        "mindie-llm loads them"
    ]
    (warning,) = unloadable_attentions({LATENT: dynamic})
    assert "latent attention that is INT8_DYNAMIC" in warning
    assert "loads them" not in warning
    assert not any(loads_attention(engine, "nothing", latent) for engine in engines() for latent in (True, False))

"""What engines can load."""

from __future__ import annotations

import pytest

from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionForm, AttentionKind, StateForm
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.savers.loaders import (
    MAIN_ENGINES,
    engine_format,
    engines,
    fuses,
    is_loadable,
    layer_class,
    lost_biases,
    mixed_fusions,
    no_engine,
    obstacle,
    reads_floats,
    refused_together,
    unloadable,
    unloadable_attentions,
)


def test_layer_classes() -> None:
    assert layer_class("model.layers.0.mlp.experts.12.up_proj") == "experts"
    assert layer_class("model.layers.0.mlp.shared_experts.up_proj") == "linear"
    assert layer_class("model.layers.0.mlp.up_proj") == "linear"


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC", "W8A16", "FLOAT"])
def test_dense_layers_of_every_type_written_here_load(kind: str) -> None:
    assert "vllm-ascend" in engines()
    assert is_loadable("vllm-ascend", kind, "model.layers.0.mlp.up_proj")
    assert unloadable({"model.layers.0.mlp.up_proj": kind}) == []


def test_what_has_no_class_is_told_once_per_type() -> None:
    kinds = dict.fromkeys(("a.up_proj", "b.up_proj"), "W1A1") | {"a.down_proj": "W8A8"}
    (warning,) = unloadable(kinds)
    assert warning == "vllm-ascend has no class for W1A1 linear layers (2 linears, e.g. a.up_proj)"


def test_linears_that_are_fused_need_one_type() -> None:
    same = {f"l.{i}.attn.{leaf}_proj": "W8A8" for i in range(3) for leaf in "qkv"}
    assert mixed_fusions(same) == []
    (warning,) = mixed_fusions(same | {"l.1.attn.v_proj": "FLOAT", "l.2.attn.v_proj": "FLOAT"})
    assert "q_proj W8A8, k_proj W8A8, v_proj FLOAT" in warning
    assert "(2 times, e.g. l.1.attn)" in warning
    assert mixed_fusions({"l.0.mlp.gate_proj": "W8A8", "l.0.mlp.down_proj": "FLOAT"}) == []


FORMS = [
    ("vllm-ascend", LayerForm(LayerKind.W8A8_DYNAMIC), 48, None),
    ("vllm-ascend", LayerForm(LayerKind.W8A8_DYNAMIC, 64), 128, "only per channel, not in groups"),
    ("vllm-ascend", LayerForm(LayerKind.W8A16), 48, None),
    ("vllm-ascend", LayerForm(LayerKind.W8A16, 64), 128, "only per channel, not in groups"),
    ("vllm-ascend", LayerForm(LayerKind.W8A16, symmetric=False), 48, "only without weight_offset"),
    ("vllm-ascend", LayerForm(LayerKind.W4A4_DYNAMIC, symmetric=False), 48, "only without weight_offset"),
    ("vllm-ascend", LayerForm(LayerKind.W4A4_DYNAMIC), 48, None),
    ("vllm-ascend", LayerForm(LayerKind.W4A4_DYNAMIC), 77, "only if 8 divides their input features"),
    ("vllm-ascend", LayerForm(LayerKind.W4A16), 48, "has no class for W4A16 linear layers"),
    ("vllm-ascend", LayerForm(LayerKind.W4A8_DYNAMIC), 48, "has no class for W4A8_DYNAMIC linear layers"),
    ("vllm-ascend", LayerForm(LayerKind.WFP8AFP8_DYNAMIC), 48, "fp8_label: W8A8FP8_DYNAMIC"),
    ("vllm-ascend", LayerForm(LayerKind.W8A8_MXFP8), 48, None),
    ("vllm-ascend", LayerForm(LayerKind.W4A8_MXFP), 96, "only if 64 divides their input features"),
    ("vllm-ascend", LayerForm(LayerKind.W4A8_MXFP), 128, None),
    ("vllm-ascend", LayerForm(LayerKind.W4A8_MXFP), None, None),
    ("vllm-ascend", LayerForm(LayerKind.W4A4_MXFP4), 96, None),
    ("vllm-ascend", LayerForm(LayerKind.W4A4_MXFP4), 48, "only if 32 divides their input features"),
    ("vllm-ascend-310p", LayerForm(LayerKind.W8A8S), 48, None),
    ("vllm-ascend-310p", LayerForm(LayerKind.W8A8_DYNAMIC, 64), 128, "only per channel, not in groups"),
    ("mindie-llm", LayerForm(LayerKind.W4A16, 64, False), 128, None),
    ("mindie-llm", LayerForm(LayerKind.W4A16), 128, None),
    ("mindie-llm", LayerForm(LayerKind.W4A8_DYNAMIC), 128, "only in groups, not per channel"),
    ("mindie-llm", LayerForm(LayerKind.W4A8_DYNAMIC, 64), 128, None),
    ("mindie-sd", LayerForm(LayerKind.W8A16, 64), 128, None),
    ("mindie-sd", LayerForm(LayerKind.W4A16, symmetric=False), 128, "only without weight_offset"),
]


@pytest.mark.parametrize(("engine", "form", "width", "why"), FORMS)
def test_forms(engine: str, form: LayerForm, width: int | None, why: str | None) -> None:
    found = obstacle(engine, str(form.kind), "l.0.mlp.up_proj", form, width)
    assert (found is None) if why is None else (found is not None and why in found)
    assert is_loadable(engine, str(form.kind), "l.0.mlp.up_proj", form, width) is (why is None)


@pytest.mark.parametrize(
    ("kind", "width", "loads"),
    [("W8A8_MXFP8", 96, False), ("W8A8_MXFP8", 128, True), ("W4A8_DYNAMIC", 96, True), ("W8A8", 96, False)],
)
def test_experts_have_their_own_classes(kind: str, width: int, loads: bool) -> None:
    assert is_loadable("vllm-ascend", kind, "l.0.experts.3.up_proj", LayerForm(LayerKind(kind)), width) is loads


def test_forms_of_a_plan() -> None:
    forms: dict[str, LayerForm | str] = {
        "a.up_proj": LayerForm(LayerKind.W8A16, 64),
        "b.up_proj": LayerForm(LayerKind.W8A16, 32),
        "c.up_proj": LayerForm(LayerKind.W8A16),
        "d.up_proj": LayerForm(LayerKind.W4A16),
        "e.up_proj": LayerForm(LayerKind.W8A8S),
        "f.up_proj": LayerKind.FLOAT,
    }
    assert unloadable(forms) == [
        "vllm-ascend loads W8A16 linear layers only per channel, not in groups (2 linears, e.g. a.up_proj)",
        "vllm-ascend has no class for W4A16 linear layers (1 linears, e.g. d.up_proj); mindie-llm loads them",
        "vllm-ascend has no class for W8A8S linear layers (1 linears, e.g. e.up_proj); vllm-ascend-310p and mindie-llm "
        "load them",
    ]


def test_widths_and_labels_of_a_plan() -> None:
    mx = {"a.up_proj": LayerForm(LayerKind.W4A8_MXFP)}
    assert unloadable(mx) == unloadable(mx, {"a.up_proj": 128}) == []
    (warning,) = unloadable(mx, {"a.up_proj": 96})
    assert "only if 64 divides" in warning
    fp8 = {"a.up_proj": LayerForm(LayerKind.WFP8AFP8_DYNAMIC)}
    (warning,) = unloadable(fp8)
    assert warning.startswith(
        "vllm-ascend knows WFP8AFP8_DYNAMIC layers as W8A8FP8_DYNAMIC; write them with fp8_label:"
    )
    assert unloadable(fp8, labels={"WFP8AFP8_DYNAMIC": "W8A8FP8_DYNAMIC"}) == []


def test_layers_that_are_refused_together() -> None:
    expert = {"l.0.experts.0.up_proj": LayerForm(LayerKind.W4A8_DYNAMIC)}
    plain = {"l.0.q_proj": LayerForm(LayerKind.W8A8_DYNAMIC)}
    mx = {"l.0.q_proj": LayerForm(LayerKind.W8A8_MXFP8)}
    assert refused_together("vllm-ascend", expert | plain) is None
    assert unloadable(expert | plain) == []
    text = refused_together("vllm-ascend", expert | mx)
    assert text == (
        "loads W4A8_DYNAMIC layers (l.0.experts.0.up_proj) only in models without grouped or MX layers "
        "(here l.0.q_proj)"
    )
    assert unloadable(expert | mx) == [f"vllm-ascend {text}"]
    assert refused_together("mindie-llm", expert | mx) is None


def test_engines_of_other_formats() -> None:
    assert [engine for engine in engines() if engine_format(engine) != "ascendv1"] == ["mindie-sd"]
    assert all(engine_format(engine) == format for format, engine in MAIN_ENGINES.items())


def test_linears_that_are_fused_need_one_size_of_groups() -> None:
    forms = {f"l.attn.{leaf}_proj": LayerForm(LayerKind.W8A16, 64, leaf != "k") for leaf in "qkv"}
    assert mixed_fusions(forms) == []  # an offset changes no shape
    (warning,) = mixed_fusions(forms | {"l.attn.v_proj": LayerForm(LayerKind.W8A16, 32)})
    assert "k_proj W8A16 in groups of 64, v_proj W8A16 in groups of 32" in warning


def test_biases_without_a_place() -> None:
    kinds = {"a": LayerKind.W8A8, "b": LayerKind.W8A8S, "c": LayerKind.W8A8_MIX, "d": "FLOAT", "e": LayerKind.FLOAT}
    assert lost_biases(kinds) == {"W8A8_MIX": ["c"], "FLOAT": ["d", "e"]}
    assert lost_biases({}) == {}


LINEAR, EXPERT = "l.0.mlp.up_proj", "l.0.mlp.experts.0.up_proj"
GROUPED, PER_CHANNEL = LayerForm(LayerKind.W4A8_DYNAMIC, 64), LayerForm(LayerKind.W4A8_DYNAMIC)


@pytest.mark.parametrize(
    ("layers", "stops"),
    [
        ({LINEAR: LayerForm(LayerKind.W8A8), EXPERT: LayerForm(LayerKind.W8A8_DYNAMIC)}, None),
        ({LINEAR: GROUPED}, None),  # of MindIE
        ({LINEAR: LayerForm(LayerKind.W8A8S)}, None),  # of the 310P build
        ({LINEAR: LayerForm(LayerKind.WFP8AFP8_DYNAMIC)}, None),  # under another name
        ({LINEAR: LayerKind.FLOAT}, None),
        (
            {EXPERT: LayerForm(LayerKind.W8A8)},
            ["has no class for W8A8 experts layers (e.g. l.0.mlp.experts.0.up_proj)"],
        ),
        ({LINEAR: PER_CHANNEL}, ["has no class for W4A8_DYNAMIC linear layers", "only in groups, not per channel"]),
        # Each has its engine, both together have none.
        (
            {LINEAR: GROUPED, "l.0.mlp.down_proj": LayerForm(LayerKind.W4A4_DYNAMIC)},
            ["vllm-ascend-310p: has no class for W4A8_DYNAMIC", "mindie-llm: has no class for W4A4_DYNAMIC"],
        ),
        (
            {EXPERT: PER_CHANNEL, LINEAR: LayerForm(LayerKind.W8A8_MXFP8)},
            ["only in models without grouped or MX layers"],
        ),
    ],
)
def test_what_no_engine_loads(layers: dict[str, LayerForm | LayerKind], stops: list[str] | None) -> None:
    found = no_engine(layers, dict.fromkeys(layers, 128), {}, {})
    if stops is None:
        assert found is None
    else:
        assert found is not None
        assert all(text in found for text in stops)
        assert all(engine in found for engine in ("vllm-ascend", "vllm-ascend-310p", "mindie-llm"))
        assert "mindie-sd" not in found  # it reads another format


@pytest.mark.parametrize(
    ("kind", "loads_cache", "loads_kernel"),
    [
        (LayerKind.W8A8, True, True),
        (LayerKind.W4A4_DYNAMIC, True, False),  # vllm-ascend has the kernel for latent attention only
        (LayerKind.W4A16, True, True),
    ],
)
def test_attentions_count_too(kind: LayerKind, loads_cache: bool, loads_kernel: bool) -> None:
    channel, head = StateForm("int8", "per_channel"), StateForm("int8", "per_head")
    info = AttentionInfo("l.0.self_attn", "l.0.self_attn", 4, 2, 16, 16)
    for form, loads in (
        (AttentionForm(AttentionKind.C8, None, channel, channel), loads_cache),
        (AttentionForm(AttentionKind.FAQUANT, head, head, head), loads_kernel),
        (AttentionForm(AttentionKind.FAQUANT, *[StateForm("fp8_e4m3", "per_head")] * 3), False),
    ):
        found = no_engine({LINEAR: LayerForm(kind)}, {}, {}, {info: form})
        assert (found is None) == loads
        assert found is None or "(e.g. l.0.self_attn)" in found


def test_mindie_sd_asks_for_biases_and_even_blocks() -> None:
    for kind in ("W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"):
        layers = {LINEAR: LayerForm(LayerKind(kind)), EXPERT: LayerForm(LayerKind(kind))}
        assert unloadable(layers, dict.fromkeys(layers, 128), engine="mindie-sd") == []
        assert no_engine(layers, dict.fromkeys(layers, 128), {}, {}, format="mindie") is None
        warnings = unloadable(layers, dict.fromkeys(layers, 128), engine="mindie-sd", without_bias=[LINEAR])
        assert warnings == [f"mindie-sd loads {kind} linear layers only with a bias (1 linears, e.g. {LINEAR})"]
        found = no_engine(layers, dict.fromkeys(layers, 96), {}, {}, format="mindie")
        assert found is not None
        assert "only if 64 divides their input features" in found
        assert "vllm" not in found
    dynamic = {LINEAR: LayerForm(LayerKind.W8A8_DYNAMIC)}
    assert unloadable(dynamic, {LINEAR: 24}, engine="mindie-sd", without_bias=[LINEAR]) == []


def test_mindie_sd_puts_layers_in_place_one_by_one() -> None:
    assert [engine for engine in engines() if not fuses(engine)] == ["mindie-sd"]
    assert [engine for engine in engines() if not reads_floats(engine)] == ["mindie-sd"]


@pytest.mark.parametrize(
    ("dtype", "scope", "plain", "rotated"),
    [
        ("int8", "per_head", "", "does not rotate query and key of FAKQuant attention"),
        ("fp8_e4m3", "per_token", "loads FP8_DYNAMIC attention only with rotations of query and key", ""),
        ("mxfp8", "per_block", "loads MXFP8_DYNAMIC attention only with rotations of query and key", ""),
        ("mxfp4", "per_block", "", ""),
        ("int8", "per_token", "has no class for standard attention", "has no class for standard attention"),
    ],
)
def test_mindie_sd_rotates_for_some_attentions(dtype: str, scope: str, plain: str, rotated: str) -> None:
    form = AttentionForm(AttentionKind.FAQUANT, *[StateForm(dtype, scope)] * 3)
    for text, is_rotated in ((plain, False), (rotated, True)):
        info = AttentionInfo("l.0.attn", "l.0.attn", 4, 4, 16, 16, rotated=is_rotated)
        found = no_engine({LINEAR: LayerKind.FLOAT}, {}, {}, {info: form}, format="mindie")
        assert (found is None) == (not text)
        assert text in (found or "")
        warnings = unloadable_attentions({info: form}, "mindie-sd")
        assert len(warnings) == bool(text)
        assert all(warning.startswith(f"mindie-sd {text}") for warning in warnings)

"""``anti_cfg``: outlier suppression by the processors of v1."""

from __future__ import annotations

from typing import Any

from slim_core.quantization.kinds import LayerKind
from slim_llm.v0.linears import weight_qconfig
from slim_llm.v0.names import literal_patterns
from slim_llm.v0.remarks import Remarks
from slim_llm.v0.schema import AntiConfig, CalibConfig

__all__ = ["EXPERTS", "translate_smoothing"]

_SUBGRAPHS = ("norm-linear", "linear-linear", "ov", "up-down")
_NORM_ONLY = ("norm-linear",)
# v0 leaves a group of modules alone if the name of one of them contains this.
EXPERTS = "*expert*"
_HONOURS_NAMES = ("m3", "m4", "m6")

# v1 names a subgraph by the module in front of its linears, v0 by the linears themselves.
_SOURCES: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("input_layernorm",),
    "self_attn.k_proj": ("input_layernorm",),
    "self_attn.v_proj": ("input_layernorm", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.v_proj",),
    "mlp.gate_proj": ("post_attention_layernorm",),
    "mlp.up_proj": ("post_attention_layernorm", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.up_proj",),
}


def translate_smoothing(
    anti: AntiConfig | None, calib: CalibConfig, kinds: frozenset[LayerKind], remarks: Remarks
) -> dict[str, Any] | None:
    """The smoothing processor of a recipe, None if it has none.

    Args:
        kinds: what the linears become.
    """
    if anti is None:
        return _built_in(calib, remarks)
    if calib.do_smooth:
        remarks.approximate("calib_cfg.do_smooth", "left out, since anti_cfg smooths already")
    if anti.anti_method != "m3" and not kinds & _QUANTIZES_INPUTS:
        remarks.approximate("anti_cfg", "no linear has quantized activations, so smoothing can only lose accuracy")
    _drop_unread(anti, remarks)
    excluded = _excluded(anti, remarks)
    match anti.anti_method:
        case "m1":
            return {"type": "smooth_quant", "alpha": 0.5, "symmetric": True, "exclude": excluded}
        case "m2" | "m5":
            remarks.approximate(
                "anti_cfg.anti_method",
                f"{anti.anti_method} has no equivalent; iter_smooth between norms and linears takes its place",
            )
            return _iterative(_NORM_ONLY, excluded)
        case "m3":
            return _awq(anti, calib, excluded, remarks)
        case "m4":
            return _iterative(_SUBGRAPHS, excluded)
        case "m6":
            return _flexible(anti, excluded, remarks)


_QUANTIZES_INPUTS = frozenset(LayerKind) - {LayerKind.FLOAT, LayerKind.W8A16, LayerKind.W4A16}


def _built_in(calib: CalibConfig, remarks: Remarks) -> dict[str, Any] | None:
    """The smoothing that the low-bit engine does by itself."""
    if not calib.do_smooth:
        return None
    if not calib.is_lowbit:
        remarks.drop("calib_cfg.do_smooth", "only is_lowbit reads it")
        return None
    remarks.approximate("calib_cfg.do_smooth", "the smoothing of the low-bit engine is replaced by iter_smooth")
    return _iterative(_SUBGRAPHS, [EXPERTS])


def _iterative(subgraphs: tuple[str, ...], excluded: list[str]) -> dict[str, Any]:
    return {
        "type": "iter_smooth",
        "alpha": 0.9,
        "scale_min": 1.0e-5,
        "symmetric": True,
        "enable_subgraph_type": list(subgraphs),
        "exclude": excluded,
    }


def _awq(anti: AntiConfig, calib: CalibConfig, excluded: list[str], remarks: Remarks) -> dict[str, Any]:
    """The search rounds weights as the linears will be; sparse ones as plain int8."""
    kind = calib.kind
    assert kind is not None, "the schema lets no such recipe pass"
    assumed = LayerKind.W8A8 if kind is LayerKind.W8A8S else kind
    weight = weight_qconfig(assumed, calib, grouped=calib.in_groups)
    if "w_bit" in anti.model_fields_set and anti.w_bit != assumed.weight_bits:
        remarks.approximate(
            "anti_cfg.w_bit", f"the search rounds weights as calib_cfg says, to int{assumed.weight_bits}"
        )
    if "w_sym" in anti.model_fields_set and anti.w_sym != weight["symmetric"]:
        symmetry = "symmetric" if weight["symmetric"] else "asymmetric"
        remarks.approximate("anti_cfg.w_sym", f"the search rounds weights as calib_cfg says, {symmetry}")
    return {
        "type": "awq",
        "weight_qconfig": weight,
        "enable_subgraph_type": list(_NORM_ONLY),
        "exclude": excluded,
    }


def _flexible(anti: AntiConfig, excluded: list[str], remarks: Remarks) -> dict[str, Any]:
    given = {
        name: value
        for name in ("alpha", "beta")
        if anti.flex_config is not None and (value := getattr(anti.flex_config, name)) is not None
    }
    if len(given) == 1:
        (name,) = given
        remarks.drop(f"anti_cfg.flex_config.{name}", "both exponents are searched unless both are given")
        given = {}
    return {"type": "flex_smooth_quant", **given, "exclude": excluded}


def _excluded(anti: AntiConfig, remarks: Remarks) -> list[str]:
    """What v0 leaves alone, by the names that v1 goes by: experts, and the groups of ``disable_anti_names``."""
    if anti.anti_method not in _HONOURS_NAMES:
        return [EXPERTS]
    names: list[str] = []
    for name in anti.disable_anti_names:
        block, _, tail = name.rpartition(".")
        block, _, module = block.rpartition(".")
        sources = _SOURCES.get(f"{module}.{tail}") if block else None
        if sources is None:
            remarks.approximate(
                "anti_cfg.disable_anti_names",
                f"exclude names the module in front of the linears, which is not known for {name!r}; "
                "the name is kept as it is",
            )
            names.append(name)
        elif anti.anti_method == "m3":
            names += [f"{block}.{source}" for source in sources if source.endswith("norm")]
        else:
            names += [f"{block}.{source}" for source in sources]
    return [*literal_patterns(names), EXPERTS]


def _drop_unread(anti: AntiConfig, remarks: Remarks) -> None:
    """Note the fields that this method does not read, or did not read in v0 either."""
    given = anti.model_fields_set
    unread = {"dev_type", "dev_id"}
    if anti.anti_method != "m3":
        unread |= {"w_bit", "a_bit", "w_sym"}
    else:
        unread |= {"a_bit"}
    for name in type(anti).model_fields:
        if name in given & unread:
            remarks.drop(f"anti_cfg.{name}")
    if anti.disable_anti_names and anti.anti_method not in _HONOURS_NAMES:
        remarks.drop("anti_cfg.disable_anti_names", f"{anti.anti_method} never read it")
    if anti.flex_config is not None and anti.anti_method != "m6":
        remarks.drop("anti_cfg.flex_config", "only m6 reads it")

"""The linears of a v0 recipe: ``calib_cfg`` and ``calib_params`` to ``linear_quant`` and ``group``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slim_core.quantization.kinds import LayerKind
from slim_core.recipe.patterns import compile_pattern
from slim_llm.v0.names import from_fnmatch, is_exact, literal_patterns
from slim_llm.v0.remarks import Remarks
from slim_llm.v0.schema import CalibConfig, MixType, SpecV0

__all__ = ["HEAD", "Linears", "translate_linears", "weight_qconfig"]

HEAD = "lm_head"
_ACT_METHODS = {1: "minmax", 2: "histogram", 3: "histogram"}
_ACT_SCOPES = {
    LayerKind.W8A8: "per_tensor",
    LayerKind.W8A8S: "per_tensor",
    LayerKind.W8A8_MIX: "pd_mix",
    LayerKind.W8A8_DYNAMIC: "per_token",
    LayerKind.W4A8_DYNAMIC: "per_token",
    LayerKind.W4A4_DYNAMIC: "per_token",
}
_MIX_KINDS: dict[MixType, LayerKind] = {
    "w8a8": LayerKind.W8A8,
    "w8a16": LayerKind.W8A16,
    "w8a8_dynamic": LayerKind.W8A8_DYNAMIC,
    "w4a8_dynamic": LayerKind.W4A8_DYNAMIC,
    "float": LayerKind.FLOAT,
}


@dataclass(frozen=True)
class Linears:
    """The processors that quantize the linears, and the kinds of layers they make."""

    processors: list[dict[str, Any]]
    kinds: frozenset[LayerKind]


@dataclass
class _Rule:
    """Linears by pattern, and what they become; FLOAT: left alone."""

    include: list[str]
    kind: LayerKind
    grouped: bool
    exclude: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, include: list[str], kind: LayerKind) -> _Rule:
        """A rule of ``mix_cfg``, whose only type in groups is w4a8_dynamic."""
        return cls(include, kind, kind is LayerKind.W4A8_DYNAMIC)


def translate_linears(spec: SpecV0, remarks: Remarks) -> Linears:
    """The processors for the linears: none, one, or several in a group."""
    rules = [rule for rule in _rules(spec, remarks) if rule.kind is not LayerKind.FLOAT]
    processors: list[dict[str, Any]] = [
        {
            "type": "linear_quant",
            "qconfig": _qconfig(rule, spec.calib_cfg),
            "include": rule.include,
            "exclude": rule.exclude,
        }
        for rule in rules
    ]
    if len(processors) > 1:
        processors = [{"type": "group", "configs": processors}]
    return Linears(processors, frozenset(rule.kind for rule in rules))


def _rules(spec: SpecV0, remarks: Remarks) -> list[_Rule]:
    """By priority: exact keys of ``mix_cfg`` but for kept names, its patterns in the order of the file, the rest.

    So that no linear is named twice, each rule excludes the kept names and what the rules before it name.
    """
    calib, mix = spec.calib_cfg, spec.calib_params.mix_cfg or {}
    assert calib.kind is not None, "the schema lets no such recipe pass"
    kept = dict.fromkeys(calib.disable_names)
    if calib.disable_last_linear:
        kept[HEAD] = None
    named: dict[LayerKind, list[str]] = {}
    for key, value in mix.items():
        if not is_exact(key):
            continue
        if key in kept:
            remarks.drop(f"calib_params.mix_cfg[{key!r}]", "disable_names keeps it in floating point")
        elif value == "float":
            kept[key] = None
        else:
            named.setdefault(_MIX_KINDS[value], []).append(key)
    exact = [_Rule.of(literal_patterns(names), kind) for kind, names in named.items()]
    rules: list[_Rule] = []
    for pattern, kind in _patterns(mix, remarks):
        _add(rules, _Rule.of([pattern], kind))
    if not any("*" in rule.include for rule in rules):
        _add(rules, _Rule(["*"], calib.kind, calib.in_groups))
    taken = [*kept, *(name for names in named.values() for name in names)]
    earlier: list[str] = []
    for rule in rules:
        rule.exclude = _relevant(taken, rule.include, earlier) + earlier
        earlier = earlier + rule.include
    return exact + rules


def _patterns(mix: dict[str, MixType], remarks: Remarks) -> list[tuple[str, LayerKind]]:
    """The patterns of ``mix_cfg`` up to the first ``*``, behind which none is reached."""
    found: list[tuple[str, LayerKind]] = []
    for key, value in mix.items():
        if is_exact(key):
            continue
        path = f"calib_params.mix_cfg[{key!r}]"
        pattern = from_fnmatch(key)
        if pattern is None:
            remarks.drop(path, "no name can match it")
        elif found and found[-1][0] == "*":
            remarks.drop(path, "never reached behind '*'")
        else:
            found.append((pattern, _MIX_KINDS[value]))
    return found


def _add(rules: list[_Rule], rule: _Rule) -> None:
    """Append a rule, or widen the last one if both make the same."""
    if not rules or (rules[-1].kind, rules[-1].grouped) != (rule.kind, rule.grouped):
        rules.append(rule)
    else:
        rules[-1].include = ["*"] if rule.include == ["*"] else rules[-1].include + rule.include


def _relevant(names: Sequence[str], include: Sequence[str], earlier: Sequence[str]) -> list[str]:
    """Patterns of those names that a rule would otherwise take: included, and not excluded already."""

    def matched(name: str, patterns: Sequence[str]) -> bool:
        return any(compile_pattern(pattern).fullmatch(name) for pattern in patterns)

    return literal_patterns(name for name in names if matched(name, include) and not matched(name, earlier))


def _qconfig(rule: _Rule, calib: CalibConfig) -> dict[str, Any]:
    weight = weight_qconfig(rule.kind, calib, grouped=rule.grouped)
    if rule.kind not in _ACT_SCOPES:
        return {"weight": weight}
    static = rule.kind.has_static_input
    act = {
        "dtype": "int4" if rule.kind is LayerKind.W4A4_DYNAMIC else "int8",
        "scope": _ACT_SCOPES[rule.kind],
        "symmetric": not static,
        "method": _ACT_METHODS[calib.act_method] if static else "minmax",
    }
    return {"act": act, "weight": weight}


def weight_qconfig(kind: LayerKind, calib: CalibConfig, *, grouped: bool) -> dict[str, Any]:
    """How the weights of a kind of layer are quantized."""
    ext: dict[str, Any] = {}
    method = "minmax"
    if kind is LayerKind.W8A8S:
        method = "sparse"
        sigma = calib.use_sigma and calib.is_lowbit
        ext |= {"use_sigma": True, "sigma_factor": calib.sigma_factor} if sigma else {"fraction": calib.fraction}
    elif calib.w_method == "GPTQ":
        method = "gptq"
        ext["percdamp"] = calib.percdamp
    if grouped:
        ext["group_size"] = calib.group_size
    config = {
        "dtype": f"int{kind.weight_bits}",
        "scope": "per_group" if grouped else "per_channel",
        "symmetric": calib.w_sym if kind in (LayerKind.W8A16, LayerKind.W4A16) else True,
        "method": method,
    }
    return config | ({"ext": ext} if ext else {})

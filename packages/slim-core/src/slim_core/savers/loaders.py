"""What the serving engines can load, from a table that says which engine version it was read from."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionForm
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.savers.ascendv1_attention import engine_class
from slim_core.savers.loader_asks import ASKED, Facts

__all__ = ["ASCENDV1", "MAIN_ENGINE", "MAIN_ENGINES", "MINDIE", "attention_obstacle", "engine_format", "engines"]
__all__ += ["fused_leaves", "fuses", "is_loadable", "layer_class", "loads_attention", "lost_biases", "mixed_fusions"]
__all__ += ["no_engine", "obstacle", "reads_floats", "refused_together", "unloadable", "unloadable_attentions"]

ASCENDV1, MINDIE = "ascendv1", "mindie"
MAIN_ENGINES = {ASCENDV1: "vllm-ascend", MINDIE: "mindie-sd"}
"""Of every format the engine that it is mainly written for."""
MAIN_ENGINE = MAIN_ENGINES[ASCENDV1]
_EXPERT = re.compile(r"\.experts\.\d+\.")
# Their bias is also in quant_bias, which every such layer has.
_HOLDS_BIAS = frozenset({LayerKind.W8A8, LayerKind.W8A8S})


@cache
def _tables() -> dict[str, Any]:
    return yaml.safe_load(files("slim_core.savers").joinpath("loader_tables.yaml").read_text("utf-8"))


def engines() -> list[str]:
    """The engines that there is a table for."""
    return [name for name in _tables() if name != "fused"]


def engine_format(engine: str) -> str:
    """The format that an engine reads."""
    return _tables()[engine].get("format", ASCENDV1)


def fuses(engine: str) -> bool:
    """Whether an engine makes one of linears that read the same input."""
    return _tables()[engine].get("fuses", True)


def reads_floats(engine: str) -> bool:
    """Whether an engine takes tensors that are not quantized from the files; else they are those of the original."""
    return _tables()[engine].get("floats", True)


def fused_leaves() -> list[list[str]]:
    """Last parts of the names of linears that engines fuse, because they read the same input."""
    return _tables()["fused"]


def layer_class(name: str) -> str:
    """``experts`` for the linears of routed experts, ``linear`` for all others."""
    return "experts" if _EXPERT.search(name) else "linear"


def is_loadable(
    engine: str,
    kind: str,
    name: str,
    form: LayerForm | None = None,
    width: int | None = None,
    has_bias: bool | None = None,
) -> bool:
    """Whether an engine has a class for a layer of this type, at this place and in this form."""
    return obstacle(engine, kind, name, form, width, has_bias) is None


def obstacle(
    engine: str,
    label: str,
    name: str,
    form: LayerForm | None = None,
    width: int | None = None,
    has_bias: bool | None = None,
) -> str | None:
    """Why an engine cannot load a layer, as the end of a sentence that begins with the engine; None if it can.

    Args:
        label: its type in the description.
        name: the linear, which tells experts from others.
        form: what the label leaves open; None if it is not known, which is no obstacle.
        width: its input features, if they are known.
        has_bias: None if that is not known.
    """
    place = layer_class(name)
    table = _tables()[engine]
    asked = table["types"].get(label, {}).get(place)
    if not asked:
        if other := table.get("renamed", {}).get(label):
            return f"knows {label} layers as {other}; write them with fp8_label: {other}"
        return f"has no class for {label} {place} layers"
    if form is None or asked is True:
        return None
    for word in asked:
        met, text = ASKED[word]
        if not met(Facts(form, width, has_bias)):
            return f"loads {label} {place} layers {text}"
    return None


def refused_together(engine: str, forms: Mapping[str, LayerForm]) -> str | None:
    """Why an engine cannot load these layers in one model, as the end of a sentence; None if it can."""
    table = _tables()[engine]["types"]
    other = next((other for other in forms if _has_groups(forms[other])), None)
    if other is None:
        return None
    for name, form in forms.items():
        asked = table.get(str(form.kind), {}).get(layer_class(name))
        if isinstance(asked, list) and "alone" in asked:
            return f"loads {form.kind} layers ({name}) only in models without grouped or MX layers (here {other})"
    return None


def _has_groups(form: LayerForm) -> bool:
    """Whether a layer makes the description's group_size other than 0."""
    return form.group_size > 0 or form.kind.is_microscaling


def unloadable(
    layers: Mapping[str, LayerForm | str],
    widths: Mapping[str, int] = MappingProxyType({}),
    labels: Mapping[str, str] = MappingProxyType({}),
    *,
    engine: str = MAIN_ENGINE,
    without_bias: Collection[str] = (),
) -> list[str]:
    """One warning for everything that keeps an engine from loading layers, with the engines that do load them.

    Args:
        layers: forms by the name of the linear, or kinds where no more is known.
        widths: input features by the name of the linear.
        labels: what kinds are called in the description, where that is not their own name.
        without_bias: the linears that have none.
    """
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, layer in layers.items():
        form = layer if isinstance(layer, LayerForm) else None
        kind = str(layer if form is None else form.kind)
        label = labels.get(kind, kind)
        facts = label, name, form, widths.get(name), name not in without_bias
        if text := obstacle(engine, *facts):
            others = [other for other in _other_engines(engine) if is_loadable(other, *facts)]
            found.setdefault((text, tuple(others)), []).append(name)
    warnings = [
        f"{engine} {text} ({len(names)} linears, e.g. {names[0]}){_load_them(others)}"
        for (text, others), names in found.items()
    ]
    forms = {name: layer for name, layer in layers.items() if isinstance(layer, LayerForm)}
    if text := refused_together(engine, forms):
        warnings.append(f"{engine} {text}")
    return warnings


def no_engine(
    layers: Mapping[str, LayerForm | LayerKind],
    widths: Mapping[str, int],
    labels: Mapping[str, str],
    attentions: Mapping[AttentionInfo, AttentionForm],
    *,
    format: str = ASCENDV1,
    without_bias: Collection[str] = (),
) -> str | None:
    """Why there is no engine that loads all of these in one model: what stops each; None if there is one.

    A label that an engine knows by another name stops nothing: the description is easily changed.

    Args:
        layers: forms by the name of the linear, :attr:`LayerKind.FLOAT` where it is not quantized.
        widths, labels, without_bias: as in :func:`unloadable`.
        attentions: those that are quantized.
        format: what the engines must read.
    """
    stopped: dict[str, list[str]] = {}
    for engine in engines():
        if engine_format(engine) == format:
            text = _first_obstacle(engine, layers, widths, labels, attentions, without_bias)
            if text is None:
                return None
            stopped.setdefault(text, []).append(engine)
    return "; ".join(f"{' and '.join(names)}: {text}" for text, names in stopped.items())


def _first_obstacle(
    engine: str,
    layers: Mapping[str, LayerForm | LayerKind],
    widths: Mapping[str, int],
    labels: Mapping[str, str],
    attentions: Mapping[AttentionInfo, AttentionForm],
    without_bias: Collection[str],
) -> str | None:
    renamed = _tables()[engine].get("renamed", {})
    for name, layer in layers.items():
        form = layer if isinstance(layer, LayerForm) else None
        kind = str(layer if form is None else form.kind)
        label = labels.get(kind, kind)
        if text := obstacle(engine, renamed.get(label, label), name, form, widths.get(name), name not in without_bias):
            return f"{text} (e.g. {name})"
    for info, form in attentions.items():
        if text := attention_obstacle(engine, engine_class(form), info.latent, info.rotated):
            return f"{text} (e.g. {info.name})"
    return refused_together(engine, {name: form for name, form in layers.items() if isinstance(form, LayerForm)})


def _other_engines(engine: str) -> list[str]:
    """Those that read the same format."""
    return [other for other in engines() if other != engine and engine_format(other) == engine_format(engine)]


def _load_them(others: Sequence[str]) -> str:
    """The end of a warning: who loads what the first engine does not."""
    return f"; {' and '.join(others)} load{'' if len(others) > 1 else 's'} them" if others else ""


def mixed_fusions(kinds: Mapping[str, LayerForm | str]) -> list[str]:
    """One warning for each set of linears that engines fuse but that end up with different types or groups."""
    parents: dict[str, dict[str, str]] = {}
    for name, kind in kinds.items():
        parent, _, leaf = name.rpartition(".")
        # An offset does not change the shapes that are fused.
        parents.setdefault(parent, {})[leaf] = str(kind if isinstance(kind, str) else replace(kind, symmetric=True))
    warnings: dict[str, list[str]] = {}
    for parent, leaves in parents.items():
        for fused in fused_leaves():
            present = {leaf: leaves[leaf] for leaf in fused if leaf in leaves}
            if len(set(present.values())) > 1:
                text = ", ".join(f"{leaf} {kind}" for leaf, kind in present.items())
                warnings.setdefault(text, []).append(parent)
    return [
        f"engines fuse these linears and need one type for all: {text} ({len(where)} times, e.g. {where[0]})"
        for text, where in warnings.items()
    ]


def lost_biases(kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The linears whose bias engines do not load, by type.

    They skip a bias that their model class has no place for, unless the layer is static: then ``quant_bias`` holds it.

    Args:
        kinds: types by the name of the linear, of those that were given a bias which their architecture does not have.
    """
    lost: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if kind not in _HOLDS_BIAS:
            lost.setdefault(str(kind), []).append(name)
    return lost


def attention_class(latent: bool) -> str:
    """``latent`` for multi-head latent attention, ``standard`` for all others."""
    return "latent" if latent else "standard"


def loads_attention(engine: str, kind: str, latent: bool, rotated: bool = False) -> bool:
    """Whether an engine has a class for an attention whose tensors have this type."""
    return attention_obstacle(engine, kind, latent, rotated) is None


def attention_obstacle(engine: str, kind: str, latent: bool, rotated: bool) -> str | None:
    """Why an engine cannot load an attention, as the end of a sentence that begins with the engine; None if it can.

    Args:
        kind: its type, as :func:`engine_class` says it.
        rotated: whether there are matrices that query and key are to be multiplied by.
    """
    table, place = _tables()[engine], attention_class(latent)
    if place not in table.get("attention", {}).get(kind, []):
        return f"has no class for {place} attention that is {kind}"
    asks = table.get("rotates", {}).get(kind)
    if asks and not rotated:
        return f"loads {kind} attention only with rotations of query and key, which online_quarot makes"
    if asks is None and rotated:
        return f"does not rotate query and key of {kind} attention, as online_quarot asks for"
    return None


def unloadable_attentions(forms: Mapping[AttentionInfo, AttentionForm], engine: str = MAIN_ENGINE) -> list[str]:
    """One warning for each type of attention that an engine has no class for."""
    found: dict[tuple[str, bool, bool], list[str]] = {}
    for info, form in forms.items():
        found.setdefault((engine_class(form), info.latent, info.rotated), []).append(info.name)
    warnings: list[str] = []
    for facts, names in found.items():
        if text := attention_obstacle(engine, *facts):
            others = [other for other in _other_engines(engine) if loads_attention(other, *facts)]
            warnings.append(f"{engine} {text} ({len(names)} attentions, e.g. {names[0]}){_load_them(others)}")
    return warnings

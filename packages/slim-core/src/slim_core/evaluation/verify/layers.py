"""Whether every module has the tensors its type asks for, and whether engines can load them together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from slim_core.checkpoint.header import StoredTensor
from slim_core.evaluation.verify.findings import ATTENTION, FLOAT, Contents, Findings, Layer, Module, form
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.savers.ascendv1 import FP8_ENGINE_LABEL
from slim_core.savers.ascendv1_layout import BLOCK, FLOAT_BIAS, Part, form_of, layout
from slim_core.savers.loaders import (
    ASCENDV1,
    MINDIE,
    engine_format,
    engines,
    fused_leaves,
    fuses,
    layer_class,
    obstacle,
)
from slim_core.savers.mindie_layout import FOUR_BITS, mindie_form_of, mindie_layout

__all__ = ["Loadable", "check_fusions", "check_group_size", "check_modules", "layer_kind_of", "loadable_layers"]

_KINDS = frozenset(str(kind) for kind in LayerKind if kind is not LayerKind.FLOAT)

# Types of the format whose tensors are not checked one by one here.
_UNCHECKED = re.compile(r"W8A8SC|W8A8_TIMESTEP|\w+_(FLATQUANT|SVD)(_DYNAMIC)?")
_QUANTIZATION_PARTS = frozenset(
    {"weight_scale", "weight_offset", "quant_bias", "input_scale", "input_offset", "deq_scale", "scale_bias"}
    | {"weight_dual_scale", "weight_scale_second", "weight_offset_second", "clip_ratio"}
)
_STATIC = frozenset(str(kind) for kind in LayerKind if kind.has_static_input)
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.[^.]+$")


@dataclass(frozen=True)
class Loadable:
    """How many layers of one form there are at one kind of place (``linear``, ``experts``), and whether an engine has a
    class for them; if not, ``why`` ends the sentence that begins with the engine."""

    engine: str
    kind: str
    place: str
    count: int
    loadable: bool
    example: str
    why: str = ""


def _is_linear(module: Module, contents: Contents) -> bool:
    stored = contents.placed.get(f"{module.prefix}.weight")
    return module.kind != FLOAT or (stored is not None and len(stored.shape) == 2)


def check_modules(contents: Contents, findings: Findings) -> list[Layer]:
    """Check types, names, dtypes and shapes of every module.

    Returns:
        The quantized linears that are complete, so that their values can be checked.
    """
    complete: list[Layer] = []
    unknown: dict[str, list[str]] = {}
    for module in contents.modules():
        before = len(findings.problems)
        if module.kind == FLOAT:
            _check_float(module, contents, findings)
        elif (kind := layer_kind_of(module.kind)) is not None:
            layer = _check_quantized(module, kind, contents, findings)
            if layer is not None and len(findings.problems) == before:
                complete.append(layer)
        elif module.kind == ATTENTION:
            continue
        elif _UNCHECKED.fullmatch(module.kind):
            unknown.setdefault(module.kind, []).append(module.prefix)
        else:
            findings.problem(module.prefix, f"has the type {module.kind!r}, which the format does not know")
    for kind, prefixes in unknown.items():
        findings.warn(prefixes[0], f"what has the type {kind} is not checked further ({len(prefixes)} such)")
    return complete


def _check_float(module: Module, contents: Contents, findings: Findings) -> None:
    for suffix, kind in module.parts.items():
        name = f"{module.prefix}.{suffix}"
        if suffix in _QUANTIZATION_PARTS:
            findings.problem(name, "is a quantization parameter of a module whose weight is FLOAT")
        elif kind != FLOAT:
            findings.problem(name, f"has the type {kind}, expected FLOAT as for the module's weight")
        stored = contents.placed.get(name)
        if suffix == "weight" and stored is not None and not stored.dtype.is_floating_point:
            findings.problem(name, f"is FLOAT but stored as {form(stored.dtype, stored.shape)}")


def layer_kind_of(label: str) -> LayerKind | None:
    """The kind of layer that a type of the description stands for; None if it is no type of layer."""
    if label == FP8_ENGINE_LABEL:
        return LayerKind.WFP8AFP8_DYNAMIC
    return LayerKind(label) if label in _KINDS else None


def _check_quantized(module: Module, kind: LayerKind, contents: Contents, findings: Findings) -> Layer | None:
    stored = {suffix: contents.placed.get(f"{module.prefix}.{suffix}") for suffix in module.parts}
    shapes = {suffix: tensor.shape for suffix, tensor in stored.items() if tensor is not None}
    packed = _is_packed(kind, stored.get("weight"), contents)
    found = mindie_form_of(kind, shapes, packed=packed) if contents.format == MINDIE else form_of(kind, shapes)
    if found is None:
        weight = stored.get("weight")
        if weight is not None:
            findings.problem(weight.name, f"is {form(weight.dtype, weight.shape)}, expected a matrix")
        elif "weight" not in module.parts:
            findings.problem(f"{module.prefix}.weight", f"is missing; a {kind} layer has it")
        return None
    layer, out, width = found
    expected = _layout(layer, module.prefix, out, width, packed, contents)
    _check_names(module, kind, list(expected), findings)
    if layer.group_size and width % layer.group_size:
        findings.problem(f"{module.prefix}.weight_scale", f"has groups that do not divide the {width} columns")
        return None
    if "bias" in module.parts:
        expected["bias"] = Part(torch.float32 if kind in FLOAT_BIAS else None, (out,))
    for suffix, part in expected.items():
        tensor = stored.get(suffix)
        if tensor is None:
            continue
        kept = tensor.dtype if tensor.dtype.is_floating_point else contents.dtype or torch.float32
        want = part.dtype or kept, part.shape
        if (tensor.dtype, tensor.shape) != want:
            why = f" in a {form(contents.dtype)} model" if suffix == "deq_scale" and tensor.shape == part.shape else ""
            findings.problem(tensor.name, f"is {form(tensor.dtype, tensor.shape)}, expected {form(*want)}{why}")
    if None in stored.values():  # what is described and not there is told of already
        return None
    return Layer(module, layer, out, width, packed)


def _is_packed(kind: LayerKind, weight: StoredTensor | None, contents: Contents) -> bool:
    """Whether a weight holds two four-bit elements to a byte; MindIE-SD also takes them as numbers of eight bits."""
    values = contents.format == MINDIE and kind in FOUR_BITS
    return not values or (weight is not None and weight.dtype == torch.uint8)


def _layout(layer: LayerForm, prefix: str, out: int, width: int, packed: bool, contents: Contents) -> dict[str, Part]:
    if contents.format == MINDIE:
        return mindie_layout(layer, prefix, out, width, packed=packed)
    expected = layout(layer, prefix, out, width)
    if "deq_scale" in expected:
        expected["deq_scale"] = Part(torch.float32 if contents.dtype == torch.bfloat16 else torch.int64, (out,))
    return expected


def check_group_size(contents: Contents, layers: Sequence[Layer], findings: Findings) -> None:
    """The one group size that the description has for all layers is that of one of them; 0 if none has groups."""
    if contents.format != ASCENDV1:
        return
    stated = contents.globals.get("group_size")
    if any(layer.kind.is_microscaling for layer in layers):
        sizes, why = {BLOCK}, "with MX types"
    elif sizes := {layer.form.group_size for layer in layers} - {0}:
        why = "as the scales of grouped layers have it"
    else:
        sizes, why = {0}, "without grouped layers"
    if stated is not None and stated not in sizes:
        want = " or ".join(map(str, sorted(sizes)))
        findings.problem(contents.description, f"group_size is {stated!r}, expected {want} {why}")


def _check_names(module: Module, kind: LayerKind, expected: list[str], findings: Findings) -> None:
    for suffix in expected:
        if suffix not in module.parts:
            findings.problem(f"{module.prefix}.{suffix}", f"is missing; a {kind} layer has it")
    for suffix, label in module.parts.items():
        name = f"{module.prefix}.{suffix}"
        want = FLOAT if suffix == "bias" and kind in FLOAT_BIAS else module.kind
        if suffix != "bias" and suffix not in expected:
            findings.problem(name, f"does not belong to a {kind} layer, which has {', '.join(expected)}")
        elif label != want:
            findings.problem(name, f"has the type {label}, expected {want} as part of a {kind} layer")


def check_fusions(contents: Contents, layers: Sequence[Layer], findings: Findings) -> Iterator[tuple[str, list[str]]]:
    """Check that linears which engines fuse have one type and one size of groups, and the experts of a layer too.

    Yields:
        Parent and leaf names of fused linears that are all static, whose input parameters must therefore be equal.
    """
    if not fuses(contents.main_engine):
        return
    kinds = {module.prefix: module.kind for module in contents.modules()}
    kinds |= {layer.prefix: str(layer.form) for layer in layers if layer.form.group_size}
    parents: dict[str, dict[str, str]] = {}
    experts: dict[str, dict[str, str]] = {}
    for prefix, kind in kinds.items():
        parent, _, leaf = prefix.rpartition(".")
        parents.setdefault(parent, {})[leaf] = kind
        if match := _EXPERT.match(prefix):
            experts.setdefault(match[1], {})[prefix] = kind
    for parent, leaves in parents.items():
        for group in fused_leaves():
            present = {leaf: leaves[leaf] for leaf in group if leaf in leaves}
            if len(set(present.values())) > 1:
                text = ", ".join(f"{leaf} is {kind}" for leaf, kind in present.items())
                findings.problem(parent, f"engines fuse these linears and need one type: {text}")
            elif len(present) > 1 and set(present.values()) <= _STATIC:
                yield parent, list(present)
    for parent, every in experts.items():
        members = _of_whole_experts(every)
        if len(set(members.values())) > 1:
            first, other = _two_kinds(members)
            text = f"{first} is {members[first]}, {other} is {members[other]}"
            findings.problem(parent, f"all experts of a layer need one type: {text}")


def _of_whole_experts(members: Mapping[str, str]) -> dict[str, str]:
    """Kinds by linear, without the float linears of experts that lack others: identity experts, which have no weights,
    have rows in the first of two stacks all the same.
    """
    leaves = Counter(prefix.rpartition(".")[0] for prefix in members)
    most = max(leaves.values())
    return {
        prefix: kind for prefix, kind in members.items() if kind != FLOAT or leaves[prefix.rpartition(".")[0]] == most
    }


def _two_kinds(members: Mapping[str, str]) -> tuple[str, str]:
    first = next(iter(members))
    return first, next(name for name, kind in members.items() if kind != members[first])


def loadable_layers(contents: Contents, layers: Sequence[Layer], engine: str | None) -> list[Loadable]:
    """For every engine that reads this format (or the one given), form and place: how many layers, and whether there is
    a class for them."""
    known = {layer.prefix: layer for layer in layers}
    modules = [m for m in contents.modules() if _is_linear(m, contents) and m.kind != ATTENTION]
    entries: list[Loadable] = []
    for name in [engine] if engine else [one for one in engines() if engine_format(one) == contents.format]:
        found: dict[tuple[str, str, str | None], list[str]] = {}
        for module in modules:
            layer, where = known.get(module.prefix), f"{module.prefix}."
            width = layer.width if layer is not None else None
            shape = layer.form if layer is not None else None
            why = obstacle(name, module.kind, where, shape, width, "bias" in module.parts)
            label = str(shape) if shape is not None and module.kind == shape.kind else module.kind
            found.setdefault((label, layer_class(where), why), []).append(module.prefix)
        entries += [
            Loadable(name, label, place, len(prefixes), why is None, prefixes[0], why or "")
            for (label, place, why), prefixes in sorted(
                found.items(), key=lambda item: (*item[0][:2], item[0][2] or "")
            )
        ]
    return entries

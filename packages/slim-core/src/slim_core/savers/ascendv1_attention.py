"""Quantized attentions in the ascendv1 format: the tensors and keys that each becomes, and the way back.

============  ==========================================================================================
C8            ``<attention>.k_proj.kv_cache_scale`` and ``kv_cache_offset``, and so for ``v_proj``: float32
              ``[kv_heads * head_dim]``, head by head. Engines look for ``k_proj`` also where a model fuses its
              projections, because it stands for the key of the attention, not for a linear.
FAQuant       ``<attention>.fa_q.scale`` float32 ``[heads, 1]`` and ``fa_q.offset``, zeros, int8 (float32 for FP8), and
              so for ``fa_k`` and ``fa_v``, where scales are static. The key ``<attention>.quant_type`` says what
              each is.
============  ==========================================================================================

Engines keep both kinds of scales in their own dtype, so that what is stored is a number of that dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError, UnsupportedError, VerificationError
from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import (
    AttentionForm,
    AttentionKind,
    QuantizedAttention,
    QuantizedState,
    StateForm,
    check_attention,
)
from slim_core.savers.ascendv1_layout import Part

__all__ = ["FA_KEY", "QUANT_TYPE", "attention_keys", "attention_layout", "attention_parts", "engine_class"]
__all__ += ["parse_quant_type", "quant_type", "read_attention", "stored_attentions"]

CACHE_KEYS = ("kv_cache_type", "kv_quant_type")
FA_KEY, FA_VALUE = "fa_quant_type", "FAKQuant"
QUANT_TYPE = "quant_type"
_CACHE_PREFIX = {"key": "k_proj", "value": "v_proj"}
_FA_PREFIX = {"query": "fa_q", "key": "fa_k", "value": "fa_v"}
_LETTERS = {"query": "Q", "key": "K", "value": "V"}
_DTYPES = {"int8": "INT8", "fp8_e4m3": "FP8", "mxfp8": "MXFP8", "mxfp4": "MXFP4"}
_GROUP = re.compile(r"(?:([QKVP]+)_)?(INT8|FP8|MXFP8|MXFP4)(_DYNAMIC)?(?:_|$)")
_SIZE_OF_CACHE = {"key": "key_dim", "value": "value_dim"}


def quant_type(form: AttentionForm) -> str:
    """What ``<attention>.quant_type`` says of an attention of kind FAQuant.

    States of one format make a group, ``<letters>_<DTYPE>[_DYNAMIC]``; a group of all three needs no letters. E.g.
    ``INT8``, ``FP8_DYNAMIC``, ``QK_INT8_V_FP8_DYNAMIC``.
    """
    groups: dict[str, str] = {}
    for name, state in form.states():
        kind = f"{_DTYPES[state.dtype]}{'' if state.is_static else '_DYNAMIC'}"
        groups[kind] = groups.get(kind, "") + _LETTERS[name]
    return "_".join(kind if letters == "QKV" else f"{letters}_{kind}" for kind, letters in groups.items())


def parse_quant_type(text: str) -> AttentionForm | None:
    """The form behind a ``quant_type``; None if it is no such text."""
    states: dict[str, StateForm] = {}
    names = {letter: name for name, letter in _LETTERS.items()}
    at = 0
    while at < len(text):
        group = _GROUP.match(text, at)
        if group is None or (group.end() == len(text) and text.endswith("_")):
            return None
        letters, dtype, dynamic = group[1] or "QKV", group[2], bool(group[3])
        micro = dtype.startswith("MX")
        scope = "per_block" if micro else "per_token" if dynamic else "per_head"
        known_letters = len(set(letters)) == len(letters) and set(letters) <= names.keys()
        if not known_letters or (micro and not dynamic) or any(names[each] in states for each in letters):
            return None
        ours = next(name for name, theirs in _DTYPES.items() if theirs == dtype)
        states |= {names[letter]: StateForm(ours, scope) for letter in letters}
        at = group.end()
    if not states:
        return None
    return AttentionForm(AttentionKind.FAQUANT, states.get("query"), states.get("key"), states.get("value"))


def engine_class(form: AttentionForm) -> str:
    """What engines look for: ``C8``, ``FAKQuant`` for static int8 states, else the ``quant_type``."""
    if form.kind is AttentionKind.C8:
        return str(form.kind)
    kind = quant_type(form)
    return FA_VALUE if kind == "INT8" else kind


def attention_layout(info: AttentionInfo, form: AttentionForm) -> dict[str, Part]:
    """The tensors of a quantized attention, by their full name."""
    parts: dict[str, Part] = {}
    for name, state in form.states():
        if form.kind is AttentionKind.C8:
            part = Part(torch.float32, (info.kv_heads * getattr(info, _SIZE_OF_CACHE[name]),))
            prefix = f"{info.prefix}.{_CACHE_PREFIX[name]}.kv_cache"
            parts |= {f"{prefix}_scale": part, f"{prefix}_offset": part}
        elif state.is_static:
            shape = (info.heads if name == "query" else info.kv_heads, 1)
            prefix = f"{info.prefix}.{_FA_PREFIX[name]}"
            parts[f"{prefix}.scale"] = Part(torch.float32, shape)
            parts[f"{prefix}.offset"] = Part(torch.int8 if state.dtype == "int8" else torch.float32, shape)
    return parts


def attention_parts(info: AttentionInfo, quantized: QuantizedAttention) -> dict[str, Tensor]:
    """The tensors themselves."""
    layout = attention_layout(info, _form_of(quantized))
    values: list[Tensor] = []
    for _, state in quantized.states():
        if state.scale is not None and state.offset is not None:
            values += [state.scale, state.offset]
    return {
        name: value.reshape(part.shape).to(part.dtype or torch.float32)
        for (name, part), value in zip(layout.items(), values, strict=True)
    }


def _form_of(quantized: QuantizedAttention) -> AttentionForm:
    forms = {name: state.form for name, state in quantized.states()}
    return AttentionForm(quantized.kind, forms.get("query"), forms.get("key"), forms.get("value"))


def attention_keys(forms: Mapping[AttentionInfo, AttentionForm]) -> dict[str, str]:
    """The keys of a description that tell of attentions without naming a tensor."""
    keys = {
        f"{info.prefix}.{QUANT_TYPE}": quant_type(form)
        for info, form in forms.items()
        if form.kind is AttentionKind.FAQUANT
    }
    if any(form.kind is AttentionKind.C8 for form in forms.values()):
        keys |= dict.fromkeys(CACHE_KEYS, str(AttentionKind.C8))
    if any(form.kind is AttentionKind.FAQUANT and form.needs_data for form in forms.values()):
        keys[FA_KEY] = FA_VALUE
    return keys


def stored_attentions(description: Mapping[str, object]) -> Iterator[str]:
    """The names of the attentions that a description says are quantized."""
    for key in description:
        if key.endswith(".k_proj.kv_cache_scale"):
            yield key.removesuffix(".k_proj.kv_cache_scale")
        elif key.endswith(f".{QUANT_TYPE}"):
            yield key.removesuffix(f".{QUANT_TYPE}")


def read_attention(
    description: Mapping[str, object], source: TensorSource, info: AttentionInfo
) -> QuantizedAttention | None:
    """The quantized attention of this name, None if it is a float one.

    Raises:
        InvalidModelError: its ``quant_type`` cannot be understood.
        UnsupportedError: it is quantized in two ways at once, or its states cannot be reached.
        VerificationError: a tensor is missing, or has not as many values as the attention has channels or heads.
    """
    text = description.get(f"{info.prefix}.{QUANT_TYPE}")
    if f"{info.prefix}.k_proj.kv_cache_scale" in description:
        if text is not None:
            raise UnsupportedError("an attention with both a quantized cache and FAQuant", where=info.prefix)
        asymmetric = StateForm("int8", "per_channel", symmetric=False)
        form = AttentionForm(AttentionKind.C8, None, asymmetric, asymmetric)
    elif text is not None:
        parsed = parse_quant_type(str(text))
        if parsed is None:
            raise InvalidModelError(f"cannot be understood: {text!r}", where=f"{info.prefix}.{QUANT_TYPE}")
        form = parsed
    else:
        return None
    check_attention(form, info)
    stored = {name: _stored(source, name, part) for name, part in attention_layout(info, form).items()}
    states: dict[str, QuantizedState] = {}
    for name, state in form.states():
        if not state.is_static:
            states[name] = QuantizedState(state)
            continue
        if form.kind is AttentionKind.C8:
            prefix = f"{info.prefix}.{_CACHE_PREFIX[name]}.kv_cache_"
        else:
            prefix = f"{info.prefix}.{_FA_PREFIX[name]}."
        states[name] = QuantizedState(state, stored[f"{prefix}scale"], stored[f"{prefix}offset"])
    return QuantizedAttention(form.kind, states.get("query"), states.get("key"), states.get("value"))


def _stored(source: TensorSource, name: str, part: Part) -> Tensor:
    """A tensor as float32 ``(values,)``."""
    if name not in source:
        raise VerificationError("the tensor is missing", where=name)
    value = source.load(name).float().flatten()
    if value.shape[0] != torch.Size(part.shape).numel():
        raise VerificationError(
            f"the tensor has {value.shape[0]} values, the attention asks for {torch.Size(part.shape).numel()}",
            where=name,
            remedy="the weights and config.json do not belong together",
        )
    return value

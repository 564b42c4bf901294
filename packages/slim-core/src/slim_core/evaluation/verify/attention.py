"""Whether quantized attentions (C8 and FAQuant) are complete, of the right shape, and hold values that make sense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorSource
from slim_core.evaluation.verify.findings import ATTENTION, CACHE, FLOAT, Contents, Findings, form
from slim_core.evaluation.verify.layers import Loadable, layer_kind_of
from slim_core.quantization.attention import AttentionForm
from slim_core.rotation.attention import KEY_ROTATION, QUERY_ROTATION
from slim_core.savers.ascendv1_attention import FA_KEY, QUANT_TYPE, engine_class, parse_quant_type
from slim_core.savers.ascendv1_layout import form_of
from slim_core.savers.loaders import attention_obstacle, engine_format, engines

__all__ = ["check_attention_values", "check_attentions", "loadable_attentions"]

_CACHE_PARTS = ("k_proj.kv_cache_scale", "k_proj.kv_cache_offset", "v_proj.kv_cache_scale", "v_proj.kv_cache_offset")
_ROTATIONS = (QUERY_ROTATION, KEY_ROTATION)
_ROUNDING = 0.02  # entries of a rotation are bfloat16, each off by up to 0.4 %
_FA_STATES = {"query": "fa_q", "key": "fa_k", "value": "fa_v"}
_FA_PARTS = tuple(f"{state}.{part}" for state in _FA_STATES.values() for part in ("scale", "offset"))


@dataclass
class _Attention:
    """A quantized attention: the parts that are described, and its ``quant_type``."""

    prefix: str
    parts: set[str] = field(default_factory=set[str])
    quant_type: str | None = None

    @property
    def latent_weight(self) -> str:
        return f"{self.prefix}.kv_b_proj.weight"


def _attentions(contents: Contents) -> dict[str, _Attention]:
    """Every attention that has a tensor of C8 or FAQuant, or a ``quant_type``."""
    found: dict[str, _Attention] = {}
    for name, kind in contents.types.items():
        if kind in (CACHE, ATTENTION):
            pieces = name.rsplit(".", 2)
            prefix = pieces[0] if len(pieces) == 3 else ""
            found.setdefault(prefix, _Attention(prefix)).parts.add(".".join(pieces[1:] if prefix else pieces))
    for key, value in contents.globals.items():
        if key.endswith(f".{QUANT_TYPE}"):
            prefix = key.removesuffix(f".{QUANT_TYPE}")
            found.setdefault(prefix, _Attention(prefix)).quant_type = str(value)
    return found


def check_attentions(contents: Contents, findings: Findings) -> None:
    """Check names, dtypes and shapes, and what the description says besides."""
    attentions = _attentions(contents).values()
    for attention in attentions:
        cached = {part for part in attention.parts if _kind(contents, attention, part) == CACHE}
        if cached:
            _check_cache(attention, cached, contents, findings)
        if attention.parts - cached or attention.quant_type is not None:
            _check_fa(attention, attention.parts - cached, contents, findings)
    for name, kind in contents.types.items():
        if kind != CACHE and name.endswith((".kv_cache_scale", ".kv_cache_offset")):
            findings.problem(name, f"has the type {kind}, expected {CACHE}")
    static = any(part in _FA_PARTS for attention in attentions for part in attention.parts)
    stated = contents.globals.get(FA_KEY)
    if static != (stated is not None) or stated not in (None, "FAKQuant"):
        want = "'FAKQuant' with" if static else "none without"
        findings.problem(FA_KEY, f"is {stated!r}, expected {want} static scales of attentions")


def _kind(contents: Contents, attention: _Attention, part: str) -> str | None:
    return contents.types.get(f"{attention.prefix}.{part}" if attention.prefix else part)


def _stored(contents: Contents, attention: _Attention, part: str) -> StoredTensor | None:
    return contents.placed.get(f"{attention.prefix}.{part}")


def _check_names(attention: _Attention, have: set[str], want: tuple[str, ...], kind: str, findings: Findings) -> None:
    for part in sorted(have - set(want)):
        findings.problem(f"{attention.prefix}.{part}", f"has the type {kind}, which belongs to {', '.join(want)} only")
    for part in want:
        if part not in have:
            findings.problem(f"{attention.prefix}.{part}", f"is missing; an attention of type {kind} has it")


def _check_cache(attention: _Attention, have: set[str], contents: Contents, findings: Findings) -> None:
    _check_names(attention, have, _CACHE_PARTS, CACHE, findings)
    for part in _CACHE_PARTS:
        stored = _stored(contents, attention, part)
        if stored is None:
            continue
        size = _cache_size(contents, attention, part.partition(".")[0])
        if not stored.dtype.is_floating_point or len(stored.shape) != 1 or size not in (None, stored.shape[0]):
            shape = "[kv_heads * head_dim]" if size is None else f"[{size}]"
            findings.problem(stored.name, f"is {form(stored.dtype, stored.shape)}, expected a float {shape}")
    if attention.latent_weight in contents.placed:
        findings.problem(attention.prefix, f"has the type {CACHE}, but caches a latent instead of keys and values")


def _cache_size(contents: Contents, attention: _Attention, projection: str) -> int | None:
    """Channels of all keys (values): the output features of the projection, or what ``config.json`` says."""
    weight = _stored(contents, attention, f"{projection}.weight")
    if weight is not None and len(weight.shape) == 2:
        kind = layer_kind_of(contents.types.get(weight.name, FLOAT))
        prefix = weight.name.removesuffix(".weight")
        names = [name for name in contents.placed if name.startswith(f"{prefix}.")]
        shapes = {name.removeprefix(f"{prefix}."): contents.placed[name].shape for name in names}
        found = form_of(kind, shapes) if kind is not None else None
        return found[1] if found is not None else weight.shape[0]
    heads, kv_heads = contents.setting("num_attention_heads"), contents.setting("num_key_value_heads")
    dim, hidden = contents.setting("head_dim"), contents.setting("hidden_size")
    if not dim and isinstance(hidden, int) and isinstance(heads, int) and heads:
        dim = hidden // heads
    kv_heads = kv_heads or heads
    return kv_heads * dim if isinstance(kv_heads, int) and isinstance(dim, int) else None


def _check_fa(attention: _Attention, have: set[str], contents: Contents, findings: Findings) -> None:
    key = f"{attention.prefix}.{QUANT_TYPE}"
    if attention.quant_type is None:
        findings.problem(key, f"is missing; an attention of type {ATTENTION} has it")
        return
    layout = parse_quant_type(attention.quant_type)
    if layout is None:
        findings.problem(key, f"is {attention.quant_type!r}, which cannot be understood")
        return
    static = {_FA_STATES[name]: state.dtype for name, state in layout.states() if state.is_static}
    want = tuple(part for part in _FA_PARTS if part.partition(".")[0] in static)
    _check_names(attention, have, want, f"{ATTENTION} {attention.quant_type}", findings)
    for part in want:
        stored = _stored(contents, attention, part)
        if stored is None:
            continue
        state, _, suffix = part.partition(".")
        integer = suffix == "offset" and static[state] == "int8"
        heads = _heads(contents, attention, state)
        shape = (stored.shape[0] if heads is None and len(stored.shape) == 2 else heads or 0, 1)
        wanted = torch.int8 if integer else torch.float32
        if (stored.dtype, stored.shape) != (wanted, shape):
            findings.problem(
                stored.name, f"is {form(stored.dtype, stored.shape)}, expected {form(wanted)} [{heads or 'heads'}, 1]"
            )


def _heads(contents: Contents, attention: _Attention, state: str) -> int | None:
    """How many heads a state has; None if the configuration does not say."""
    if state != "fa_q" and attention.latent_weight in contents.placed:
        return 1
    heads = contents.setting("num_attention_heads")
    value = heads if state == "fa_q" else contents.setting("num_key_value_heads") or heads
    return value if isinstance(value, int) else None


def check_attention_values(contents: Contents, stored: TensorSource, findings: Findings) -> int:
    """Check every scale and offset; the number of tensors that were read."""
    shifted: list[str] = []
    _check_rotations(contents, stored, findings)
    checked = 0
    for attention in _attentions(contents).values():
        for part in sorted(attention.parts):
            name = f"{attention.prefix}.{part}"
            if name not in stored:
                continue
            checked += 1
            value = stored.load(name).float()
            if not bool(torch.isfinite(value).all()):
                findings.problem(name, "holds NaN or infinity")
            elif part.endswith("scale") and not bool((value > 0).all()):
                findings.problem(name, f"is {float(value.min()):g} at least once, expected above 0")
            elif part.endswith("offset") and not _is_code(value):
                findings.problem(name, "holds values that are no integers in -128..127")
            elif part.endswith(".offset") and bool((value != 0).any()):
                findings.problem(name, f"is not zero; an attention of type {ATTENTION} has no offset")
            elif part.endswith("_offset") and bool((value != 0).any()):
                shifted.append(name)
    if shifted:
        text = f"is not zero ({len(shifted)} such): the paged decode of {contents.main_engine} ignores it"
        findings.warn(shifted[0], f"{text}; quantize the cache symmetrically")
    return checked


def _check_rotations(contents: Contents, stored: TensorSource, findings: Findings) -> None:
    """Check that scores stay what they are under the matrices that query and key are multiplied by."""
    prefixes = {name.rpartition(".")[0] for name in contents.placed if name.rpartition(".")[2] in _ROTATIONS}
    for prefix in sorted(prefixes):
        names = [f"{prefix}.{leaf}" for leaf in _ROTATIONS]
        if missing := [name for name in names if name not in stored]:
            findings.problem(missing[0], "is missing; query and key of an attention have a rotation both")
            continue
        query, key = (stored.load(name).float() for name in names)
        if query.dim() != 2 or query.shape != key.shape or query.shape[0] != query.shape[1]:
            findings.problem(names[0], f"is {list(query.shape)} beside {list(key.shape)}, expected two equal squares")
        elif not bool(((query @ key.T - torch.eye(len(query))).abs() <= _ROUNDING).all()):
            findings.problem(names[0], "times the transposed k_rot is not one, so that scores change")


def _is_code(value: torch.Tensor) -> bool:
    return bool(((value == value.round()) & (value >= -128) & (value <= 127)).all())


def loadable_attentions(contents: Contents, engine: str | None) -> Iterator[Loadable]:
    """For every engine that reads this format (or the one given) and type: how many attentions, and whether there is a
    class for them."""
    found: dict[tuple[str, bool, bool], list[str]] = {}
    for attention in _attentions(contents).values():
        latent = attention.latent_weight in contents.placed
        if any(part in _CACHE_PARTS for part in attention.parts):
            found.setdefault((CACHE, latent, False), []).append(attention.prefix)
        layout: AttentionForm | None = parse_quant_type(attention.quant_type or "")
        if layout is not None:
            rotated = all(f"{attention.prefix}.{leaf}" in contents.placed for leaf in _ROTATIONS)
            found.setdefault((engine_class(layout), latent, rotated), []).append(attention.prefix)
    for name in [engine] if engine else [one for one in engines() if engine_format(one) == contents.format]:
        for facts, prefixes in sorted(found.items()):
            why = attention_obstacle(name, *facts)
            yield Loadable(name, facts[0], "attention", len(prefixes), why is None, prefixes[0], why or "")

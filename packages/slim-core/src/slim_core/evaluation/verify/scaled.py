"""Linears whose input is multiplied by a scale while the model runs: whether the scales are sound, and what is behind
them in the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.renamed import RenamedSource
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.evaluation.verify.findings import FLOAT, Contents, Findings, Layer, form
from slim_core.model.inputs import MUL_SCALE, mul_scale_of
from slim_core.savers.base import INNER

__all__ = ["behind_scales", "check_input_scales", "scaled_linears"]


def scaled_linears(contents: Contents) -> list[str]:
    """The linears whose input is scaled."""
    return [name.removesuffix(MUL_SCALE) for name in contents.placed if name.endswith(MUL_SCALE)]


def check_input_scales(contents: Contents, layers: Sequence[Layer], findings: Findings) -> None:
    """Check that every scale belongs to a quantized linear and has a positive number for each of its channels.

    Args:
        layers: the quantized linears that are complete.
    """
    widths = {layer.prefix: layer.width for layer in layers}
    for linear in scaled_linears(contents):
        name, weight = mul_scale_of(linear), f"{linear}{INNER}.weight"
        stored, stands = contents.placed[name], contents.placed.get(weight)
        if stands is None or contents.types.get(weight, FLOAT) == FLOAT:
            findings.problem(name, f"scales the input of a linear that is not quantized: expected {weight}")
            continue
        shape = (widths[linear + INNER],) if linear + INNER in widths else stored.shape
        if not stored.dtype.is_floating_point or stored.shape != shape:
            kept = stored.dtype if stored.dtype.is_floating_point else torch.float32
            findings.problem(name, f"is {form(stored.dtype, stored.shape)}, expected {form(kept, shape)}")
        elif not bool((_read(stored) > 0).all()):
            findings.problem(name, "holds numbers that are not positive")


def _read(stored: StoredTensor) -> Tensor:
    reader: Any = safe_open(stored.file, "pt")
    with reader as file:
        return file.get_tensor(stored.name).float()


def behind_scales(original: TensorSource, contents: Contents) -> TensorSource:
    """The original, with linears whose input is scaled under the names of the quantized ones, their weights divided."""
    factors = {linear: contents.placed[mul_scale_of(linear)] for linear in scaled_linears(contents)}
    return _Divided(original, factors) if factors else original


class _Divided(RenamedSource):
    """A source of which some weights ``(out, in)`` are divided by a factor per column; these become float32."""

    def __init__(self, source: TensorSource, factors: Mapping[str, StoredTensor]) -> None:
        names: dict[str, str] = {}
        self._factors: dict[str, StoredTensor] = {}
        for stored in source:
            prefix, _, suffix = stored.rpartition(".")
            name = f"{prefix}{INNER}.{suffix}" if prefix in factors else stored
            names[name] = stored
            if prefix in factors and suffix == "weight" and factors[prefix].shape == source.meta(stored).shape[1:]:
                self._factors[name] = factors[prefix]
        super().__init__(source, names)

    def meta(self, name: str) -> TensorMeta:
        meta = super().meta(name)
        return replace(meta, dtype=torch.float32) if name in self._factors else meta

    def load(self, name: str) -> Tensor:
        return self._divided(name, super().load(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._divided(name, super().rows(name, start, stop))

    def stored(self, name: str) -> StoredTensor | None:
        return None if name in self._factors else super().stored(name)

    def _divided(self, name: str, rows: Tensor) -> Tensor:
        return rows.float() / _read(self._factors[name]) if name in self._factors else rows

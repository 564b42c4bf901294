"""Modules that compute what their quantized forms compute on the target, while blocks or whole models run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.model.attention import Tap
from slim_core.model.skeleton import stand_in
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.layers import QuantizedLinear, SimulatedLinear

__all__ = ["layer_to", "simulated", "simulating_taps"]


def simulating_taps(attentions: Mapping[str, QuantizedAttention], device: torch.device) -> dict[str, Tap]:
    """Taps that put quantized states in the place of the exact ones."""
    moved_there = attentions if device.type == "cpu" else {n: _fields_to(a, device) for n, a in attentions.items()}
    return {name: attention.simulate for name, attention in moved_there.items()}


def layer_to(layer: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    """A quantized linear with its tensors on a device."""
    return layer if device.type == "cpu" else _fields_to(layer, device)


def _fields_to(data: Any, device: torch.device) -> Any:
    if isinstance(data, Tensor):
        return data.to(device)
    if is_dataclass(data) and not isinstance(data, type):
        return replace(data, **{f.name: _fields_to(getattr(data, f.name), device) for f in fields(data)})
    return data


@contextmanager
def simulated(root: nn.Module, layers: Mapping[str, QuantizedLinear], device: torch.device) -> Generator[None]:
    """Within this context the named linears compute what their quantized forms compute on the target."""
    originals: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        dtype = root.get_parameter(f"{name}.weight").dtype
        originals[name] = stand_in(root, name, SimulatedLinear(layer_to(layer, device), dtype))
    try:
        yield
    finally:
        for name, module in originals.items():
            root.set_submodule(name, module)

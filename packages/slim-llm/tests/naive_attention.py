"""What plain forwards put into their caches, and the scales that follow from it.

Uses transformers, numpy and torch tensors; nothing of Slim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

Cached = dict[int, list[tuple[Tensor, Tensor]]]


class Recorder(DynamicCache):
    """What a plain forward puts into its cache; keys and values may be quantized on the way, with scales from files."""

    def __init__(self, scales: dict[tuple[int, str], tuple[Tensor, Tensor]] | None = None, config: Any = None) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.scales = scales or {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.seen[layer_idx] = (key_states, value_states)
        return self._cached(key_states, layer_idx, "k"), self._cached(value_states, layer_idx, "v")

    def _cached(self, state: Tensor, layer: int, name: str) -> Tensor:
        """``(clamp(round(x / s + z)) - z) * s`` channel by channel, in numpy."""
        if (layer, name) not in self.scales:
            return state
        scale, offset = (part.numpy().reshape(1, state.shape[1], 1, -1) for part in self.scales[layer, name])
        codes = np.clip(np.round(state.float().numpy() / scale + offset), -128, 127)
        return torch.from_numpy((codes - offset) * scale).to(state.dtype)


def cached_states(model: Any, ids: list[list[int]], scales: dict[tuple[int, str], Any] | None = None) -> Cached:
    found: Cached = {}
    for each in ids:
        cache = Recorder(scales, model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([each]), use_cache=True, past_key_values=cache)
        for layer, states in cache.seen.items():
            found.setdefault(layer, []).append(states)
    return found


def cache_parameters(states: list[Tensor], symmetric: bool, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Scale and offset of every channel, head by head, from all samples; plain float32 arithmetic."""
    scales, offsets = [], []
    for head in range(states[0].shape[1]):
        for channel in range(states[0].shape[3]):
            values = np.concatenate([state[:, head, :, channel].float().flatten().numpy() for state in states])
            low, high = np.float32(min(values.min(), 0)), np.float32(max(values.max(), 0))
            scale = max(-low, high) / np.float32(127) if symmetric else high / np.float32(255) - low / np.float32(255)
            scale = np.float32(float(torch.tensor(float(max(scale, np.float32(2.0**-23)))).to(dtype)))
            scales.append(float(scale))
            offsets.append(0.0 if symmetric else float(np.clip(np.round(-low / scale) - 128, -128, 127)))
    return scales, offsets


def stored_cache(written: Any, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: tuple(written.tensors[f"{prefix}.{name}_proj.kv_cache_{part}"] for part in ("scale", "offset"))
        for name in "kv"
    }


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def check_cache(written: Any, prefix: str, states: list[tuple[Tensor, Tensor]], symmetric: bool, dtype: Any) -> None:
    for index, (scale, offset) in enumerate(stored_cache(written, prefix).values()):
        want = cache_parameters([pair[index] for pair in states], symmetric, dtype)
        assert (scale.tolist(), offset.tolist()) == want
        assert scale.dtype == offset.dtype == torch.float32

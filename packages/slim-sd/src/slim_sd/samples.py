"""Captured calls of a transformer as calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from slim_core.errors import UnsupportedError
from slim_core.model.streamed import StreamedModel
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.prediction import TowerLoad
from slim_sd.calibration import Calibration
from slim_sd.captured.records import Records
from slim_sd.examples import example_call

__all__ = ["CapturedSamples"]


class _Inputs(Sequence[Mapping[str, Any]]):
    """The keyword arguments of every call, read when they are needed, in the dtype that the model runs in."""

    def __init__(self, records: Records, dtype: torch.dtype) -> None:
        self._records = records
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        arguments = self._records[index]
        captured = _dtype_of(arguments)
        # Time steps are float32 or integers whatever the model runs in; the rest has its dtype.
        cast = tree_map_only(Tensor, lambda x: x.to(self._dtype) if x.dtype == captured else x, arguments)
        return {name: value for name, value in cast.items() if value is not None}


def _dtype_of(arguments: Mapping[str, Any]) -> torch.dtype | None:
    """What the model ran in when this was captured."""
    hidden = _latents(arguments)
    return hidden[0].dtype if hidden and hidden[0].is_floating_point() else None


def _latents(call: Mapping[str, Any]) -> list[Tensor]:
    """What a call denoises: ``hidden_states``, or by another name its first argument, which may be a list of them."""
    first = call["hidden_states"] if "hidden_states" in call else next(iter(call.values()), None)
    return [leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)]


class CapturedSamples:
    """The samples of one transformer. Without a captured file, numbers are those that settings let expect.

    Args:
        component: which transformer of the pipeline it is.
    """

    def __init__(self, calibration: Calibration, component: str, model: StreamedModel) -> None:
        self._calibration = calibration
        self._component = component
        self._model = model

    @property
    def token_bytes(self) -> int:
        """Its hidden state, and the cosines and sines of its place, which are in float32."""
        config = self._model.config
        head = int(config.get("attention_head_dim") or 0)
        width = int(config.get("num_attention_heads") or 0) * head
        return width * (self._model.dtype or torch.float32).itemsize + 2 * 4 * head

    def inputs(self, dataset: DatasetConfig) -> Sequence[Mapping[str, Any]]:
        return _Inputs(self._records(), self._model.dtype or torch.float32)

    def _records(self) -> Records:
        return self._calibration.records(self._component, self._model)

    def extra(self, dataset: DatasetConfig) -> Sequence[Mapping[str, Any]]:
        return ()

    def tokens(self, dataset: DatasetConfig) -> list[int]:
        if not self._calibration.is_there(self._component):
            return self._calibration.expected_tokens()
        records = self._records()
        return [_tokens(records.outline(index), self._model.config) for index in range(len(records))]

    def extra_tokens(self, dataset: DatasetConfig) -> list[tuple[int, int]]:
        return []

    def tower_load(self, dataset: DatasetConfig) -> TowerLoad:
        return TowerLoad()

    def at_hand(self, dataset: DatasetConfig) -> bool:
        return self._calibration.is_there(self._component)

    def identity(self, dataset: DatasetConfig, *, extra: bool = False) -> Any:
        return [] if extra else self._records().identity

    def example(self) -> dict[str, Any]:
        """A small call that is made up; where no such call is known for a class, the first one that was captured.

        Raises:
            UnsupportedError: neither is there.
        """
        made = example_call(self._model.module, self._model.config, self._model.dtype or torch.float32)
        if made is not None:
            return made
        if not self._calibration.is_there(self._component):
            raise UnsupportedError(
                "its blocks can only be explored with calibration inputs, and none were captured yet",
                where=type(self._model.module).__name__,
                remedy="run without --dry_run, which captures them",
            )
        return dict(_Inputs(self._records(), self._model.dtype or torch.float32)[0])


def _tokens(call: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """How many tokens a call makes: of its latents, cut into patches, and of its text if blocks join the two."""
    text = call.get("encoder_hidden_states")
    return sum(_tokens_of(hidden, text, config) for hidden in _latents(call))


def _tokens_of(hidden: Tensor, text: Any, config: Mapping[str, Any]) -> int:
    if hidden.dim() < 3:
        return hidden.shape[0]
    if hidden.dim() == 3:
        return hidden.shape[0] * (hidden.shape[1] + (text.shape[1] if isinstance(text, Tensor) else 0))
    patch = config.get("patch_size") or 1
    sizes = list(patch) if isinstance(patch, (list, tuple)) else [patch, patch]
    first = config.get("patch_size_t") or (1 if len(sizes) < hidden.dim() - 2 else None)
    sizes = ([first] if first else []) + sizes
    count = hidden.shape[0]
    for side, step in zip(hidden.shape[2:], sizes[-(hidden.dim() - 2) :], strict=False):
        count *= max(side // step, 1)
    return count

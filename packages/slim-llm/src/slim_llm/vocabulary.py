"""What a model's vocabulary and positions allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from slim_core.errors import InvalidModelError
from slim_core.model.streamed import StreamedModel

__all__ = ["check_token_ids", "example_input", "max_positions"]

_EXAMPLE_TOKENS = 24


def max_positions(model: StreamedModel) -> int | None:
    """The longest sequence that the model's configuration allows."""
    text = model.config.get("text_config") or model.config
    value = text.get("max_position_embeddings") or text.get("n_positions")
    return value if isinstance(value, int) else None


def check_token_ids(model: StreamedModel, inputs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        InvalidModelError: the tokenizer belongs to another model.
    """
    rows = model.module.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    largest = max((int(given["input_ids"].max()) for given in inputs), default=0)
    if largest >= rows:
        raise InvalidModelError(
            f"the tokenizer gives id {largest}, but the model has {rows} embeddings",
            where=str(model.folder),
            remedy="copy the tokenizer that belongs to the model",
        )


def example_input(model: StreamedModel) -> dict[str, Any]:
    """A short sample of ids from all over the vocabulary, always the same one."""
    rows = model.module.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    ids = torch.linspace(0, rows - 1, _EXAMPLE_TOKENS).round().long()
    return {"input_ids": ids.unsqueeze(0), "use_cache": False}

"""Records of the original Wan project as arguments of diffusers' transformer.

The original forward is ``forward(x, t, context, seq_len, clip_fea, y)`` in Wan2.1 and ``forward(x, t, context, seq_len,
y)`` in Wan2.2; projects built on it append arguments of their own. It differs from diffusers' in form only:

- ``x`` is a list of latents (channels, frames, height, width), one per video; ``y`` of image-to-video models is a list
  of further channels, which the forward puts behind those of ``x`` itself;
- ``context`` is a list of text embeddings (tokens, text_dim) without padding, which the forward pads with zeros;
- ``t`` is (videos,), or (videos, seq_len) where every token has its own time step, seq_len rounded up to a number
  that several devices can share;
- what ``clip_fea`` holds diffusers calls ``encoder_hidden_states_image``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from slim_core.errors import InvalidDatasetError, UnsupportedError

__all__ = ["TEXT_LENGTH", "from_original", "is_original"]

TEXT_LENGTH = 512
"""Tokens that the original project pads a text to, and diffusers' pipeline by default."""

_NEEDED = ("hidden_states", "timestep", "encoder_hidden_states")


def is_original(record: Sequence[Any]) -> bool:
    """Whether a record is a call of the original project's forward."""
    return (
        len(record) >= 4
        and _is_list_of(record[0], 4)
        and isinstance(record[1], Tensor)
        and _is_list_of(record[2], 2)
        and isinstance(record[3], int)
    )


def _is_list_of(value: Any, rank: int) -> bool:
    items = cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else ()
    return bool(items) and all(isinstance(item, Tensor) and item.ndim == rank for item in items)


def from_original(
    record: Sequence[Any],
    where: str,
    parameters: Sequence[str],
    *,
    patch: Sequence[int] = (1, 2, 2),
    dtype: torch.dtype | None = None,
    text_length: int = TEXT_LENGTH,
) -> dict[str, Any]:
    """Keyword arguments of ``WanTransformer3DModel.forward`` that compute what the original call did.

    Args:
        record: one for which :func:`is_original` is true. Works on ``meta`` too.
        where: names it in errors.
        parameters: of the forward; those without a counterpart get what the pipeline passes.
        patch: latents per token in (frames, height, width), of the model's configuration.
        dtype: what latents and embeddings are cast to, as diffusers' pipeline does (the original project leaves that
            to autocast); as they are if None. Time steps stay.
        text_length: tokens that texts are padded to.

    Raises:
        InvalidDatasetError: the parts do not fit together.
        UnsupportedError: the call has arguments whose meaning is unknown, or the model none for what it has.
    """
    if missing := [name for name in _NEEDED if name not in parameters]:
        raise UnsupportedError(
            f"it was captured from the original Wan project, and this transformer takes no {missing[0]}",
            where=where,
            remedy="delete the file, so that the next run captures anew",
        )
    x, timestep, context = cast("list[Tensor]", record[0]), cast("Tensor", record[1]), cast("list[Tensor]", record[2])
    image, y = _image_arguments(record[4:], where)
    if y:
        if len(y) != len(x) or any(a.shape[1:] != b.shape[1:] for a, b in zip(x, y, strict=False)):
            _wrong(where, "x and y do not have the same sizes")
        x = [torch.cat([a, b.to(a.dtype)]) for a, b in zip(x, y, strict=True)]
    if len({tuple(latents.shape) for latents in x}) > 1 or len(x) != len(context):
        _wrong(where, "its videos differ in size, or are not as many as its texts")
    hidden = torch.stack(x)
    arguments: dict[str, Any] = {
        "hidden_states": hidden if dtype is None else hidden.to(dtype),
        "timestep": _time(timestep, hidden, patch, where),
        "encoder_hidden_states": _padded(context, text_length, dtype, where),
    }
    optional: dict[str, Any] = {"return_dict": False, "attention_kwargs": None, "encoder_hidden_states_image": None}
    if image is not None:
        if "encoder_hidden_states_image" not in parameters:
            raise UnsupportedError("the call has embeddings of an image, and this transformer takes none", where=where)
        optional["encoder_hidden_states_image"] = image if dtype is None else image.to(dtype)
    arguments.update((name, value) for name, value in optional.items() if name in parameters)
    return arguments


def _image_arguments(rest: Sequence[Any], where: str) -> tuple[Tensor | None, list[Tensor] | None]:
    """``clip_fea`` and ``y``: told apart by their form, since only Wan2.1 has both."""
    image: Tensor | None = None
    y: list[Tensor] | None = None
    for index, value in enumerate(rest, start=4):
        if index < 6 and image is None and y is None and isinstance(value, Tensor) and value.ndim == 3:
            image = value
        elif index < 6 and y is None and _is_list_of(value, 4):
            y = list(cast("list[Tensor]", value))
        elif _holds_tensors(value):
            raise UnsupportedError(
                f"argument {index} of the original Wan project's call is not known",
                where=where,
                remedy="delete the file, so that the next run captures anew",
            )
    return image, y


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(item) for item in cast("Mapping[Any, Any]", value).values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item) for item in cast("Sequence[Any]", value))
    return isinstance(value, Tensor)


def _time(timestep: Tensor, hidden: Tensor, patch: Sequence[int], where: str) -> Tensor:
    tokens = 1
    for size, step in zip(hidden.shape[2:], patch, strict=True):
        tokens *= size // step
    if timestep.ndim == 2 and timestep.shape[1] >= tokens:
        # What stands behind the tokens belongs to padding, which takes part in nothing.
        timestep = timestep[:, :tokens]
    elif timestep.ndim != 1:
        _wrong(where, f"time steps of shape {list(timestep.shape)} for {tokens} tokens")
    if timestep.shape[0] != hidden.shape[0]:
        _wrong(where, f"{timestep.shape[0]} time steps for {hidden.shape[0]} videos")
    return timestep.contiguous()


def _padded(context: list[Tensor], length: int, dtype: torch.dtype | None, where: str) -> Tensor:
    if len({(text.shape[1], text.dtype) for text in context}) > 1:
        _wrong(where, "embeddings of its texts differ in width or type")
    longest = max(text.shape[0] for text in context)
    if longest > length:
        _wrong(where, f"a text of {longest} tokens where the model takes {length}")
    padded = torch.stack([torch.cat([text, text.new_zeros(length - len(text), text.shape[1])]) for text in context])
    return padded if dtype is None else padded.to(dtype)


def _wrong(where: str, what: str) -> None:
    raise InvalidDatasetError(
        f"the call of the original Wan project does not fit together: {what}",
        where=where,
        remedy="delete the file, so that the next run captures anew",
    )

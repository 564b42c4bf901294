"""Learning a rotation from tokens: the alternating scheme of ITQ (Gong and Lazebnik, CVPR 2011).

Given tokens X, look for the orthogonal R for which quantizing ``X R`` loses least. Two steps alternate: quantize,
``B = Q(X R)``; and turn R so that ``X R`` comes closest to B, which is an orthogonal Procrustes problem, solved by the
polar factor of ``(X R)^T B``. Quantizing with a scale per token is no projection, so the loss may also rise; the best R
is kept, and the identity is among the candidates. With few tokens R learns their rounding errors by heart, so other
tokens can be given to decide which R is best.

Everything is computed in float64 on the CPU, in a fixed order: the same tokens give the same rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError, UnsupportedError

__all__ = ["LearnedRotation", "fake_quantize", "learn_rotation", "polar_factor"]

_linalg: Any = torch.linalg  # its members have no types
_SMALLEST_SCALE = 1e-5
_PATIENCE = 5
_STEPS_BEFORE_STOPPING = 6
_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class LearnedRotation:
    """What was learned.

    Args:
        matrix: float64 ``(channels, channels)``, orthogonal.
        losses: ``|X R - Q(X R)|_F / tokens``, of the tokens that decide, for the rotation that every step began with;
            the first is that of the identity.
        best: the index of the loss that belongs to ``matrix``, the smallest.
    """

    matrix: Tensor
    losses: tuple[float, ...]
    best: int

    @property
    def gain(self) -> float:
        """The loss of ``matrix`` relative to that of the identity; 1 if nothing was gained, or nothing was to be."""
        return self.losses[self.best] / self.losses[0] if self.losses[0] else 1.0


def polar_factor(matrix: Tensor) -> Tensor:
    """The orthogonal Q with the largest ``tr(Q^T M)``: ``U V^T`` of ``M = U S V^T``.

    Where M says nothing, Q stays as close to the identity as it can: between the null spaces, with bases ``U_0`` and
    ``V_0``, it is ``U_0 K V_0^T`` with the K of the largest trace. So the zero matrix gives the identity.

    Args:
        matrix: ``(n, n)``, finite.

    Returns:
        float64 ``(n, n)``.
    """
    u, singular, vh = _linalg.svd(matrix.double())
    rank = int((singular > singular[:1] * len(singular) * torch.finfo(torch.float64).eps).sum())
    if rank < len(singular):
        left, right = u[:, rank:], vh[rank:]
        a, _, bh = _linalg.svd(left.T @ right.T)
        vh = torch.cat([vh[:rank], a @ bh @ right])
    return u @ vh


def fake_quantize(tokens: Tensor, bits: int) -> Tensor:
    """Tokens ``(..., channels)`` through symmetric quantization with one scale per token, at least 1e-5; same dtype."""
    largest = 2 ** (bits - 1) - 1
    scale = (tokens.abs().amax(-1, keepdim=True) / largest).clamp(min=_SMALLEST_SCALE)
    return (tokens / scale).round_().clamp_(-largest - 1, largest).mul_(scale)


def learn_rotation(
    tokens: Sequence[Tensor],
    *,
    deciding: Sequence[Tensor] = (),
    quant_dtype: Literal["int4", "int8"] = "int4",
    steps: int = 20,
) -> LearnedRotation:
    """The best rotation of some steps of alternation.

    Memory beyond the tokens is a few matrices of the size of the rotation: tokens are worked on in chunks.

    Args:
        tokens: float matrices ``(tokens, channels)``, already multiplied by the rotation to start from: the result
            comes after it. Their order matters only to rounding.
        deciding: such matrices of tokens that are not learned from, to measure the loss on; none: the same ones.
        quant_dtype: what the rotated tokens will be quantized to.
        steps: how often to turn; ended when five steps in a row have gained nothing, from the seventh on.

    Raises:
        UnsupportedError: there are no tokens, or of different widths.
        InvalidModelError: they hold NaN or infinity.
    """
    bits = 4 if quant_dtype == "int4" else 8
    width = _checked_width([*tokens, *deciding])
    rotation = best = torch.eye(width, dtype=torch.float64)
    losses: list[float] = []
    kept = 0
    for step in range(steps + 1):
        loss, product = _quantization_step(tokens, rotation, bits)
        losses.append(_quantization_step(deciding, rotation, bits)[0] if deciding else loss)
        if losses[step] < losses[kept]:
            best, kept = rotation, step
        if step == steps or loss == 0 or (step >= _STEPS_BEFORE_STOPPING and step - kept >= _PATIENCE):
            break
        rotation = rotation @ polar_factor(product)
    return LearnedRotation(best, tuple(losses), kept)


def _checked_width(tokens: Sequence[Tensor]) -> int:
    widths = {part.shape[-1] for part in tokens if part.dim() == 2 and len(part)}
    if not widths:
        raise UnsupportedError(
            "there are no tokens to learn a rotation from",
            remedy="check layer_type and the calibration set",
        )
    if len(widths) > 1:
        raise UnsupportedError(
            f"tokens of different widths, {sorted(widths)}, cannot share a rotation",
            remedy="let layer_type name linears that read the hidden state",
        )
    if not all(bool(torch.isfinite(part).all()) for part in tokens):
        raise InvalidModelError("tokens hold NaN or infinity", remedy="check the model and the calibration set")
    return widths.pop()


def _chunks(tokens: Sequence[Tensor]) -> Iterator[Tensor]:
    for part in tokens:
        for start in range(0, len(part), _CHUNK):
            yield part[start : start + _CHUNK].double().cpu()


def _quantization_step(tokens: Sequence[Tensor], rotation: Tensor, bits: int) -> tuple[float, Tensor]:
    """The loss of a rotation, and ``(X R)^T Q(X R)``."""
    product = torch.zeros_like(rotation)
    noise, count = 0.0, 0
    for chunk in _chunks(tokens):
        rotated = chunk @ rotation
        quantized = fake_quantize(rotated, bits)
        product.addmm_(rotated.T, quantized)
        noise += float((rotated - quantized).square().sum())
        count += len(chunk)
    return noise**0.5 / max(count, 1), product

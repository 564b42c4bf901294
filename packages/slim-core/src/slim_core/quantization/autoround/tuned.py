"""A linear whose rounding and range are being learned."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import by_groups
from slim_core.quantization.autoround.inputs import InputRounding
from slim_core.quantization.autoround.rounding import (
    WeightGrid,
    WeightRange,
    fake_quantized,
    gradients,
    round_weight,
    scale_and_offset,
)
from slim_core.quantization.row_blocks import for_each_block, rows_per_block
from slim_core.quantization.weights import QuantizedWeight, refuse_infinite, sqnr

__all__ = ["TunedLinear", "TunedWeight"]


class TunedWeight:
    """The state of one weight: v, alpha and beta, and the fake-quantized weight they make.

    Takes thirteen bytes per weight: v, the fake-quantized weight and its gradient in float32, and the codes of the best
    state. Work is done on blocks of rows.

    Args:
        weight: float matrix ``(out, in)`` on the device; only read.
        grid: what it is rounded to.
        group_size: columns that share a scale, a divisor of ``in``; 0: all of them.
        name: the tensor, for errors.

    Raises:
        InvalidModelError: the weight holds NaN or infinity, or its scale does not fit its precision.
    """

    BYTES: ClassVar[int] = 13
    """Memory per weight."""

    def __init__(self, weight: Tensor, grid: WeightGrid, group_size: int, name: str) -> None:
        self.grid = grid
        self.group_size = group_size
        self._weight = by_groups(weight, weight.shape[1] // group_size if group_size else 1)
        self.span = _extremes(self._weight)
        _check(self.span, grid, name)
        self._limits = self.span.alpha.clone(), self.span.beta.clone()
        self.shift: Tensor | None = None
        self.value = nn.Parameter(torch.empty(weight.shape, device=weight.device))
        self._refresh()
        self.keep()

    @property
    def groups(self) -> int:
        return self._weight.shape[1]

    @property
    def exact(self) -> Tensor:
        """The weight itself as float32 ``(out, in)``; only to be read."""
        return self._weight.flatten(1).float()

    def restart(self, alpha: Tensor, beta: Tensor) -> None:
        """Round to nearest with these factors of the range ``(out, groups, 1)``, which will be written to."""
        self.span = replace(self.span, alpha=alpha, beta=beta)
        self._limits = alpha.clamp(min=1.0), beta.clamp(min=1.0)
        self.shift = None
        self._refresh()

    def step(self, lr: float, minmax_lr: float, momentum: float = 0.0) -> None:
        """One step against the sign of the gradients, of v by ``lr`` and of the factors by ``minmax_lr``.

        At four bits v stays within half a step, so a weight goes to one of its two neighbours. At eight bits it may go
        one code further: steps are small there, and one weight can make up for the errors of many. The factors stay
        between 0 and 1, or where they began if that is more.

        Without a gradient, because nothing reached the linear, nothing happens. Of the gradient a share ``momentum``
        stays, for that of the next step to be added to.
        """
        if self.value.grad is None:
            return
        given = self.value.grad.contiguous()
        self.value.grad = given if momentum else None
        if lr and self.shift is None:
            self.shift = torch.zeros(self._weight.shape, device=given.device)
        upstream, bound = by_groups(given, self.groups), 0.5 if self.grid.bits <= 4 else 1.0

        def work(start: int) -> None:
            rows = self._rows(start)
            span, shift = self.span.rows(rows), None if self.shift is None else self.shift[rows]
            found = gradients(self._weight[rows], span, shift, self.grid, upstream[rows])
            if lr and shift is not None:
                _descend(shift, found.shift, lr).clamp_(-bound, bound)
            if minmax_lr:
                for factor, gradient, most in zip(
                    (span.alpha, span.beta), (found.alpha, found.beta), self._limits, strict=True
                ):
                    _descend(factor, gradient, minmax_lr).clamp_(min=0.0).clamp_(max=most[rows])
            self._refresh_rows(start)
            if momentum:
                torch.nan_to_num_(upstream[rows], nan=0.0, posinf=0.0, neginf=0.0).mul_(momentum)

        for_each_block(work, self._starts())

    def keep(self) -> None:
        """Remember the present state as the best one."""
        scale, offset = scale_and_offset(self.span, self.grid)
        codes = torch.empty(self.value.shape, dtype=torch.int8, device=self.value.device)

        def work(start: int) -> None:
            rows = self._rows(start)
            shift = None if self.shift is None else self.shift[rows]
            found = round_weight(self._weight[rows], scale[rows], offset[rows], shift, self.grid)
            codes[rows] = found.flatten(1).to(torch.int8)

        for_each_block(work, self._starts())
        self._best = codes, scale.squeeze(2), offset.squeeze(2)

    def best(self) -> QuantizedWeight:
        """The state that was kept last, on the host."""
        codes, scale, offset = (part.cpu() for part in self._best)
        found = QuantizedWeight(codes, scale, offset, 0.0)
        return replace(found, sqnr_db=sqnr(self.exact.cpu(), found.dequantized()))

    def _refresh(self) -> None:
        """Compute the fake-quantized weight anew."""
        for_each_block(self._refresh_rows, self._starts())

    def _refresh_rows(self, start: int) -> None:
        rows = self._rows(start)
        shift = None if self.shift is None else self.shift[rows]
        value = fake_quantized(self._weight[rows], self.span.rows(rows), shift, self.grid)
        self.value.data[rows] = value.flatten(1)

    def _starts(self) -> range:
        out, width = self.value.shape
        return range(0, out, rows_per_block(width, self.value.device))

    def _rows(self, start: int) -> slice:
        return slice(start, start + self._starts().step)


def _extremes(weight: Tensor) -> WeightRange:
    low = weight.amin(-1, keepdim=True).float().clamp(max=0.0)
    high = weight.amax(-1, keepdim=True).float().clamp(min=0.0)
    return WeightRange(low, high, torch.ones_like(low), torch.ones_like(low))


def _check(span: WeightRange, grid: WeightGrid, name: str) -> None:
    refuse_infinite(torch.cat([span.low, span.high], -1), name)
    if not bool(torch.isfinite(scale_and_offset(span, grid)[0]).all()):
        raise InvalidModelError(
            f"a scale of the weight is too large for {str(grid.scale_dtype).removeprefix('torch.')}",
            where=name,
            remedy="use ext.scale_dtype: bfloat16 or float32",
        )


def _descend(parameter: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """In place. Half-precision products may overflow; such a gradient says nothing."""
    return parameter.sub_(torch.nan_to_num_(torch.sign(gradient), nan=0.0), alpha=lr)


class TunedLinear(nn.Module):
    """Stands in for a linear while its weight is being learned, and computes what the quantized one will.

    Args:
        tuned: its weight.
        inputs: what happens to its activations.
        bias: ``(out,)`` on the device, or None.
        product: dtype of the matrix product; None takes that of the activations.
        pace: how much longer than usual the steps of v are, unless their length is given.
    """

    def __init__(
        self,
        tuned: TunedWeight,
        inputs: InputRounding,
        bias: Tensor | None,
        product: torch.dtype | None = None,
        pace: float = 1.0,
    ) -> None:
        super().__init__()
        self.tuned = tuned
        self.inputs = inputs
        self.bias = bias
        self.product = product
        self.pace = pace
        self.tokens = 0
        self.watching = False
        self.energy: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.tokens += x.numel() // max(x.shape[-1], 1)
        rounded = self.inputs(x)
        if self.watching:
            self._watch(rounded.detach())
        dtype = self.product or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(rounded.to(dtype), self.tuned.value.to(dtype), bias).to(x.dtype)

    def _watch(self, x: Tensor) -> None:
        """Add up the squares of every input channel."""
        energy = x.reshape(-1, x.shape[-1]).float().square().sum(0)
        self.energy = energy if self.energy is None else self.energy + energy

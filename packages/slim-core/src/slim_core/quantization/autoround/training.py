"""Sign gradient descent on the squared error of a block's output."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slim_core.errors import InvalidModelError, UnexpectedError
from slim_core.model.block_run import BlockRun
from slim_core.model.skeleton import stand_in
from slim_core.quantization.autoround.start import searched_factors
from slim_core.quantization.autoround.tuned import TunedLinear

__all__ = ["Outcome", "TrainingOptions", "shuffled", "train", "training_forwards"]

_EVALUATIONS = 10
_EVALUATED = 8


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Args:
        iters: steps.
        round_tuning: whether to learn v.
        minmax_tuning: whether to learn the ranges; if not, they are those of the weight.
        lr, minmax_lr: first step of v, in codes, and of the factors; steps shrink linearly to nothing. None: as
            :attr:`rates` has it.
        momentum: share of the gradient that is kept from step to step.
        batch_size: samples per step.
        seed: decides the order of the samples.
    """

    iters: int
    round_tuning: bool = True
    minmax_tuning: bool = True
    lr: float | None = None
    minmax_lr: float | None = None
    momentum: float = 0.6
    batch_size: int = 8
    seed: int = 0

    @property
    def rates(self) -> tuple[float, float]:
        """First steps of v and of the factors; 0 for what is not learned.

        Unless told otherwise v travels a fifth of a code at most, and less if there are few steps: longer ones turn too
        many weights at once. The ranges were searched before and move a tenth as fast.
        """
        lr = min(0.4 / self.iters, 0.02) if self.lr is None else self.lr
        minmax_lr = min(0.04 / self.iters, 0.002) if self.minmax_lr is None else self.minmax_lr
        return lr * self.round_tuning, minmax_lr * self.minmax_tuning


@dataclass(frozen=True)
class Outcome:
    """Squared errors on the evaluated samples, relative to the squares of what is wanted.

    Args:
        nearest: with every weight rounded to nearest.
        start: of the state that training started from.
        best: of the state that was kept.
        unseen: linears that no sample reached; they are rounded to nearest.
    """

    nearest: float
    start: float
    best: float
    unseen: tuple[str, ...]


def train(block: BlockRun, linears: Mapping[str, TunedLinear], options: TrainingOptions, name: str) -> Outcome:
    """Learn the weights of some linears of a block together; each keeps its part of the best state of all.

    States are compared on a fixed part of the samples, the start and rounding to nearest among them.

    Args:
        linears: by the names of the modules that they stand in for.
        name: the block, for errors.

    Raises:
        InvalidModelError: the outputs of the block hold NaN or infinity.
    """
    with _replaced(block.module, linears):
        return _Training(block, linears, options, name).run()


class _Training:
    def __init__(
        self, block: BlockRun, linears: Mapping[str, TunedLinear], options: TrainingOptions, name: str
    ) -> None:
        self._block = block
        self._linears = linears
        self._options = options
        self._name = name
        count = min(block.samples, max(_EVALUATED, options.batch_size))
        self._evaluated = [i * block.samples // count for i in range(count)]
        self._unit = 1.0

    def run(self) -> Outcome:
        nearest = self._first_loss()
        start = self._better_start(nearest) if self._options.minmax_tuning else nearest
        best = self._descend(start)
        if not best <= start <= nearest:
            raise UnexpectedError("training ended worse than it began", where=self._name)
        unseen = tuple(name for name, linear in self._linears.items() if not linear.tokens)
        return Outcome(nearest, start, best, unseen)

    def _first_loss(self) -> float:
        """The loss of rounding to nearest; meanwhile the inputs of the linears are watched."""
        squares = [float(self._block.target(sample).float().square().sum()) for sample in self._evaluated]
        self._unit = 1 / sum(squares) if sum(squares) > 0 else 1.0
        for linear in self._linears.values():
            linear.watching = True
        loss = self._loss()
        for linear in self._linears.values():
            linear.watching = False
        if not math.isfinite(loss):
            raise InvalidModelError(
                "its outputs hold NaN or infinity", where=self._name, remedy="check the model and the calibration set"
            )
        return loss

    def _better_start(self, nearest: float) -> float:
        """Search the ranges one group at a time; go back if the block as a whole is no better for it."""
        for linear in self._linears.values():
            if linear.energy is not None:
                _search(linear, linear.energy)
        loss = self._loss()
        if loss < nearest:
            self._keep()
            return loss
        for linear in self._linears.values():
            ones = torch.ones_like(linear.tuned.span.alpha)
            linear.tuned.restart(ones, ones.clone())
        return nearest

    def _descend(self, start: float) -> float:
        iters, (lr, minmax_lr) = self._options.iters, self._options.rates
        if not lr and not minmax_lr:
            return start
        every = math.ceil(iters / _EVALUATIONS)
        batches = shuffled(self._block.samples, self._options.batch_size, self._options.seed)
        best = start
        for done in range(1, iters + 1):
            before = {name: linear.tokens for name, linear in self._linears.items()}
            for sample in next(batches):
                self._backward(sample)
            left = 1 - (done - 1) / iters
            for name, linear in self._linears.items():
                if linear.tokens > before[name]:  # else what is left of an old gradient would drive it on
                    pace = linear.pace if self._options.lr is None else 1.0
                    linear.tuned.step(lr * left * pace, minmax_lr * left, self._options.momentum)
            if (done % every == 0 or done == iters) and (loss := self._loss()) < best:
                best = loss
                self._keep()
        return best

    def _keep(self) -> None:
        for linear in self._linears.values():
            linear.tuned.keep()

    def _backward(self, sample: int) -> None:
        with torch.enable_grad():
            error = self._error(sample)
            if error.requires_grad:  # it does not if no learned linear saw anything
                torch.autograd.backward(error)

    def _loss(self) -> float:
        with torch.no_grad():
            return sum(float(self._error(sample)) for sample in self._evaluated)

    def _error(self, sample: int) -> Tensor:
        """The squared error of one sample. Samples add up, so every token counts the same."""
        difference = self._block.run(sample).float() - self._block.target(sample).float()
        return difference.square().sum() * self._unit


def _search(linear: TunedLinear, energy: Tensor) -> None:
    tuned = linear.tuned
    tuned.restart(*searched_factors(tuned.exact, tuned.span, tuned.grid, energy, tuned.group_size))


def training_forwards(samples: int, iters: int, batch_size: int) -> int:
    """How many forwards of the block training takes; one with gradients is as long as three."""
    evaluations = 2 + -(-iters // math.ceil(iters / _EVALUATIONS))
    return 3 * iters * min(batch_size, samples) + evaluations * min(samples, max(_EVALUATED, batch_size))


def shuffled(samples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches in which every sample takes its turn before any comes again, each round in another order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        batch: list[int] = []
        while len(batch) < min(batch_size, samples):
            waiting = waiting or [int(i) for i in torch.randperm(samples, generator=generator)]
            batch.append(waiting.pop())
        yield batch


@contextmanager
def _replaced(root: nn.Module, linears: Mapping[str, nn.Module]) -> Generator[None]:
    """Within this context the named modules are others."""
    originals: dict[str, nn.Module] = {}
    try:
        for name, linear in linears.items():
            originals[name] = stand_in(root, name, linear)
        yield
    finally:
        for name, module in originals.items():
            root.set_submodule(name, module)

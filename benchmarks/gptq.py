"""GPTQ and SSZ of one linear, against the plain torch operations that GPTQ cannot do without, in the same process.

    python benchmarks/gptq.py --size 4096 [--out 4096] [--threads 2] [--rounds 3] [--bits 4] [--group_size 128]

Three floors. ``bare``: one Cholesky factorisation of the damped Hessian, which is all that Slim's own formulation
needs, and the matrix products that bring the error of all earlier columns into each block. ``updates``: the same, and
the updates of the columns within a block, which come one after the other whatever the formulation. ``textbook``:
Cholesky, inverse from it, Cholesky of that, and the products of ``bare`` the other way round, again without the updates
within a block. None searches scales, rounds, or orders anything.
Rounds alternate, since the machine is noisy; the figures are those of the fastest round of each. CPU seconds are given
besides wall seconds: with one thread they hardly change when others use the machine too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from slim_core.quantization.methods.gptq import GptqOptions, gptq_weight
from slim_core.quantization.methods.ssz import ssz_weight
from slim_core.quantization.statistics import Hessian
from slim_core.quantization.weights import InMemory

BLOCK = 128


def correlated(tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """Activations of a few common directions, some large channels, and noise."""
    common = torch.randn(tokens, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    x = common / (width // 8) ** 0.5 + torch.randn(tokens, width, generator=generator)
    return x * (1 + 9 * (torch.rand(width, generator=generator) < 0.01))


def damped(hessian: Hessian) -> Tensor:
    assert hessian.total is not None
    matrix = hessian.total / hessian.tokens
    matrix.diagonal().add_(0.01 * float(matrix.diagonal().mean()))
    return matrix


def bare(matrix: Tensor, columns: Tensor, *, within: bool = False) -> None:
    """``columns`` is ``(in, out)``; ``within``: also the updates of columns within a block."""
    factor = torch.linalg.cholesky(matrix).mT
    for stop in range(len(columns), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        block = torch.addmm(columns[start:stop], factor[start:stop, stop:], columns[stop:])
        for k in reversed(range(len(block) - 1 if within else 0)):
            block[k].addmv_(block[k + 1 :].T, factor[start + k, start + k + 1 : stop])


def textbook(matrix: Tensor, weight: Tensor) -> None:
    """``weight`` is ``(out, in)``; it is changed."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        stop = start + BLOCK
        weight[:, stop:] -= weight[:, start:stop] @ (factor[start:stop, stop:] * 1e-9)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="input features")
    parser.add_argument("--out", type=int, help="output features; default: as many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group_size", type=int, default=0, help="0: one scale per channel")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, out = arguments.size, arguments.out or arguments.size
    generator = torch.Generator().manual_seed(0)
    hessian = Hessian()
    for _ in range(4):
        hessian.update(correlated(width // 2, width, generator))
    matrix = damped(hessian)
    weight = (torch.randn(out, width, generator=generator) * 0.02).bfloat16()
    columns, copy = weight.float().T.contiguous(), weight.float()
    kwargs = {"bits": arguments.bits, "group_size": arguments.group_size, "name": "weight"}
    options = GptqOptions()

    def gptq() -> object:
        return gptq_weight(InMemory(weight), hessian, symmetric=True, options=options, linear="linear", **kwargs)

    works: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(matrix, columns),
        "updates": lambda: bare(matrix, columns, within=True),
        "textbook": lambda: textbook(matrix, copy),
        "gptq": gptq,
        "ssz": lambda: ssz_weight(InMemory(weight), **kwargs),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            seconds[name].append(timed(work))
        print("  ".join(f"{name} {times[-1][0]:.2f} s" for name, times in seconds.items()), flush=True)
    print(f"{out}x{width}, {arguments.bits} bits, group_size {arguments.group_size}, {arguments.threads} threads")
    for kind, title in enumerate(("wall", "CPU")):
        best = {name: min(times[kind] for times in rounds) for name, rounds in seconds.items()}
        floors = ("bare", "updates", "textbook")
        times = " = ".join(f"{best['gptq'] / best[name]:.2f}x {name} ({best[name]:.2f} s)" for name in floors)
        print(f"{title}: gptq {best['gptq']:.2f} s = {times}; ssz {best['ssz']:.2f} s")


if __name__ == "__main__":
    main()

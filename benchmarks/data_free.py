"""Data-free W8A8: wall time against the two floors nobody can go below, in the same run.

    python benchmarks/data_free.py /tmp/qwen3-4b [--rounds 3]

Floor 1 reads every input byte and writes as many output bytes with plain safetensors. Floor 2 is the bare arithmetic of
the same quantization over tensors that are already in memory. Slim forces its output to disk before it lets the folder
appear, so floor 1 is taken with that sync; ``--no-sync`` leaves it out on both sides and so takes the disk out of the
comparison. Rounds alternate, since the machine is noisy; the figure is the ratio of the fastest rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from measure import quantize, show
from safetensors import safe_open
from safetensors.torch import save_file

from slim_core.quantization.minmax import minmax_per_channel

RECIPE = Path(__file__).parents[1] / "examples" / "w8a8-dynamic.yaml"


class InMemory:
    """A tensor as a row source."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop]


def copy_floor(model: Path, folder: Path, sync: bool) -> float:
    """Seconds to read every tensor and write the bytes that the quantized model has, by safetensors alone."""
    began = time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        output = {}
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                tensor = reader.get_tensor(name)
                tensor.view(torch.int16).amax()  # a mapped tensor is read when it is touched
                small = len(tensor.shape) == 2 and ".layers." in name
                flat = tensor.contiguous().view(torch.uint8).view(-1)
                output[name] = flat[: flat.numel() // 2].clone() if small else flat
        save_file(output, folder / file.name)
        if sync:
            fd = os.open(folder / file.name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    return time.perf_counter() - began


def arithmetic_floor(model: Path) -> float:
    """Seconds of the bare arithmetic; one shard is in memory at a time, and only the arithmetic is timed."""
    seconds = 0.0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            names = [name for name in reader.keys() if ".layers." in name and name.endswith("proj.weight")]  # noqa: SIM118
            for name in names:
                tensor = reader.get_tensor(name).clone()
                began = time.perf_counter()
                minmax_per_channel(InMemory(tensor), bits=8, symmetric=True, name=name)
                seconds += time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-sync", dest="sync", action="store_false")
    arguments = parser.parse_args()
    copies, sums, costs = [], [], []
    for _ in range(arguments.rounds):
        scratch = Path(tempfile.mkdtemp(dir=arguments.model.parent))
        copies.append(copy_floor(arguments.model, scratch, arguments.sync))
        shutil.rmtree(scratch)
        sums.append(arithmetic_floor(arguments.model))
        costs.append(quantize(arguments.model, RECIPE, arguments.model.parent / "out", sync=arguments.sync))
        print(f"copy {copies[-1]:.1f} s, arithmetic {sums[-1]:.1f} s", flush=True)
        show("slim", costs[-1])
    floor = max(min(copies), min(sums))
    best = min(cost.wall for cost in costs)
    print(f"floor {floor:.1f} s, slim {best:.1f} s whole process ({best / floor:.2f}x), ", end="")
    run = min(cost.run_seconds for cost in costs)
    print(f"{run:.1f} s without start-up ({run / floor:.2f}x)")
    print(f"CPU {min(cost.cpu for cost in costs):.1f} s, peak {max(cost.peak for cost in costs):.0f} MiB")

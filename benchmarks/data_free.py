"""Data-free W8A8: time against the two floors nobody can go below, in the same run.

    python benchmarks/data_free.py /tmp/qwen3-4b [--rounds 3]

Floor 1 reads every input byte and writes as many output bytes with plain safetensors. Floor 2 is the bare arithmetic of
the same quantization over tensors that are already in memory. Each runs in a process of its own, like Slim, after the
same imports: a virtual machine may take back memory that was free for a while, and its first use then costs extra.

Slim forces its output to disk before it lets the folder appear, so floor 1 is taken with that sync; ``--no-sync``
leaves it out on both sides, and ``--out`` in memory takes the disk out of the comparison. Rounds alternate, since the
machine is noisy; the figure is the ratio of the fastest rounds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from measure import quantize, run_python, show

RECIPE = Path(__file__).parents[1] / "examples" / "w8a8-dynamic.yaml"

_IMPORTS = """
import json, os, sys, time
from pathlib import Path
import torch
import slim_llm.quantize
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
from safetensors import safe_open
from safetensors.torch import save_file
from slim_core.quantization.methods.minmax import minmax_weight
tied = json.loads((Path(sys.argv[1]) / "config.json").read_text())["tie_word_embeddings"]
model, folder, sync = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
"""

COPY = (
    _IMPORTS
    + """
began = time.perf_counter()
for file in sorted(model.glob("*.safetensors")):
    output = {}
    with safe_open(file, "pt") as reader:
        for name in reader.keys():
            tensor = reader.get_tensor(name)
            tensor.view(torch.int16).amax()  # a mapped tensor is read when it is touched
            flat = tensor.contiguous().view(torch.uint8).view(-1)
            small = len(tensor.shape) == 2 and ".layers." in name
            output[name] = flat[: flat.numel() // 2].clone() if small else flat
            if name == "model.embed_tokens.weight" and tied:
                output["lm_head.weight"] = flat.clone()
    save_file(output, folder / file.name)
    if sync:
        fd = os.open(folder / file.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
print(json.dumps({"seconds": time.perf_counter() - began}))
"""
)

ARITHMETIC = (
    _IMPORTS
    + """
class InMemory:
    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tuple(tensor.shape)
    def rows(self, start, stop):
        return self.tensor[start:stop]
seconds = 0.0
for file in sorted(model.glob("*.safetensors")):
    with safe_open(file, "pt") as reader:
        for name in reader.keys():
            if ".layers." in name and name.endswith("proj.weight"):
                tensor = reader.get_tensor(name).clone()
                began = time.perf_counter()
                minmax_weight(InMemory(tensor), bits=8, symmetric=True, name=name)
                seconds += time.perf_counter() - began
print(json.dumps({"seconds": seconds}))
"""
)


def floor(code: str, model: Path, out: Path, sync: bool) -> float:
    """Seconds that a floor takes, without its start-up."""
    scratch = Path(tempfile.mkdtemp(dir=out))
    told, cost = run_python(code, str(model), str(scratch), str(sync))
    shutil.rmtree(scratch)
    print(f"a floor took {cost.cpu:.1f} CPU seconds as a whole process", flush=True)
    return told["seconds"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-sync", dest="sync", action="store_false")
    parser.add_argument("--out", type=Path, help="folder for the outputs; default: beside the model")
    arguments = parser.parse_args()
    place = arguments.out or arguments.model.parent
    copies, sums, costs = [], [], []
    for _ in range(arguments.rounds):
        copies.append(floor(COPY, arguments.model, place, arguments.sync))
        sums.append(floor(ARITHMETIC, arguments.model, place, arguments.sync))
        costs.append(quantize(arguments.model, RECIPE, place / "out", sync=arguments.sync))
        print(f"copy {copies[-1]:.1f} s, arithmetic {sums[-1]:.1f} s", flush=True)
        show("slim", costs[-1])
    lowest = max(min(copies), min(sums))
    run = min(cost.run_seconds for cost in costs)
    print(f"floor {lowest:.1f} s, slim {run:.1f} s ({run / lowest:.2f}x), both without start-up")
    print(f"whole process: CPU {min(cost.cpu for cost in costs):.1f} s, peak {max(c.peak for c in costs):.0f} MiB")

"""A checkpoint ten times as large as the memory that a run is allowed, enforced by the system.

    OMP_NUM_THREADS=1 python benchmarks/confined.py /tmp/scratch [--shape broad-32] [--share 10]

Once everything is imported, ``RLIMIT_DATA`` (heap and other writable memory of the process, resident or not) is set to
what is in use plus a tenth of the checkpoint, and every allocation beyond it fails. That is more than a limit of
resident memory takes away, except for pages of the mapped checkpoint, which the system may drop at any time. Memory
that was freed counts as long as the C library keeps it for later; ``MALLOC_MMAP_THRESHOLD_`` makes it keep less here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from measure import run_python
from memory import METHODS, TOKENS, calibration_set
from synthetic import write_checkpoint

_WORKER = """
import json, resource, sys
import matplotlib.backends.backend_svg, torch
import slim_llm.quantize
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from slim_core.dispatch import choose_recipe
from slim_core.memory import peak_memory, resident_memory
from slim_core.progress import SilentProgress
from slim_core.service import QuantRequest
model, out, recipe, allowed = sys.argv[1:]
warm = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_hidden_layers=1, hidden_size=256, head_dim=64)).bfloat16()
with torch.no_grad():
    warm.model(torch.zeros(1, 256, dtype=torch.int64), use_cache=False)
AutoTokenizer.from_pretrained(model)
del warm
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(fields["VmData"].split()[0]) * 1024 + int(allowed)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
request = QuantRequest(model_path=model, save_path=out, config_path=recipe, model_type="benchmark", device="cpu",
                       overwrite=True, force=True, max_memory=f"host={allowed}B")
chosen, service = choose_recipe(request, lambda question: True)
imports, plans = resident_memory(), []
result = service.quantize(request, chosen, SilentProgress(), on_plan=plans.append)
print(json.dumps({"imports": imports, "peak": peak_memory(), "predicted": plans[0].memory.peak,
                  "run_seconds": result.seconds, "spills": plans[0].memory.spills}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="broad-32")
    parser.add_argument("--share", type=float, default=10.0, help="checkpoint / memory allowed")
    parser.add_argument("--methods", nargs="+", default=["dynamic", "static", "flex"], choices=METHODS)
    given = parser.parse_args()
    model = given.folder / given.shape
    if not model.exists():
        write_checkpoint(given.shape, model)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    allowed = int(size / given.share)
    for method in given.methods:
        dataset = {"path": str(calibration_set(given.folder)), "max_length": TOKENS}
        spec = {"process": METHODS[method], "save": [{"type": "ascendv1_saver"}], "dataset": dataset}
        recipe = given.folder / f"{method}.yaml"
        recipe.write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}), "utf-8")  # JSON is YAML
        told, cost = run_python(
            *(_WORKER, str(model), str(given.folder / "out"), str(recipe), str(allowed)),
            environment={"MALLOC_MMAP_THRESHOLD_": str(8 << 20)},
        )
        shutil.rmtree(given.folder / "out")
        print(
            f"{method}: {size / 2**20:.0f} MiB of weights with {allowed / 2**20:.0f} MiB allowed; finished in "
            f"{cost.run_seconds:.1f} s, peak {cost.growth:.0f} MiB beyond the process (predicted {cost.predicted:.0f})"
            + (", activations waited on disk" if told["spills"] else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()

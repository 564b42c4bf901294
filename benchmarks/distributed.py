"""Two ranks against one process, each on one thread: time, memory of each, and whether the files are the same.

    OMP_NUM_THREADS=1 python benchmarks/distributed.py [--method ssz|gptq] [--samples 64] [--ranks 1 2] [--hidden 1024]

A random Qwen3 is built, with texts of one length for calibration. Every run is a process of its own. Printed are the
time of the units, from the first to the last; the processor time of the rank that computes most in them, which tells of
the division also where other processes keep the machine busy; and the time of the whole run: with its plan, and the
start of other ranks, but without that of the first Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
RUN = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from slim_core.evaluation.report import write
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

write.draw_plots = lambda data: {}
model, out, device, recipe = sys.argv[1:]
request = QuantRequest(model_path=Path(model), save_path=Path(out), model_type="bench", device=device, force=True)
began = time.monotonic()
result = LlmService().quantize(request, recipe_from_dict(json.loads(recipe)), SilentProgress())
peaks = result.rank_peak_bytes or (result.peak_bytes,)
work = sum(unit.seconds for unit in result.units)
told = {"work": work, "peaks": peaks, "cpu": result.cpu_seconds, "base": result.base_bytes}
print(json.dumps({"all": time.monotonic() - began, **told}))
"""


def build(folder: Path, hidden: int, layers: int) -> None:
    """A random model with the shapes of a decoder, and the tokenizer of the tiny one."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=3072,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ssz", choices=("minmax", "ssz", "gptq"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": given.method}
    with tempfile.TemporaryDirectory(prefix="slim-distributed-") as name:
        folder = Path(name)
        build(folder / "model", given.hidden, given.layers)
        words = ["def", "class", "return", "yield", "import", "generator", "context", "iterator"]
        lines = [
            json.dumps({"text": " ".join(words[(i * j) % 8] for j in range(4 * given.length))})
            for i in range(given.samples)
        ]
        (folder / "calib.jsonl").write_text("\n".join(lines))
        recipe = {
            "apiversion": "modelslim_v1",
            "spec": {
                "process": [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": weight}}],
                "save": [{"type": "ascendv1_saver"}],
                "dataset": {"path": str(folder / "calib.jsonl"), "max_length": given.length},
            },
        }
        first: dict[str, Any] | None = None
        for ranks in given.ranks:
            out = folder / f"out-{ranks}"
            device = "cpu" if ranks == 1 else f"cpu:{','.join(map(str, range(ranks)))}"
            told = subprocess.run(
                [sys.executable, "-c", RUN, str(folder / "model"), str(out), device, json.dumps(recipe)],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
            found = json.loads(told.splitlines()[-1])
            told_of_time = ("report.json", "report.html")
            files = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in told_of_time}
            first = first or {**found, "files": files}
            peaks = [(peak - found["base"]) / (1 << 20) for peak in found["peaks"]]
            first["beyond"] = first.get("beyond") or max(peaks)
            shown = ", ".join(f"{peak:.0f}" for peak in peaks)
            print(
                f"{ranks} rank(s): units {found['work']:.1f} s ({first['work'] / found['work']:.2f}x), "
                f"processor {max(found['cpu']):.1f} s ({max(first['cpu']) / max(found['cpu']):.2f}x), "
                f"whole run {found['all']:.1f} s ({first['all'] / found['all']:.2f}x); "
                f"peak beyond the process {shown} MiB ({max(peaks) / first['beyond']:.2f}x); "
                f"files {'the same' if files == first['files'] else 'DIFFER'}"
            )


if __name__ == "__main__":
    main()

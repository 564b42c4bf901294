"""Calibrated W8A8 static: one forward of each block per sample, and little on top of it.

    python benchmarks/calibrated.py /tmp/qwen3-0.6b [--rounds 3]

The floor is a bare forward of the same blocks over the same samples, in the same run, plus the data-free time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measure import quantize, run_python, show
from memory import EXAMPLES, SAMPLES, TOKENS, calibrated_recipe

_FORWARD = """
import json, sys, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from slim_core.recipe import DatasetConfig
from slim_llm.calibration import read_samples, tokenize
from slim_llm.models.loading import open_tokenizer
model_path, data, tokens = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval()
samples = read_samples(Path(data))
inputs = tokenize(samples, open_tokenizer(Path(model_path)), DatasetConfig(path=data, max_length=int(tokens)), None)
with torch.no_grad():
    began = time.perf_counter()
    for given in inputs:
        model.model(**given)
    seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds}))
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.model.parent))
    recipe = calibrated_recipe(scratch)
    bare, free, static = [], [], []
    for _ in range(arguments.rounds):
        told, _cost = run_python(_FORWARD, str(arguments.model), str(scratch / "calibration.jsonl"), str(TOKENS))
        bare.append(told["seconds"])
        free.append(quantize(arguments.model, EXAMPLES / "w8a8-dynamic.yaml", scratch / "out"))
        static.append(quantize(arguments.model, recipe, scratch / "out"))
        print(f"bare forward {bare[-1]:.1f} s")
        show("data-free", free[-1])
        show("static", static[-1])
    floor = min(bare) + min(cost.run_seconds for cost in free)
    best = min(cost.run_seconds for cost in static)
    print(f"{SAMPLES} samples of {TOKENS} tokens: {static[0].forwards} block forwards")
    print(f"floor {floor:.1f} s, slim {best:.1f} s ({best / floor:.2f}x)")

"""Running a quantization as a process of its own and reading what it took."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Cost", "quantize", "run_python", "show"]

_WORKER = """
import json, os, sys, time
import matplotlib.backends.backend_svg, torch
import slim_llm.quantize
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from slim_core.dispatch import choose_recipe
from slim_core.memory import peak_memory, resident_memory
from slim_core.progress import SilentProgress
from slim_core.service import QuantRequest
model, out, recipe, sync, more = sys.argv[1:6]
if sync == "False":
    os.fsync = lambda fd: None
# One small forward, so that what the imports load late (kernels, thread stacks) is in the baseline too.
shape = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
warm = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_hidden_layers=1, **shape)).bfloat16()
with torch.no_grad():
    warm.model(torch.zeros(1, 256, dtype=torch.int64), use_cache=False)
AutoTokenizer.from_pretrained(model)
del warm
imports = resident_memory()
settings = {"model_type": "benchmark", "device": "cpu", "overwrite": True, "force": True, **json.loads(more)}
request = QuantRequest(model_path=model, save_path=out, config_path=recipe, **settings)
chosen, service = choose_recipe(request, lambda question: True)
plans = []
began, clock = time.process_time(), time.perf_counter()
result = service.quantize(request, chosen, SilentProgress(), on_plan=plans.append)
told = {"imports": imports, "peak": peak_memory(), "predicted": plans[0].memory.peak}
told |= {"run_cpu": time.process_time() - began, "run_wall": time.perf_counter() - clock}
print(json.dumps({**told, "run_seconds": result.seconds, "forwards": result.block_forwards}))
"""


@dataclass(frozen=True)
class Cost:
    """What a whole process took. Memory in MiB; ``growth`` is the peak beyond what was there before the run, and
    ``predicted`` what the plan said of it.

    ``run_seconds``, ``run_wall`` and ``run_cpu`` are the run itself, without imports; the latter two with its plan.
    """

    wall: float
    cpu: float
    peak: float
    growth: float
    predicted: float
    run_seconds: float
    run_wall: float
    run_cpu: float
    forwards: int


def run_python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> tuple[dict[str, float], Cost]:
    """Run code in a fresh interpreter; its last output line is JSON."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the measured process failed with status {status}")
    told = json.loads(output.strip().splitlines()[-1])
    peak = told.get("peak", 0.0) / 2**20
    cost = Cost(
        wall=time.perf_counter() - began,
        cpu=usage.ru_utime + usage.ru_stime,
        peak=peak,
        growth=peak - told.get("imports", 0) / 2**20,
        predicted=told.get("predicted", 0) / 2**20,
        run_seconds=told.get("run_seconds", 0.0),
        run_wall=told.get("run_wall", 0.0),
        run_cpu=told.get("run_cpu", 0.0),
        forwards=int(told.get("forwards", 0)),
    )
    return told, cost


def quantize(model: Path, recipe: Path, out: Path, sync: bool = True, **options: str) -> Cost:
    """Quantize a folder in a process of its own; without ``sync`` the output is not forced to disk.

    Args:
        options: further fields of the request.
    """
    shutil.rmtree(out, ignore_errors=True)
    _, cost = run_python(_WORKER, str(model), str(out), str(recipe), str(sync), json.dumps(options))
    shutil.rmtree(out, ignore_errors=True)
    return cost


def show(title: str, cost: Cost) -> None:
    """One line of figures."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in asdict(cost).items())
    print(f"{title}: {parts}", flush=True)

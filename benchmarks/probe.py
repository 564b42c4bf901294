"""How long a run takes against what a probe said of it.

    python benchmarks/probe.py /tmp/scratch [--shapes wide-8 moe-4] [--methods dynamic static gptq] [--rounds 1]

Random checkpoints; what needs data is calibrated on 16 samples of up to 256 tokens. Every run is a process of its own
that probes first, as a user has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory import METHODS, TOKENS, calibration_set
from synthetic import SHAPES, write_checkpoint


def told(model: Path, recipe: Path, out: Path) -> dict[str, Any]:
    """The report of a run that was probed."""
    command = [sys.executable, "-m", "slim_llm", "quant", "--model_type", "benchmark", "--device", "cpu", "--probe"]
    paths = ["--model_path", str(model), "--save_path", str(out), "--config_path", str(recipe)]
    subprocess.run([*command, "--overwrite", "--force", *paths], check=True, capture_output=True)
    report = json.loads((out / "report.json").read_text("utf-8"))
    shutil.rmtree(out)
    return report


def shares(report: dict[str, Any]) -> str:
    """What the time went into (in brackets what was said of it), and for which part of it everybody was busy."""
    (record,) = report["times"]
    phases, whole = record["phases"], sum(record["phases"].values())
    longest = sorted(phases, key=lambda phase: -phases[phase])
    said = report["predicted_phases"]
    parts = ", ".join(f"{p} {phases[p]:.1f} ({said.get(p, 0):.1f})" for p in longest if phases[p] >= 0.01 * whole)
    return f"{parts}; reading {record['reading'] / whole:.0%}, writing {record['writing'] / whole:.0%} of the time"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "wide-8", "broad-8", "moe-4"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dynamic", "static", "gptq"])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    dataset = {"path": str(calibration_set(arguments.folder)), "max_length": TOKENS}
    for shape in arguments.shapes:
        model = arguments.folder / shape
        if not model.exists():
            write_checkpoint(shape, model)
        for method in arguments.methods * arguments.rounds:
            recipe = arguments.folder / f"{method}.yaml"
            spec = {"process": METHODS[method], "save": [{"type": "ascendv1_saver"}], "dataset": dataset}
            recipe.write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}), "utf-8")  # JSON is YAML
            report = told(model, recipe, arguments.folder / "out")
            predicted, measured = report["predicted_seconds"], report["seconds"]
            ratio = f"{predicted:.1f} s predicted, {measured:.1f} s measured ({predicted / measured:.2f})"
            print(f"{shape} {method}: {ratio}; {shares(report)}", flush=True)

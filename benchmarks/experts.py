"""Mixtures of experts: the time of 128 small experts, and what ``--max_memory`` does to the memory of a block.

    python benchmarks/experts.py /tmp/scratch --time dynamic w8a8 w4a8 [--rounds 3]
    python benchmarks/experts.py /tmp/scratch --memory w8a8 w4a8 [--budget 320MiB]

``--time`` holds blocks of experts against dense blocks with as many parameters, over the same samples, run after run in
turn. ``--memory`` holds peaks against what the plan says of them, without a budget and with one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measure import Cost, quantize, show
from memory import EXAMPLES, METHODS, TOKEN, TOKENS, calibration_set, largest_unit, linear_quant, told
from synthetic import write_checkpoint

MOE, DENSE = "moe-4", "dense-8"
PRACTICES = Path(__file__).parents[1] / "lab_practice" / "qwen3_moe"
GPTQ = [METHODS["gptq"][0] | {"include": ["*.mlp.*_proj"]}, linear_quant(TOKEN, "minmax")]
RECIPES = {
    "dynamic": "W8A8 with a scale per token, no data",
    "w8a8": "the practice qwen3-moe-w8a8",
    "w4a8": "the practice qwen3-moe-w4a8",
    "gptq": "W4A8 by gptq, attention W8A8, all with a scale per token",
}


def recipe(name: str, folder: Path) -> Path:
    """A recipe for both models: what a practice says of experts is said of all linears of an MLP."""
    path, data = folder / f"experts-{name}.yaml", {"path": str(calibration_set(folder)), "max_length": TOKENS}
    if name == "dynamic":
        return EXAMPLES / "w8a8-dynamic.yaml"
    if name == "gptq":
        spec = {"process": GPTQ, "save": [{"type": "ascendv1_saver"}], "dataset": data}
        path.write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}), "utf-8")  # JSON is YAML
        return path
    text = (PRACTICES / f"qwen3-moe-{name}.yaml").read_text("utf-8")
    for old, new in (('"*.experts.*"', '"*.mlp.*_proj"'), ("dataset: mix_calib.jsonl", f"dataset: {json.dumps(data)}")):
        if old not in text:
            raise ValueError(f"the practice no longer says {old}")
        text = text.replace(old, new)
    path.write_text(text, "utf-8")
    return path


def model(name: str, folder: Path) -> Path:
    path = folder / name
    if not path.exists():
        write_checkpoint(name, path)
    return path


def compare_time(name: str, folder: Path, rounds: int) -> None:
    """The fastest round of each, and their ratio."""
    costs: dict[str, list[Cost]] = {MOE: [], DENSE: []}
    for _ in range(rounds):
        for shape, found in costs.items():
            found.append(quantize(model(shape, folder), recipe(name, folder), folder / "out", sync=False))
            show(f"{name} {shape}", found[-1])
    for what, of in (("CPU seconds", lambda cost: cost.run_cpu), ("wall seconds", lambda cost: cost.run_wall)):
        experts, dense = (min(map(of, found)) for found in costs.values())
        print(f"{name}: {experts:.2f} {what} against {dense:.2f} dense ({experts / dense:.2f}x)", flush=True)


def compare_memory(name: str, folder: Path, budget: str) -> None:
    """Runs through the command line, as users have it: what their plans promised and what their reports say."""
    for options in ([], ["--max_memory", f"host={budget}"]):
        predicted, measured, _ = told(model(MOE, folder), recipe(name, folder), folder / "out", *options)
        title = " ".join([name, *options])
        print(
            f"{title}: predicted {predicted:.0f} MiB, measured {measured:.0f} ({predicted / measured:.2f})", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    known = "; ".join(f"{name}: {text}" for name, text in RECIPES.items())
    parser.add_argument("--time", nargs="+", choices=RECIPES, default=[], metavar="RECIPE", help=known)
    parser.add_argument("--memory", nargs="+", choices=RECIPES, default=[], metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="320MiB")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for each in arguments.time:
        compare_time(each, arguments.folder, arguments.rounds)
    if arguments.memory:
        print(f"largest unit {largest_unit(model(MOE, arguments.folder)):.1f} MiB", flush=True)
    for each in arguments.memory:
        compare_memory(each, arguments.folder, arguments.budget)

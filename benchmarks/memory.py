"""Peak memory: does it follow the largest unit and not the model?

    python benchmarks/memory.py /tmp/scratch [--large]
    python benchmarks/memory.py /tmp/scratch --prediction all
    python benchmarks/memory.py /tmp/scratch --prediction gptq autoround --shapes wide-2 --rounds 1

8 blocks against 32 of the same shape, data-free and calibrated; ``--large`` adds a checkpoint of 29.5 GB.
``--prediction`` holds what the plan says against what the report measured instead: peak memory beyond the start of the
run, the median of several rounds, and the bytes of the weight files, which must be exact. ``all`` stands for
dynamic, static, gptq and flex.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measure import quantize, show
from synthetic import SHAPES, write_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLES, TOKENS = 16, 256
TOKEN = {"dtype": "int8", "scope": "per_token", "symmetric": True}
TENSOR = {"dtype": "int8", "scope": "per_tensor", "symmetric": False}


def linear_quant(act: dict[str, Any], method: str, dtype: str = "int8") -> dict[str, Any]:
    weight = {"dtype": dtype, "scope": "per_channel", "symmetric": True, "method": method}
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}}


LEARNED = linear_quant(TOKEN, "autoround", "int4")["qconfig"]
METHODS: dict[str, list[dict[str, Any]]] = {
    "dynamic": [linear_quant(TOKEN, "minmax")],
    "static": [linear_quant(TENSOR, "minmax")],
    "gptq": [linear_quant(TOKEN, "gptq", "int4")],
    "flex": [{"type": "flex_smooth_quant"}, linear_quant(TENSOR, "minmax")],
    "autoround": [{"type": "autoround_quant", "iters": 2, "strategies": [{"qconfig": LEARNED}]}],
    "sparse": [{"type": "float_sparse"}],
}


PREDICTED = ("dynamic", "static", "gptq", "flex")
PREDICTED_SHAPES = ("wide-2", "narrow-2", "mid-2", "deep-12", "tied-2", "square-2", "broad-2", "moe-4")


def calibration_set(folder: Path) -> Path:
    """Text, more of it in every sample than is used."""
    data = folder / "calibration.jsonl"
    text = (EXAMPLES / "heldout.txt").read_text("utf-8")
    parts = [text[i * 3000 : i * 3000 + 3000] for i in range(SAMPLES)]
    data.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), "utf-8")
    return data


def calibrated_recipe(folder: Path) -> Path:
    """W8A8 static over text of a fixed length."""
    data = calibration_set(folder)
    recipe = folder / "w8a8-static.yaml"
    content = (EXAMPLES / "w8a8-static.yaml").read_text("utf-8")
    dataset = f"  dataset: {{path: {data}, max_length: {TOKENS}}}\n"
    recipe.write_text(content.replace("  process:", dataset + "  process:", 1), "utf-8")
    return recipe


def largest_unit(model: Path) -> float:
    """MiB of the largest block, embedding or head."""
    from slim_core.runners.choice import unit_bytes
    from slim_llm.models.loading import open_model

    opened = open_model(model)
    return max(unit_bytes(opened, unit) for unit in opened.units) / 2**20


def prediction_recipe(folder: Path, method: str) -> Path:
    """The recipe of a method over text of a fixed length."""
    dataset = {"path": str(calibration_set(folder)), "max_length": TOKENS}
    spec = {"process": METHODS[method], "save": [{"type": "ascendv1_saver"}], "dataset": dataset}
    recipe = folder / f"{method}.yaml"
    recipe.write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}), "utf-8")  # JSON is YAML
    return recipe


def compare_predictions(folder: Path, shapes: Sequence[str], methods: Sequence[str], rounds: int) -> None:
    """A table of what plans promised and what reports say. GPTQ of hundreds of experts takes too long."""
    print("| shape | recipe | process: predicted | measured | ratio | beyond it: predicted | measured | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    ratios: list[tuple[float, float]] = []
    for shape in shapes:
        model = folder / shape
        if not model.exists():
            write_checkpoint(shape, model)
        for method in (one for one in methods if (shape, one) != ("moe-4", "gptq")):
            recipe = prediction_recipe(folder, method)
            runs = [told(model, recipe, folder / "out") for _ in range(rounds)]
            own = median(before for _, _, before in runs)
            predicted, measured = runs[0][0], [peak for _, peak, _ in runs]
            beyond, whole = median(measured), median(peak + before for _, peak, before in runs)
            ratios.append(((own + predicted) / whole, predicted / beyond))
            spread = f" ({min(measured):.0f} to {max(measured):.0f})" if rounds > 1 else ""
            process = f"{own + predicted:.0f} MiB | {whole:.0f} MiB | {ratios[-1][0]:.2f}"
            run = f"{predicted:.0f} MiB | {beyond:.0f} MiB{spread} | {ratios[-1][1]:.2f}"
            print(f"| {shape} | {method} | {process} | {run} |", flush=True)
    whole, beyond = (sum(abs(ratio - 1) <= 0.1 for ratio in some) for some in zip(*ratios, strict=True))
    print(f"of {len(ratios)} within 10 %: {whole} of the process, {beyond} beyond it; bytes of the output exact in all")


def told(model: Path, recipe: Path, out: Path, *options: str) -> tuple[float, float, float]:
    """Memory of a run of the command in MiB: predicted and measured beyond the process before it, and that before."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "slim_llm", "quant", "--model_type", "benchmark", "--device", "cpu"]
    command += ["--overwrite", "--force"]
    paths = ["--model_path", str(model), "--save_path", str(out), "--config_path", str(recipe)]
    subprocess.run([*command, *paths, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text("utf-8"))
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if written != report["predicted_bytes_out"]:
        raise RuntimeError(f"{out}: {written} bytes of weights, {report['predicted_bytes_out']} were predicted")
    shutil.rmtree(out)
    figures = ("predicted_peak_memory", "peak_memory", "process_base_memory")
    predicted, measured, before = (report[figure] / 2**20 for figure in figures)
    return predicted, measured, before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", choices=("wide", "broad"), default="wide", help="units of 36 or 120 MiB")
    parser.add_argument("--large", action="store_true")
    methods = ("all", *METHODS)
    parser.add_argument("--prediction", nargs="+", choices=methods, metavar="METHOD", help=", ".join(methods))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=PREDICTED_SHAPES, metavar="SHAPE")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.prediction:
        chosen = PREDICTED if "all" in arguments.prediction else arguments.prediction
        compare_predictions(arguments.folder, arguments.shapes, chosen, arguments.rounds)
        sys.exit()
    recipes = {"data-free": EXAMPLES / "w8a8-dynamic.yaml", "calibrated": calibrated_recipe(arguments.folder)}
    for title, recipe in recipes.items():
        peaks = []
        for shape in (f"{arguments.width}-8", f"{arguments.width}-32"):
            model = arguments.folder / shape
            if not model.exists():
                write_checkpoint(shape, model)
            cost = quantize(model, recipe, arguments.folder / "out")
            show(f"{title} {shape} (largest unit {largest_unit(model):.1f} MiB)", cost)
            peaks.append(cost.peak)
        print(f"{title}: 32 blocks take {100 * (peaks[1] / peaks[0] - 1):+.1f} % of the peak of 8", flush=True)
    if arguments.large:
        model = arguments.folder / "large"
        size = write_checkpoint("qwen2.5-14b-like", model)
        print(f"{size / 1e9:.1f} GB, largest unit {largest_unit(model):.0f} MiB", flush=True)
        show("large, data-free", quantize(model, recipes["data-free"], arguments.folder / "out"))
        shutil.rmtree(model)

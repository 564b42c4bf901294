"""Peak memory: does it follow the largest unit and not the model?

    python benchmarks/memory.py /tmp/scratch [--large]

8 blocks against 32 of the same shape, data-free and calibrated; ``--large`` adds a checkpoint of 28 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from measure import quantize, show
from synthetic import write_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLES, TOKENS = 16, 256


def calibrated_recipe(folder: Path) -> Path:
    """W8A8 static over random text of a fixed length."""
    data = folder / "calibration.jsonl"
    text = (EXAMPLES / "heldout.txt").read_text("utf-8")
    parts = [text[i * 3000 : i * 3000 + 3000] for i in range(SAMPLES)]
    data.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), "utf-8")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", choices=("wide", "broad"), default="wide", help="units of 36 or 120 MiB")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
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
        model = arguments.folder / "28gb"
        size = write_checkpoint("qwen2.5-14b-like", model)
        print(f"{size / 1e9:.1f} GB, largest unit {largest_unit(model):.0f} MiB", flush=True)
        show("28 GB data-free", quantize(model, recipes["data-free"], arguments.folder / "out"))
        shutil.rmtree(model)

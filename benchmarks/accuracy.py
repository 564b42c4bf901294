"""What every quantization type costs on the shipped trained model, from the written files.

    python benchmarks/accuracy.py [--only w8a8 w4a8] [--recipes FOLDER] [--model MODEL] [--text TEXT]
    python benchmarks/accuracy.py --propagate quantized

Runs ``slim quant`` and ``slim eval`` for every quantization type that the practice library has for the model, then for
the recipes in ``benchmarks/recipes`` (or another folder). Prints a Markdown table: perplexity and its ratio to the
original's, KL divergence, signal to noise of the weights (median over the linears) and of the logits, and the wall time
of the quantization.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from slim_core.practices import QUANT_TYPES

ROOT = Path(__file__).parents[1]
SLIM = [sys.executable, "-m", "slim_llm"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    scores: dict[str, Any]
    weights_db: float | None
    seconds: float

    def cells(self) -> list[str]:
        logits = self.scores["logits_sqnr_db"]
        return [
            self.name,
            f"{self.scores['quantized_perplexity']:.3f}",
            f"{self.scores['ratio']:.4f}",
            f"{self.scores['kl_divergence']:.5f}",
            f"{self.scores['top1_agreement']:.1%}",
            "" if self.weights_db is None else f"{self.weights_db:.1f}",
            "" if logits is None else f"{logits:.1f}",
            f"{self.seconds:.0f} s",
        ]


def run(arguments: list[str]) -> None:
    done = subprocess.run([*SLIM, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def measure(name: str, how: list[str], options: argparse.Namespace, scratch: Path) -> Row:
    out, scores = scratch / name, scratch / f"{name}.json"
    began = time.perf_counter()
    given = ["--model_path", str(options.model), "--save_path", str(out), "--model_type", options.model.name]
    run(["quant", *given, "--device", options.device, "--yes", "--force", *how])
    seconds = time.perf_counter() - began
    text = ["--text", str(options.text), "--device", options.device, "--json", str(scores)]
    run(["eval", str(options.model), "--quantized", str(out), *text])
    linears = json.loads((out / "report.json").read_text())["linears"]
    known = [linear["sqnr_db"] for linear in linears if linear["sqnr_db"] is not None]
    return Row(name, json.loads(scores.read_text()), median(known) if known else None, seconds)


def practices(model_type: str) -> dict[str, Path]:
    """The quantization types that the library has for the model itself, with their files."""
    from slim_core.dispatch import match_practice
    from slim_core.errors import SlimError

    found: dict[str, Path] = {}
    for quant_type in QUANT_TYPES:
        try:
            selection = match_practice(model_type, quant_type)
        except SlimError:
            continue
        if selection.question is None:
            found[quant_type] = selection.practice.path
    return found


def propagating(recipe: Path, propagate: str, scratch: Path) -> list[str]:
    """The recipe with another ``propagate``."""
    content = yaml.safe_load(recipe.read_text("utf-8"))
    content["spec"]["propagate"] = propagate
    changed = scratch / f"{recipe.stem}-{propagate}.yaml"
    changed.write_text(yaml.safe_dump(content), "utf-8")
    return ["--config_path", str(changed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwen3")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "heldout.txt")
    parser.add_argument("--recipes", type=Path, default=ROOT / "benchmarks" / "recipes")
    parser.add_argument("--only", nargs="*", help="names of quantization types and recipes")
    parser.add_argument("--propagate", choices=("float", "quantized"), help="instead of what the recipes say")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    files = practices(options.model.name)
    jobs = {name: ["--quant_type", name] for name in files}
    files |= {path.stem: path for path in sorted(options.recipes.glob("*.yaml"))}
    jobs = {name: jobs.get(name) or ["--config_path", str(path)] for name, path in files.items()}
    if options.only:
        jobs = {name: how for name, how in jobs.items() if name in options.only}
    heads = ["recipe", "perplexity", "ratio", "KL (nats)", "same first token", "weights (dB)", "logits (dB)", "time"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    original: float | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for name, how in jobs.items():
            if options.propagate:
                how = propagating(files[name], options.propagate, Path(scratch))
            row = measure(name, how, options, Path(scratch))
            if original is None:
                original = row.scores["perplexity"]
                print(f"| original | {original:.3f} |{'  |' * (len(heads) - 2)}")
            print(f"| {' | '.join(row.cells())} |", flush=True)


if __name__ == "__main__":
    main()

"""What smoothing costs on top of calibrated W8A8 static, on one model in one run.

    python benchmarks/smoothing.py /tmp/scratch [--shape qwen3-0.6b] [--rounds 3]

Recipes alternate, since the machine is noisy; the figures are those of the fastest round of each. The claims: at most
1.3x of W8A8 static alone for iter_smooth, 2.5x for flex_smooth_quant. ``--shape wide-8`` takes a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import Cost, quantize, show
from memory import SAMPLES, TOKENS, calibrated_recipe
from synthetic import SHAPES, write_checkpoint

INT4 = "{dtype: int4, scope: per_channel, symmetric: true, method: ssz}"
SMOOTHERS = {
    "iter_smooth": "{type: iter_smooth}",
    "flex_smooth_quant": "{type: flex_smooth_quant}",
    "awq": f"{{type: awq, weight_qconfig: {INT4}}}",
    "flex_awq_ssz": f"{{type: flex_awq_ssz, qconfig: {{act: {{scope: per_token}}, weight: {INT4}}}}}",
}
CLAIMS = {"iter_smooth": 1.3, "flex_smooth_quant": 2.5}


def with_smoother(static: Path, name: str) -> Path:
    """The static recipe with a smoother ahead of everything."""
    recipe = static.with_name(f"{name}.yaml")
    content = static.read_text("utf-8")
    recipe.write_text(content.replace("  process:\n", f"  process:\n    - {SMOOTHERS[name]}\n", 1), "utf-8")
    return recipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoothers", nargs="+", choices=SMOOTHERS, default=list(CLAIMS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = arguments.folder / arguments.shape
    if not model.exists():
        write_checkpoint(arguments.shape, model)
    static = calibrated_recipe(arguments.folder)
    recipes = {"static": static} | {name: with_smoother(static, name) for name in arguments.smoothers}
    costs: dict[str, list[Cost]] = {name: [] for name in recipes}
    for _ in range(arguments.rounds):
        for name, recipe in recipes.items():
            costs[name].append(quantize(model, recipe, arguments.folder / "out"))
            show(name, costs[name][-1])
    best = {name: min(cost.run_seconds for cost in rounds) for name, rounds in costs.items()}
    cpu = {name: min(cost.run_cpu for cost in rounds) for name, rounds in costs.items()}
    forwards = {name: {cost.forwards for cost in rounds} for name, rounds in costs.items()}
    print(f"{arguments.shape}, {SAMPLES} samples of {TOKENS} tokens, block forwards {forwards}")
    for name in arguments.smoothers:
        claim = f" (claimed: at most {CLAIMS[name]}x)" if name in CLAIMS else ""
        print(
            f"{name}: {best[name]:.1f} s, {best[name] / best['static']:.2f}x of {best['static']:.1f} s{claim}; "
            f"CPU seconds {cpu[name]:.1f}, {cpu[name] / cpu['static']:.2f}x"
        )

"""Vision-language models: the memory of a run, and what making inputs in the background saves.

    python benchmarks/pictures.py /tmp/scratch [--rounds 3]

A Qwen3-VL-MoE of eight layers, with a vision tower of 264 MiB and 32 experts in a layer, is quantized over twelve of
the bundled pictures by the practice qwen3_vl_moe_w8a8. Its folder and processor are those that the tests make, with
other sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measure import Cost, run_python, show

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "lab_practice" / "qwen3_vl_moe" / "qwen3_vl_moe_w8a8.yaml"
PATCH, SAMPLES = 16, 12
TEXT = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]},
}
VISION = {
    "depth": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_heads": 12,
    "out_hidden_size": 1024,
    "patch_size": PATCH,
    "deepstack_visual_indexes": [3, 6, 9],
    "num_position_embeddings": 2304,
}
_WORKER = """
import json, os, sys, time
import matplotlib.backends.backend_svg, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
import slim_vlm.inputs, slim_vlm.quantize, slim_vlm.processor
from slim_core.dispatch import choose_recipe
from slim_core.memory import peak_memory, resident_memory
from slim_core.progress import SilentProgress
from slim_core.service import QuantRequest
model, out, recipe, ahead = sys.argv[1:5]
os.fsync = lambda fd: None
if ahead == "no":  # every sample is made when it is asked for, while nothing else is done
    slim_vlm.inputs.ImageInputs.__getitem__ = lambda self, at: self._preparation.inputs(self._samples[at])
shape = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
warm = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_hidden_layers=1, **shape)).bfloat16()
with torch.no_grad():
    warm.model(torch.zeros(1, 256, dtype=torch.int64), use_cache=False)
slim_vlm.processor.open_processor(__import__("pathlib").Path(model))
del warm
imports = resident_memory()
request = QuantRequest(
    model_path=model, save_path=out, config_path=recipe, model_type="benchmark", device="cpu", overwrite=True
)
chosen, service = choose_recipe(request, lambda question: True)
plans = []
began, clock = time.process_time(), time.perf_counter()
result = service.quantize(request, chosen, SilentProgress(), on_plan=plans.append)
told = {"imports": imports, "peak": peak_memory(), "predicted": plans[0].memory.peak}
told |= {"run_cpu": time.process_time() - began, "run_wall": time.perf_counter() - clock}
tower = next(unit.seconds for unit in result.units if unit.name == "model.visual")
told |= {"tower": tower, "run_seconds": result.seconds, "forwards": result.block_forwards}
told["tower_bytes"] = next(unit.bytes_in for unit in plans[0].units if unit.name == "model.visual")
told["unit_bytes"] = max(unit.bytes_in for unit in plans[0].units if ".layers." in unit.name)
told["activations"] = plans[0].activation_bytes
print(json.dumps(told))
"""


def recipe(folder: Path) -> Path:
    """The practice, over the first pictures only."""
    path, text = folder / "pictures.yaml", RECIPE.read_text("utf-8")
    if "dataset: calibImages" not in text:
        raise ValueError("the practice no longer names the bundled pictures")
    text = text.replace("dataset: calibImages", f"dataset: {{path: calibImages, num_samples: {SAMPLES}}}")
    path.write_text(text, "utf-8")
    return path


def model(folder: Path) -> Path:
    path = folder / "pictures-8"
    if path.exists():
        return path
    sys.path.insert(0, str(ROOT / "packages" / "slim-vlm" / "tests"))
    from tiny_vlms import build

    build("qwen3_vl_moe", path, text_config=TEXT, vision_config=VISION)
    settings = path / "preprocessor_config.json"
    content = json.loads(settings.read_text("utf-8"))
    content |= {"patch_size": PATCH, "size": {"shortest_edge": 256 * 256, "longest_edge": 1024 * 1024}}
    settings.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def run(folder: Path, ahead: str) -> tuple[dict[str, float], Cost]:
    told, cost = run_python(_WORKER, str(model(folder)), str(folder / "out"), str(recipe(folder)), ahead)
    show("made ahead" if ahead == "yes" else "made when asked for", cost)
    return told, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = {ahead: [run(given.folder, ahead) for _ in range(given.rounds)] for ahead in ("yes", "no")}
    mib = 2**20
    told, cost = found["yes"][0]
    limit = (told["tower_bytes"] + 2.0 * told["unit_bytes"] + told["activations"]) / mib
    print(
        f"peak beyond the process {max(cost.growth for _, cost in found['yes']):.0f} MiB, "
        f"predicted {cost.predicted:.0f}; "
        f"tower {told['tower_bytes'] / mib:.0f} + 2 x {told['unit_bytes'] / mib:.0f} "
        f"+ activations {told['activations'] / mib:.0f} = {limit:.0f} MiB"
    )
    tower = {ahead: min(told["tower"] for told, _ in runs) for ahead, runs in found.items()}
    wall = {ahead: min(cost.run_wall for _, cost in runs) for ahead, runs in found.items()}
    print(f"the tower's unit: {tower['yes']:.2f} s with inputs made ahead, {tower['no']:.2f} s without")
    print(f"the whole run: {wall['yes']:.2f} s and {wall['no']:.2f} s")


if __name__ == "__main__":
    main()

"""Diffusion transformers: a data-free run of Wan2.1-14B's shape, the memory of a calibrated run, the cost of capturing.

    python benchmarks/diffusion.py /tmp/scratch --large        # needs 28 GB for the model and 21 GB for the output
    python benchmarks/diffusion.py /tmp/scratch --calibrated
    python benchmarks/diffusion.py /tmp/scratch --capture [--rounds 5]

The large run is held against the floor that nobody can go below: reading every input byte and writing as many output
bytes, by plain safetensors. The calibrated run has blocks of Wan2.1-1.3B's size and made-up calls. The capture runs a
whole tiny pipeline whose transformer is large enough to take nearly all of the time, with and without the recorder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from measure import Cost, run_python, show

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import ShardedWriter, lay_out

ROOT = Path(__file__).parents[1]
PRACTICE = ROOT / "lab_practice" / "wan2_1" / "wan2_1_w8a8_dynamic.yaml"
MIB = 2**20
SHAPES = {"14b": (5120, 13824, 40, 40), "1.3b": (1536, 8960, 12, 4)}  # width, FFN, heads, blocks
CALLS, LATENT = 12, (16, 9, 30, 52)  # 3510 tokens

_WORKER = """
import json, os, sys, time
import matplotlib.backends.backend_svg, torch
import slim_sd.quantize
from diffusers import WanTransformer3DModel
from slim_core.dispatch import choose_recipe
from slim_core.memory import peak_memory, resident_memory
from slim_core.progress import SilentProgress
from slim_core.service import QuantRequest
model, out, recipe = sys.argv[1:4]
warm = WanTransformer3DModel(num_attention_heads=4, attention_head_dim=64, num_layers=1, ffn_dim=512).bfloat16()
with torch.no_grad():
    warm(torch.zeros(1, 16, 1, 16, 16).bfloat16(), torch.tensor([1]), torch.zeros(1, 8, 4096).bfloat16())
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
told |= {"run_seconds": result.seconds, "forwards": result.block_forwards, "activations": plans[0].activation_bytes}
told["unit"] = max(unit.bytes_in for unit in plans[0].units)
told["bytes"] = [plans[0].bytes_in, plans[0].bytes_out]
print(json.dumps(told))
"""
_COPY = """
import json, os, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
model, out, share = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
out.mkdir()
began = time.perf_counter()
for file in sorted(model.glob("*.safetensors")):
    output = {}
    with safe_open(file, "pt") as reader:
        for name in reader.keys():
            tensor = reader.get_tensor(name)
            tensor.view(torch.int16).amax()  # a mapped tensor is read when it is touched
            flat = tensor.contiguous().view(torch.uint8).view(-1)
            output[name] = flat[: int(flat.numel() * share)].clone()
    save_file(output, out / file.name)
    fd = os.open(out / file.name, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
print(json.dumps({"seconds": time.perf_counter() - began}))
"""
_CAPTURE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny_pipelines, torch
from slim_core.recipe import recipe_from_dict
from slim_sd.captured.recorder import Recorder
from slim_sd.pipeline.generation import planned_generation
from slim_sd.recipe import SpecSd
from slim_sd.pipeline.sampling import Sampler
folder, rounds = Path(sys.argv[1]), int(sys.argv[3])
settings = {"prompt": "a red fox", "size": "256*256", "frame_num": 17, "sample_steps": 4}
spec = {"multimodal_sd_config": {"model_config": settings}}
recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})
generation = planned_generation(folder, recipe, recipe.spec(SpecSd))
spent = [0.0]
def timed(real):
    def call(*given, **named):
        began = time.perf_counter()
        try:
            return real(*given, **named)
        finally:
            spent[0] += time.perf_counter() - began
    return call
for name in ("__init__", "__enter__", "_record", "__exit__"):
    setattr(Recorder, name, timed(getattr(Recorder, name)))
runs = {"plain": [], "captured": []}
with Sampler(folder, generation, torch.device("cpu")) as sampler:
    sampler.pipeline.set_progress_bar_config(disable=True)
    first = sampler.generate()
    def plain():
        return sampler.generate()
    def captured():
        with Recorder(sampler.models["transformer"].module, folder / "calib_data.pth", fingerprint="", settings={}):
            return sampler.generate()
    for number in range(rounds):
        for run in (plain, captured)[:: 1 if number % 2 else -1]:
            began, clock = time.process_time(), time.perf_counter()
            assert torch.equal(first, run())
            runs[run.__name__].append((time.perf_counter() - clock, time.process_time() - began))
runs["recorder"] = [spent[0] / rounds]
print(json.dumps(runs))
"""


def write_wan(shape: str, folder: Path, part_bytes: int = 4 << 30) -> Path:
    """A random Wan2.1 T2V transformer in bf16, in the original layout, without its text encoder and VAE."""
    if folder.exists():
        return folder
    width, inner, heads, blocks = SHAPES[shape]
    folder.mkdir(parents=True)
    config = {"model_type": "t2v", "dim": width, "ffn_dim": inner, "num_heads": heads, "num_layers": blocks}
    config |= {"in_dim": 16, "out_dim": 16, "freq_dim": 256, "text_len": 512, "eps": 1e-6, "_class_name": "WanModel"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (width, 16, 1, 2, 2),
        "patch_embedding.bias": (width,),
    }
    shapes |= {"head.modulation": (1, 2, width)}
    linears = {"text_embedding.0": (width, 4096), "text_embedding.2": (width, width)}
    linears |= {"time_embedding.0": (width, 256), "time_embedding.2": (width, width)}
    linears |= {"time_projection.1": (6 * width, width), "head.head": (64, width)}
    for i in range(blocks):
        for attention in ("self_attn", "cross_attn"):
            linears |= {f"blocks.{i}.{attention}.{part}": (width, width) for part in "qkvo"}
            shapes |= {f"blocks.{i}.{attention}.norm_{part}.weight": (width,) for part in "qk"}
        linears |= {f"blocks.{i}.ffn.0": (inner, width), f"blocks.{i}.ffn.2": (width, inner)}
        shapes |= {f"blocks.{i}.norm3.weight": (width,), f"blocks.{i}.norm3.bias": (width,)}
        shapes |= {f"blocks.{i}.modulation": (1, 6, width)}
    for name, size in linears.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    metas = [TensorMeta(name, torch.bfloat16, size) for name, size in shapes.items()]
    shards = lay_out(metas, "diffusion_pytorch_model", part_bytes)
    writer = ShardedWriter(folder, shards)
    pool = (torch.randn(1 << 26) * 0.02).bfloat16()
    for number, meta in enumerate(metas):
        shift = (number * 7919) % 4096
        values = pool.repeat(-(-(meta.numel + shift) // pool.numel()))
        writer.put(meta.name, values[shift : shift + meta.numel].view(meta.shape).clone())
    writer.finish()
    index = {meta.name: shard.file_name for shard in shards for meta in shard.tensors}
    content = {"metadata": {"total_size": sum(meta.nbytes for meta in metas)}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def run(model: Path, out: Path, recipe: Path) -> tuple[dict[str, float], Cost]:
    shutil.rmtree(out, ignore_errors=True)
    told, cost = run_python(_WORKER, str(model), str(out), str(recipe))
    shutil.rmtree(out, ignore_errors=True)
    return told, cost


def large(folder: Path) -> None:
    model, out = write_wan("14b", folder / "wan-14b"), folder / "out"
    told, cost = run(model, out, PRACTICE)
    show("data-free", cost)
    read, written = told["bytes"]  # pyright: ignore[reportGeneralTypeIssues]
    copied, _ = run_python(_COPY, str(model), str(out), str(written / read))
    shutil.rmtree(out)
    print(
        f"{read / 1e9:.1f} GB -> {written / 1e9:.1f} GB, peak {cost.peak:.0f} MiB in all, {cost.growth:.0f} MiB beyond "
        f"the process; {cost.run_seconds:.1f} s, plain copy {copied['seconds']:.1f} s "
        f"({cost.run_seconds / copied['seconds']:.2f}x)"
    )


def calibrated(folder: Path) -> None:
    model, kept = write_wan("1.3b", folder / "wan-1.3b"), folder / "kept"
    kept.mkdir(exist_ok=True)
    noise = torch.Generator().manual_seed(0)
    text = torch.randn(1, 512, 4096, generator=noise).bfloat16()
    calls = [
        [torch.randn(1, *LATENT, generator=noise).bfloat16(), torch.tensor([1000 - 80 * n]), text, None, False, None]
        for n in range(CALLS)
    ]
    torch.save(calls, kept / "calib_data.pth")
    recipe = folder / "static.yaml"
    recipe.write_text(
        "apiversion: multimodal_sd_modelslim_v1\nspec:\n  process:\n  - type: linear_quant\n    qconfig:\n"
        "      act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}\n"
        "      weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}\n"
        f"  multimodal_sd_config: {{dump_config: {{dump_data_dir: {kept}}}}}\n"
    )
    told, cost = run(model, folder / "out", recipe)
    show("calibrated", cost)
    tokens = LATENT[1] * LATENT[2] * LATENT[3] // 4
    state = tokens * SHAPES["1.3b"][0] * 2
    print(
        f"peak beyond the process {cost.growth:.0f} MiB, predicted {cost.predicted:.0f}; "
        f"2 x {told['unit'] / MIB:.0f} MiB of the largest block; "
        f"{CALLS} calls of {tokens} tokens, of which each state takes {state / MIB:.0f} MiB and "
        f"all that wait {told['activations'] / MIB:.0f} MiB"
    )


def capture(folder: Path, rounds: int) -> None:
    tests = ROOT / "packages" / "slim-sd" / "tests"
    model = folder / "pipeline"
    if not model.exists():
        sys.path.insert(0, str(tests))
        import tiny_pipelines

        sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 6}
        tiny_pipelines.build("wan2_1_t2v", model, **sizes)
    told, _ = run_python(_CAPTURE, str(model), str(tests), str(rounds))
    plain, captured = told["plain"], told["captured"]
    shown = []
    for what, at in (("seconds", 0), ("processor seconds", 1)):
        without, with_it = (sorted(run[at] for run in runs) for runs in (plain, captured))  # pyright: ignore
        best, middle = (
            f"{with_it[i]:.2f} for {without[i]:.2f} ({with_it[i] / without[i] - 1:+.1%})" for i in (0, rounds // 2)
        )
        shown.append(f"{what}, with capture and without: least {best}, median {middle}")
    share = told["recorder"][0] / min(run[0] for run in captured)  # pyright: ignore
    print("; ".join(shown) + f"; in the recorder {1000 * told['recorder'][0]:.0f} ms of a generation ({share:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--capture", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.large:
        large(given.folder)
    if given.calibrated:
        calibrated(given.folder)
    if given.capture:
        capture(given.folder, given.rounds)


if __name__ == "__main__":
    main()

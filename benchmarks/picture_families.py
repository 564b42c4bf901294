"""Which vision-language models of the installed transformers Slim takes as they are: all of them are tried.

Of every image-text-to-text class a tiny random bfloat16 instance is built and saved with its processor (those of the
families that slim-vlm's tests have are laid out as published). If transformers runs it on a picture, ``slim quant``
quantizes it to W8A8 on three pictures, static but for experts, and ``slim verify --engine vllm-ascend`` judges the
files. Beside that, the float tensors must be those of the source bit for bit, and the logits of the model run unit by
unit those of its plain forward. What an image processor needs (torchvision, timm) is used where it is installed.

python benchmarks/picture_families.py                      all of them, one process each, one line each
python benchmarks/picture_families.py --only paligemma mllama
python benchmarks/picture_families.py --keep FOLDER        also keep models and outputs
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from tiny_pictures import build_pictures, picture_models
from torch import Tensor
from transformers import AutoModelForImageTextToText

from slim_core.errors import SlimError
from slim_core.model.streamed import StreamedModel
from slim_core.runners.calibration import BlockForwards
from slim_vlm.dataset import read_samples
from slim_vlm.models import open_vlm
from slim_vlm.preparation import Preparation
from slim_vlm.processor import has_template, open_processor

__all__ = ["Outcome", "survey"]

PASSED, NOT_HERE, REFUSED, FAILED = "passed", "not by transformers", "refused", "failed"
TIMEOUT = 300  # seconds for one model
TESTS = Path(__file__).parents[1] / "packages" / "slim-vlm" / "tests"
SIZES = ((40, 56), (96, 64), (64, 64))
CPU = torch.device("cpu")
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
DYNAMIC = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
# What another order of additions makes of bfloat16 logits; the lines say where they are not the same bit for bit.
LEAST_SQNR = 40.0


@dataclass
class Outcome:
    """What became of one model: which step it came to, and what there is to say of it."""

    model_type: str
    outcome: str = FAILED
    step: str = "build"
    said: str = ""

    def __str__(self) -> str:
        return f"{self.model_type}: {self.outcome}: {self.said}"


class _NotHereError(Exception):
    """transformers itself cannot do it, or this script cannot build it."""


class _WrongError(Exception):
    """A result that is not what it must be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, as config.json names them")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models and outputs here")
    arguments = parser.parse_args()
    known = picture_models()
    if lost := sorted(set(arguments.only or ()) - known.keys()):
        parser.error(f"transformers {transformers.__version__} has no image-text-to-text model {lost[0]!r}")
    torch.set_num_threads(1)
    for name in ("slim_vlm.quantize", "slim_vlm.__main__", "slim_core.commands", "slim_core.evaluation.verify"):
        importlib.import_module(name)
    # Nobody looks at the pictures of these reports, and they take half the time.
    report = importlib.import_module("slim_core.evaluation.report.write")
    report.draw_plots = lambda _data: {}  # pyright: ignore[reportAttributeAccessIssue]
    counts: Counter[str] = Counter()
    for name in arguments.only or sorted(known):
        outcome = _apart(name, arguments.keep)
        counts[outcome.outcome] += 1
        print(outcome, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))


def survey(model_type: str, folder: Path) -> Outcome:
    """Try one model; everything is written below ``folder``."""
    outcome = Outcome(model_type)
    try:
        reference = _by_transformers(outcome, folder / "model")
        _by_slim(outcome, folder, reference)
        outcome.outcome = PASSED
    except _NotHereError as error:
        outcome.outcome, outcome.said = NOT_HERE, str(error)
    except SlimError as error:
        outcome.outcome = REFUSED if outcome.step in ("processor", "open") else FAILED
        outcome.said = f"{outcome.step}: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the survey asks
        outcome.said = f"{outcome.step}: {_said(error)}"
    outcome.said = outcome.said.replace(f"{folder / 'model'}", "MODEL")
    return outcome


def _by_transformers(outcome: Outcome, folder: Path) -> Any:
    """Build, save and read back; and run it on a picture, if there is a processor."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _build(outcome.model_type, folder)
        outcome.step = "load"
        auto: Any = AutoModelForImageTextToText
        model, report = auto.from_pretrained(
            folder, local_files_only=True, dtype="auto", experts_implementation="eager", output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"it misses {min(report['missing_keys'])!r} of what it saved")
    except Exception as error:
        raise _NotHereError(f"{outcome.step}: {_said(error)}") from error
    outcome.step = "processor"
    processor = open_processor(folder)
    outcome.step = "forward"
    try:
        with torch.no_grad():
            model.eval().requires_grad_(False)(**_in_dtype(_encoded(processor), model.dtype), use_cache=False)
    except Exception as error:
        raise _NotHereError(f"{outcome.step}: {_said(error)}") from error
    return model


def _build(model_type: str, folder: Path) -> None:
    sys.path.insert(0, str(TESTS))
    published = importlib.import_module("tiny_vlms")
    if model_type in published.FAMILIES:
        published.build(model_type, folder)
    else:
        build_pictures(model_type, folder)


def _encoded(processor: Any) -> Mapping[str, Any]:
    picture = Image.linear_gradient("L").resize((64, 96)).convert("RGB")
    if not has_template(processor):
        return processor(images=[picture], text="What?", return_tensors="pt")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def _in_dtype(made: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    tensors = {name for name, value in made.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value.to(dtype) if name in tensors else value for name, value in made.items()}


def _by_slim(outcome: Outcome, folder: Path, reference: Any) -> None:
    model, pictures = folder / "model", _pictures(folder / "pictures")
    outcome.step = "open"
    streamed = open_vlm(model)
    inputs = [Preparation(streamed).inputs(sample) for sample in read_samples(pictures, "Describe it.")]
    linears = {info.name for unit in streamed.units for info in unit.linears if info.in_block}
    idle = _idle(reference, linears, inputs)
    outcome.step = "unit by unit"
    with torch.no_grad():
        wanted = [reference(**given).logits for given in inputs]
    found = _unit_by_unit(streamed, [Preparation(streamed).inputs(s) for s in read_samples(pictures, "Describe it.")])
    same = all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    if not same and (worst := min(_sqnr(*pair) for pair in zip(wanted, found, strict=True))) < LEAST_SQNR:
        raise _WrongError(f"unit by unit the logits are those of the plain forward to {worst:.1f} dB only")
    outcome.step = "quantize"
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(_recipe(pictures, idle)))
    command = importlib.import_module("slim_vlm.__main__").main
    given = {"model_path": model, "save_path": folder / "out", "config_path": recipe, "model_type": "tiny"}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        status = command(["quant", *arguments, "--device", "cpu"])
    if status != 0:
        raise _WrongError(f"slim quant ended with {status}: {told.getvalue().strip()[-300:]}")
    outcome.step = "verify"
    checked = importlib.import_module("slim_core.evaluation.verify").verify_folder(folder / "out", model, "vllm-ascend")
    if not checked.ok:
        raise _WrongError(f"{len(checked.problems)} problems, first {checked.problems[0]}")
    outcome.step = "compare"
    quantized = _compared(_tensors(model), folder / "out")
    towers = ", ".join(name.rpartition(".")[2] for name in streamed.towers) or "none"
    notes = [f"{quantized} linears; towers: {towers}"]
    notes += ["logits not the same bit for bit"] if not same else []
    notes += [f"{len(idle)} linears excluded that no picture reaches"] if idle else []
    outcome.said = "; ".join(notes)


def _pictures(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(SIZES):
        colours = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(number))
        image = Image.fromarray((colours * 255).byte().numpy(), "RGB")
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def _recipe(pictures: Path, idle: list[str]) -> dict[str, Any]:
    rules = [
        {"qconfig": {"act": STATIC, "weight": WEIGHT}, "exclude": ["*experts*", *idle]},
        {"qconfig": {"act": DYNAMIC, "weight": WEIGHT}, "include": ["*experts*"]},
    ]
    spec = {"process": [{"type": "linear_quant", **rule} for rule in rules], "save": [{"type": "ascendv1_saver"}]}
    return {"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec | {"dataset": str(pictures)}}


def _idle(reference: Any, linears: set[str], inputs: list[Any]) -> list[str]:
    """The linears that these pictures never call, so nothing is known of their inputs; Slim asks to exclude them."""
    watched = {
        name: module for name, module in reference.named_modules() if name in linears and ".experts." not in name
    }
    idle = set(watched)
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: idle.discard(name)) for name, module in watched.items()
    ]
    with torch.no_grad():
        for given in inputs:
            reference(**given)
    for handle in handles:
        handle.remove()
    return sorted(idle)


def _unit_by_unit(model: StreamedModel, inputs: list[Any]) -> list[Tensor]:
    with torch.no_grad(), BlockForwards(model, inputs, CPU) as forwards:
        return [output.logits for output in forwards.run_model()]


def _sqnr(want: Tensor, have: Tensor) -> float:
    noise = (want.double() - have.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise.clamp_min(1e-30)))


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors


def _compared(source: Mapping[str, Tensor], folder: Path) -> int:
    """How many linears are quantized; float tensors are those of the source, and none of it is lost."""
    written = _tensors(folder)
    kinds: dict[str, str] = json.loads((folder / "quant_model_description.json").read_text())
    for name, tensor in written.items():
        bias = name.endswith(".bias") and kinds.get(name.removesuffix("bias") + "weight", "FLOAT") != "FLOAT"
        if kinds[name] == "FLOAT" and name in source and not bias and not _same(tensor, source[name]):
            raise _WrongError(f"{name} is not what it was")
    lost = [name for name in source if name not in written and "experts" not in name and not _is_tied(name, kinds)]
    if lost := [name for name in lost if not name.endswith(".bias")]:  # folded into quant_bias
        raise _WrongError(f"{lost[0]} is lost")
    return sum(name.endswith(".weight") and kinds[name] != "FLOAT" for name in written)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _is_tied(name: str, kinds: Mapping[str, str]) -> bool:
    return name == "lm_head.weight" and name not in kinds


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:240]}"


def _apart(name: str, keep: Path | None) -> Outcome:
    """Try one model in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            results.put(survey(name, (keep or Path(folder)) / name))

    process = context.Process(target=work)
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(name, said=f"took more than {TIMEOUT} s")
    if results.empty():
        return Outcome(name, said=f"its process ended with status {process.exitcode}")
    return results.get()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()

"""Which diffusion transformers of the installed diffusers Slim takes as they are: all of them are tried.

Of every ``*Transformer*Model`` a tiny random instance is built and saved as the only component of a Diffusers folder.
``python -m slim_sd quant`` quantizes it to W8A8 dynamic, without data, and ``slim verify --engine mindie-sd`` judges
the files against the original. Where a call of the class is known (``tiny_transformers.py``), four such calls are
written into a ``calib_data.pth`` by hand; the model run block by block must give what its plain forward gives, bit for
bit, and a static W8A8 recipe is calibrated on them and verified. Linears that none of these calls reach, because they
are for an input that was left out, are excluded, as Slim asks for.

python benchmarks/diffusion_families.py                    all of them, one process each, one line each
python benchmarks/diffusion_families.py --only FluxTransformer2DModel
python benchmarks/diffusion_families.py --keep FOLDER      also keep models and outputs
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_transformers import CALLS, call_for, config_for, transformer_classes
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slim_core.dispatch import original_opener, original_parts
from slim_core.errors import SlimError
from slim_core.evaluation.verify import verify_folder
from slim_core.runners.calibration import BlockForwards
from slim_sd.captured.recorder import forward_parameters
from slim_sd.captured.records import open_records
from slim_sd.loading import open_transformer

__all__ = ["Outcome", "survey"]

PASSED, REFUSED, FAILED, NOT_TRIED = "passed", "refused", "failed", "no call known"
TIMEOUT = 300  # seconds for one class
COUNT = 4  # calls of a calibration set
CPU = torch.device("cpu")
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
DYNAMIC = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}


@dataclass
class Outcome:
    """What became of one class, without and with data."""

    name: str
    data_free: str = FAILED
    calibrated: str = NOT_TRIED
    said: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        return f"{self.name}: data-free {self.data_free}, calibrated {self.calibrated}; {'; '.join(self.said)}"


class _WrongError(Exception):
    """A result that is not what it must be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes of diffusers")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models and outputs here")
    arguments = parser.parse_args()
    known = transformer_classes()
    if lost := sorted(set(arguments.only or ()) - set(known)):
        parser.error(f"diffusers {diffusers.__version__} has no {lost[0]}")
    torch.set_num_threads(1)
    for name in ("slim_sd.__main__", "slim_core.commands", "slim_sd.quantize"):
        importlib.import_module(name)
    # Nobody looks at the pictures of these reports, and they take half the time.
    report: Any = importlib.import_module("slim_core.evaluation.report.write")
    report.draw_plots = lambda _data: {}
    counts: dict[str, Counter[str]] = {"data-free": Counter(), "calibrated": Counter()}
    for name in arguments.only or known:
        outcome = _apart(name, arguments.keep)
        counts["data-free"][outcome.data_free] += 1
        counts["calibrated"][outcome.calibrated] += 1
        print(outcome, flush=True)
    for kind, found in counts.items():
        print(f"{kind}: {', '.join(f'{count} {outcome}' for outcome, count in found.most_common())}")


def survey(name: str, folder: Path) -> Outcome:
    """Try one class; everything is written below ``folder``."""
    outcome = Outcome(name)
    model = build(name, folder / "model")
    outcome.data_free = _tried(outcome, lambda: _quantized(model, folder, DYNAMIC))
    if name in CALLS:
        outcome.calibrated = _tried(outcome, lambda: _calibrated(name, model, folder))
    outcome.said = [text.replace(str(folder), "FOLDER") for text in outcome.said]
    return outcome


def _tried(outcome: Outcome, work: Any) -> str:
    try:
        outcome.said.append(work())
    except SlimError as error:
        outcome.said.append(str(error))
        return REFUSED
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the survey asks
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        outcome.said.append(f"{type(error).__name__}: {' '.join(lines)[:300]}")
        return FAILED
    return PASSED


def build(name: str, folder: Path) -> Path:
    """A tiny random transformer in a Diffusers folder without any other component."""
    kind: Any = getattr(diffusers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind(**config_for(name)).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = drawn + 1 if parameter.dim() == 1 and key.endswith("weight") else drawn
    module.save_pretrained(folder / "transformer")
    index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _quantized(
    model: Path, folder: Path, act: Mapping[str, Any], calls: Path | None = None, idle: Sequence[str] = ()
) -> str:
    """By the real command, and verified."""
    rule = {"type": "linear_quant", "qconfig": {"act": act, "weight": WEIGHT}, "exclude": list(idle)}
    config = {} if calls is None else {"dump_config": {"dump_data_dir": str(calls), "enable_dump": False}}
    spec = {"process": [rule], "multimodal_sd_config": config}
    recipe, out = folder / "recipe.yaml", folder / ("dynamic" if calls is None else "static")
    recipe.write_text(json.dumps({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec}))
    given = {"model_path": model, "save_path": out, "config_path": recipe, "model_type": "tiny", "device": "cpu"}
    arguments = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        status = importlib.import_module("slim_sd.__main__").main(["quant", *arguments])
    if status != 0:
        text = told.getvalue().strip()
        kind = _Refused if "error " in text and status == 1 and "UnexpectedError" not in text else _WrongError
        raise kind(f"slim quant ended with {status}: {text[-500:]}")
    checked = verify_folder(out, model, "mindie-sd", original_opener(out), original_parts(out))
    if not checked.ok or not checked.compared:
        raise _WrongError(f"{len(checked.problems)} problems, first {[*checked.problems, 'not compared'][0]}")
    count = sum(entry.count for entry in checked.loadable if entry.kind != "FLOAT")
    return f"{count} linears {'dynamic' if calls is None else 'static'}"


class _Refused(SlimError):
    """What the command said."""


def _calibrated(name: str, model: Path, folder: Path) -> str:
    streamed = open_transformer(model, "transformer")
    parameters = forward_parameters(streamed.module)
    calls = folder / "calls"
    calls.mkdir(parents=True, exist_ok=True)
    made = [call_for(name, streamed.config, number) for number in range(COUNT)]
    torch.save([[call.get(parameter) for parameter in parameters] for call in made], calls / "calib_data.pth")
    everything = [key for unit in streamed.units for key in unit.parameters]
    streamed.load(everything, CPU)
    linears = {info.name for unit in streamed.units for info in unit.linears if info.in_block}
    idle = set(linears)
    handles = [
        module.register_forward_pre_hook(lambda *_, key=key: idle.discard(key))
        for key, module in streamed.module.named_modules()
        if key in linears
    ]
    with torch.no_grad():
        wanted = [_tensors(streamed.module(**call)) for call in made]
    for handle in handles:
        handle.remove()
    records = open_records(
        calls / "calib_data.pth", parameters=parameters, fingerprint=None, settings=None, config=streamed.config
    )
    inputs = [{key: value for key, value in call.items() if value is not None} for call in records]
    with torch.no_grad(), BlockForwards(streamed, inputs, CPU) as forwards:
        for unit in streamed.running:
            forwards.reach(unit)
            if unit is streamed.running[-1]:
                forwards.run_to_end()
            else:
                forwards.run(hand_on=True)
        # Some classes use a part of their first block once more behind the last one, as nobody does who calibrates.
        streamed.load(everything, CPU)
        for sample, want in enumerate(wanted):
            found = _tensors(forwards.finish(sample))
            if not all(torch.equal(one, other) for one, other in zip(want, found, strict=True)):
                raise _WrongError("block by block the output is not that of the plain forward")
    blocks = sum(unit.block is not None for unit in streamed.units)
    static = _quantized(model, folder, STATIC, calls, sorted(idle))
    excluded = f" ({len(idle)} excluded that no call reaches)" if idle else ""
    return f"{blocks} blocks of {', '.join(streamed.block_lists)} bit-equal; {static}{excluded}"


def _tensors(output: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        if isinstance(leaf, Tensor)
    ]


def _apart(name: str, keep: Path | None) -> Outcome:
    """Try one class in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.put(survey(name, (keep or Path(folder)) / name))
            except Exception as error:  # noqa: BLE001
                results.put(Outcome(name, said=[f"{type(error).__name__}: {error}"]))

    process = context.Process(target=work)
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(name, said=[f"took more than {TIMEOUT} s"])
    if results.empty():
        return Outcome(name, said=[f"its process ended with status {process.exitcode}"])
    return results.get()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    main()

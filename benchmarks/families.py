"""Which causal language models of the installed transformers Slim takes as they are: all of them are tried.

Of every class a tiny random instance is built from its config class and saved as transformers saves it. If
transformers can read it back and run it, Slim quantizes it (W8A8 dynamic, and static on a few samples), verifies the
files and scores them. The written numbers are judged by means of their own as well: transformers must be able to load
them, multiplied out, under the names they have, and the streamed original must score what the plain one does.

python benchmarks/families.py                      all of them, one process each, as a Markdown table
python benchmarks/families.py --only llama mixtral
python benchmarks/families.py --json report.json   also keep everything that was measured
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rebuilt import rebuild
from tiny_models import TOKENIZER, build, causal_models, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.errors import SlimError, UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.models.loading import open_model
from slim_llm.service import LlmService

__all__ = ["Outcome", "survey"]

PASSED, NOT_HERE, REFUSED, FAILED = "passed", "not by transformers", "refused", "failed"
TIMEOUT = 240  # seconds for one model
TEXTS = (
    "A generator is a function that returns an iterator.",
    "The with statement wraps the execution of a block with methods defined by a context manager, which is convenient.",
    "Hello, world!",
    "def add(a, b):\n    return a + b\n",
    "In winter the lake froze early, and the children of both villages walked to school across the ice.",
)
SCORED = "The compiler reads a file, checks what it declares, and writes machine code that runs on the target.\n" * 3
WINDOW = 48
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
ACTIVATION = {
    "dynamic": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"},
    "static": {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"},
}
# Random routers and indexers choose by a hair, and change their mind with the eighth bit, so this is no measure of
# quality: nothing that is wrong (a scale, an order, a name) comes near 6 dB.
LEAST_SQNR, LEAST_WEIGHT_SQNR, MOST_RATIO = 6.0, 12.0, 1.1
_ROUTERS = ("router", "gate")


@dataclass
class Outcome:
    """What became of one model: which step it came to, and why no further."""

    model_type: str
    cls: str
    outcome: str = FAILED
    step: str = "build"
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict[str, float])
    quantized: int = 0
    idle: list[str] = field(default_factory=list[str])
    kinds: list[str] = field(default_factory=list[str])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, as config.json names them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep models and outputs here")
    parser.add_argument("--traceback", action="store_true", help="show where a model failed")
    arguments = parser.parse_args()
    known = causal_models()
    if lost := sorted(set(arguments.only or ()) - known.keys()):
        parser.error(f"transformers {transformers.__version__} has no causal language model {lost[0]!r}")
    _import_all()
    outcomes: list[Outcome] = []
    for name in arguments.only or sorted(known):
        outcomes.append(_apart(name, known[name], arguments.keep, arguments.traceback))
        print(f"{name}: {outcomes[-1].outcome} {outcomes[-1].reason}", file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    print(table(outcomes))


def _import_all() -> None:
    """Import what every model needs before the processes part."""
    torch.set_num_threads(1)
    importlib.import_module("slim_llm.quantize")
    build("llama", torch.float32)
    # Nobody looks at the pictures of these reports, and they take half the time.
    report = importlib.import_module("slim_core.evaluation.report.write")
    report.draw_plots = lambda _data: {}  # pyright: ignore[reportAttributeAccessIssue]


def survey(model_type: str, cls: str, folder: Path) -> Outcome:
    """Try one model; everything is written below ``folder``."""
    outcome = Outcome(model_type, cls)
    try:
        logits = _by_transformers(outcome, folder / "model")
        _by_slim(outcome, folder, logits)
        outcome.outcome = PASSED
    except _NotHereError as error:
        outcome.outcome, outcome.reason = NOT_HERE, str(error)
    except _NothingToDoError as error:
        outcome.outcome, outcome.reason = REFUSED, str(error)
    except SlimError as error:
        planned = outcome.step == "open"
        outcome.outcome = REFUSED if planned and isinstance(error, UnsupportedError) else FAILED
        outcome.reason = f"{outcome.step}: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the survey asks
        logging.getLogger().debug(traceback.format_exc())
        outcome.reason = f"{outcome.step}: {_said(error)}"
    outcome.reason = outcome.reason.replace(f"{folder / 'model'}: ", "")
    return outcome


class _NotHereError(Exception):
    """transformers itself cannot do it."""


class _NothingToDoError(Exception):
    """Slim finds no linear in the blocks; it says so in a warning of its plan."""


class _WrongError(Exception):
    """A result that is not what it must be."""


def _by_transformers(outcome: Outcome, folder: Path) -> Tensor:
    """Build, save, read back and run; the logits of what was read back."""
    try:
        model: Any = build(outcome.model_type, torch.float32)
        with torch.no_grad():
            before = _logits(model)
        outcome.step = "save"
        save(model, folder)
        after = _logits(_load(folder))
    except Exception as error:
        logging.getLogger().debug(traceback.format_exc())
        raise _NotHereError(f"{outcome.step}: {_said(error)}") from error
    if not after.isfinite().all():
        raise _NotHereError("its logits are not finite")
    if _sqnr(before, after) < 60:
        raise _NotHereError(f"what it saves is not what it reads back ({_sqnr(before, after):.0f} dB)")
    return after


def _by_slim(outcome: Outcome, folder: Path, logits: Tensor) -> None:
    data, text, model = folder / "calib.jsonl", folder / "text.txt", folder / "model"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    text.write_text(SCORED)
    outcome.step = "open"
    opened = open_model(model)
    if not any(unit.linears for unit in opened.units if unit.block is not None):
        kinds = sorted({type(module).__name__ for module in opened.module.modules() if _has_matrix(module)})
        raise _NothingToDoError(f"its blocks have no linear, but {', '.join(kinds)}")
    idle = _never_run(model)
    outcome.idle = sorted({name.rpartition(".")[2] for name in idle})
    for scheme, activation in ACTIVATION.items():
        outcome.step = f"quantize {scheme}"
        spec = {
            "process": [{"type": "linear_quant", "qconfig": {"act": activation, "weight": WEIGHT}, "exclude": idle}],
            "save": [{"type": "ascendv1_saver"}],
            "dataset": str(data),
        }
        written = folder / scheme
        request = QuantRequest(
            model_path=model, save_path=written, model_type=outcome.model_type, device="cpu", force=True
        )
        recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec})
        LlmService().quantize(request, recipe, SilentProgress())
        outcome.step = f"verify {scheme}"
        report = verify_folder(written, model)
        if not report.ok:
            raise _WrongError(f"{len(report.problems)} problems, first {report.problems[0]}")
        outcome.step = f"evaluate {scheme}"
        request = EvalRequest(model_path=model, quantized=written, text=text, device="cpu", sequence_length=WINDOW)
        score = LlmService().evaluate(request, SilentProgress())
        plain = _perplexity(logits)
        assert score.ratio is not None
        assert score.logits_sqnr_db is not None
        outcome.figures |= {f"{scheme} ratio": score.ratio, f"{scheme} dB": score.logits_sqnr_db}
        outcome.figures["original off"] = abs(score.perplexity / plain - 1)
        if outcome.figures["original off"] > 1e-4:
            raise _WrongError(f"the streamed model scores {score.perplexity:.4f}, the plain one {plain:.4f}")
        if not 1 / MOST_RATIO < score.ratio < MOST_RATIO or score.logits_sqnr_db < LEAST_SQNR:
            raise _WrongError(f"ratio {score.ratio:.4f}, {score.logits_sqnr_db:.1f} dB")
        outcome.step = f"read {scheme} back"
        quantized = rebuild(model, written, folder / f"{scheme}-rebuilt")
        outcome.quantized = len(quantized)
        outcome.figures["share"] = _share(model, quantized)
        outcome.kinds = sorted({".".join(p for p in name.split(".") if not p.isdigit()) for name in quantized})
        if not quantized:
            raise _WrongError("nothing is quantized")
        if routers := [name for name in quantized if _routes(name)]:
            raise _WrongError(f"{routers[0]!r} is quantized, and has the name of a router")
        found = _middle_sqnr(logits, _logits(_load(folder / f"{scheme}-rebuilt")))
        outcome.figures[f"{scheme} weights dB"] = found
        if found < LEAST_WEIGHT_SQNR:
            raise _WrongError(f"the written weights, read back by transformers, give logits of {found:.1f} dB")


def _has_matrix(module: torch.nn.Module) -> bool:
    own = module.named_parameters(recurse=False)
    return any(p.dim() > 1 for _, p in own) and not isinstance(module, (torch.nn.Embedding, torch.nn.Linear))


def _routes(name: str) -> bool:
    parts = name.split(".")
    return "router" in parts or parts[-1] in _ROUTERS or parts[-1].endswith("expert_gate")


def _never_run(folder: Path) -> list[str]:
    """The linears that plain text never calls, so nothing is known of their inputs: attentions to an encoder that is
    not there, projections whose weight is multiplied by hand. Slim asks to exclude them from static quantization.
    """
    model = _load(folder)
    idle = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name in sorted(idle):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: idle.discard(name))
    _logits(model)
    known = {linear.name for unit in open_model(folder).units for linear in unit.linears if linear.in_block}
    return sorted(idle & known)


def _share(folder: Path, quantized: list[str]) -> float:
    """The part of the matrices of the blocks, by elements, that is quantized."""
    model, modules = open_model(folder), set(quantized)
    matrices = {name for name, parameter in model.module.named_parameters() if parameter.dim() > 1}
    sizes = {
        stored: model.source.meta(stored).numel
        for unit in model.units
        if unit.block is not None
        for name, stored in unit.parameters.items()
        if name in matrices
    }
    return sum(size for name, size in sizes.items() if name.removesuffix(".weight") in modules) / sum(sizes.values())


def _load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise _WrongError(f"transformers misses {min(report['missing_keys'])!r}")
    return model.eval()


def _windows() -> list[Tensor]:
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(SCORED)["input_ids"]
    parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [torch.tensor([part]) for part in parts if len(part) > 1]


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Of all windows, one after the other ``(tokens, vocabulary)``."""
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float() for ids in _windows()])


def _perplexity(logits: Tensor) -> float:
    at, loss, count = 0, 0.0, 0
    for ids in _windows():
        part, target = logits[at : at + ids.shape[1] - 1], ids[0, 1:]
        loss += float(torch.nn.functional.cross_entropy(part, target, reduction="sum"))
        at, count = at + ids.shape[1], count + len(target)
    return math.exp(loss / count)


def _sqnr(want: Tensor, have: Tensor) -> float:
    noise = float((want - have).square().sum())
    return 10 * math.log10(float((want - want.mean(-1, keepdim=True)).square().sum()) / noise) if noise else math.inf


def _middle_sqnr(want: Tensor, have: Tensor) -> float:
    """The median over tokens: with random weights the experts that score nearly the same change places now and then."""
    return sorted(_sqnr(*tokens) for tokens in zip(want, have, strict=True))[len(want) // 2]


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:240]}"


def _apart(name: str, cls: str, keep: Path | None, show: bool) -> Outcome:
    """Try one model in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        if show:
            logging.basicConfig(level=logging.DEBUG, format="%(message)s")
            for noisy in ("transformers", "matplotlib", "slim", "urllib3", "httpcore", "filelock"):
                logging.getLogger(noisy).setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            results.put(survey(name, cls, (keep or Path(folder)) / name))

    process = context.Process(target=work)
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(name, cls, reason=f"took more than {TIMEOUT} s")
    if results.empty():
        return Outcome(name, cls, reason=f"its process ended with status {process.exitcode}")
    return results.get()


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    able = len(outcomes) - counts[NOT_HERE]
    lines = [
        f"{len(outcomes)} model types; transformers {transformers.__version__} builds and runs {able}; "
        f"{counts[PASSED]} of these pass ({100 * counts[PASSED] / max(able, 1):.1f} %).",
        "",
        "| model type | class | outcome | linears | of the weights | dynamic | static | reason |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        ratios = [outcome.figures.get(f"{scheme} ratio") for scheme in ACTIVATION]
        shown = [f"{ratio:.4f}" if ratio is not None else "" for ratio in ratios]
        if outcome.idle and not outcome.reason:
            outcome.reason = f"without {', '.join(outcome.idle)}, which text alone never calls"
        reason = outcome.reason.replace("|", "\\|").replace("\n", " ")
        share = f"{100 * outcome.figures['share']:.0f} %" if "share" in outcome.figures else ""
        parts = [f"`{outcome.model_type}`", outcome.cls, outcome.outcome, str(outcome.quantized or ""), share, *shown]
        parts.append(reason)
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()

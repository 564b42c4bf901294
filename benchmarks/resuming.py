"""What it costs that a run can be resumed, and what resuming costs.

    OMP_NUM_THREADS=1 python benchmarks/resuming.py [--rounds 3] [--method gptq] [--hidden 1024] [--layers 6]

A random Qwen3 is quantized with 64 samples of 256 tokens: with activations kept at the boundaries of units, without,
and interrupted after half of the blocks and resumed. The runs of a round follow each other in one process; times are of
the run behind its plan, the least of all rounds, and of the processor beside it, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from distributed import STATIC, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="gptq", choices=("minmax", "ssz", "gptq"))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    given = parser.parse_args()

    from slim_core.evaluation.report import write
    from slim_core.job import Job
    from slim_core.progress import SilentProgress
    from slim_core.recipe import recipe_from_dict
    from slim_core.runners.ledger import Ledger
    from slim_core.service import QuantRequest
    from slim_llm.service import LlmService

    write.draw_plots = lambda _data: {}
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": given.method}
    with tempfile.TemporaryDirectory(prefix="slim-resuming-") as name:
        folder = Path(name)
        build(folder / "model", given.hidden, given.layers)
        words = ["def", "class", "return", "yield", "import", "generator", "context", "iterator"]
        texts = [" ".join(words[(i * j) % 8] for j in range(1024)) for i in range(64)]
        (folder / "calib.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        spec = {
            "process": [{"type": "linear_quant", "qconfig": {"act": STATIC, "weight": weight}}],
            "save": [{"type": "ascendv1_saver"}],
            "dataset": {"path": str(folder / "calib.jsonl"), "max_length": 256},
        }

        def run(resume: bool = False) -> tuple[float, float]:
            request = QuantRequest(
                model_path=folder / "model",
                save_path=folder / "out",
                model_type="bench",
                device="cpu",
                force=True,
                resume=resume,
            )
            began: list[tuple[float, float]] = []
            with suppress(KeyboardInterrupt):
                LlmService().quantize(
                    request,
                    recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
                    SilentProgress(),
                    lambda _plan: began.append((time.perf_counter(), time.process_time())),
                )
            return time.perf_counter() - began[0][0], time.process_time() - began[0][1]

        note, half = Ledger.note, f"model.layers.{given.layers // 2}"

        def dying(self: Ledger, unit: str, told: Any) -> None:
            if unit == half:
                raise KeyboardInterrupt
            note(self, unit, told)

        times: dict[str, list[tuple[float, float]]] = {"kept": [], "not kept": [], "interrupted": [], "resumed": []}
        run()
        for _ in range(given.rounds):
            for what in times:
                if what != "resumed":
                    shutil.rmtree(folder / "out", ignore_errors=True)
                notes = mock.patch.object(Ledger, "note", dying if what == "interrupted" else note)
                keeps = mock.patch.object(Job, "_keeps", lambda _job, what=what: what != "not kept")
                with notes, keeps:
                    times[what].append(run(resume=what == "resumed"))
        for what, at in (("seconds", 0), ("processor seconds", 1)):
            least = {kind: min(taken[at] for taken in runs) for kind, runs in times.items()}
            both = min(a[at] + b[at] for a, b in zip(times["interrupted"], times["resumed"], strict=True))
            print(
                f"{what}: {least['kept']:.2f} with activations kept, {least['not kept']:.2f} without "
                f"({least['kept'] / least['not kept'] - 1:+.1%}); interrupted in block {given.layers // 2} of "
                f"{given.layers} when it was done {least['interrupted']:.2f}, resumed {least['resumed']:.2f}, both "
                f"{both:.2f} ({both / least['kept'] - 1:+.1%}, of which the block done again is "
                f"{1 / given.layers:.1%})",
                flush=True,
            )


if __name__ == "__main__":
    main()

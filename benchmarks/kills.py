"""Runs that are killed at random instants and resumed, until as many kills are reached as are asked for.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--kills 100] [--seed 0] [--ranks 1]

A small random Qwen3 of twelve layers is quantized by each recipe in turn, by the command. A process that has its
imports behind it forks one for every run. A run dies by SIGKILL at a random time after it has begun to write, half-way
through a random write to a weight file, or right ahead of or behind a random rename; the next one resumes it, and may
die as well. Every run that gets to its end is compared with one that nobody disturbed, byte by byte but for the report,
which tells of time and has no plots here. Printed
are where the runs died, and how many units were done at that moment that the journal did not know of yet, so that they
had to be done again; the one at work comes on top. ``--ranks 2`` kills the first of two ranks.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from distributed import STATIC, build

WEIGHT: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}


def linear(act: dict[str, Any], method: str) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": WEIGHT | {"method": method}}}


RECIPES: dict[str, dict[str, Any]] = {
    "dynamic, no data": {"process": [linear(TOKEN, "minmax")]},
    "iter_smooth and static": {"process": [{"type": "iter_smooth"}, linear(STATIC, "minmax")]},
    "gptq, quantized outputs": {"process": [linear(TOKEN, "gptq")], "propagate": "quantized"},
}


@dataclass
class Account:
    """What the kills came to."""

    places: Counter[str] = field(default_factory=Counter)
    redone: Counter[int] = field(default_factory=Counter)
    done: list[int] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.places.values())


def write(folder: Path) -> dict[str, Path]:
    """The model, its calibration texts, and a recipe file for each recipe."""
    build(folder / "model", 256, 12)
    words = ["def", "class", "return", "yield", "import", "generator", "context", "iterator"]
    texts = [" ".join(words[(i * j) % 8] for j in range(256)) for i in range(8)]
    (folder / "calib.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipes = {}
    for number, (name, spec) in enumerate(RECIPES.items()):
        data = {"path": str(folder / "calib.jsonl"), "max_length": 64}
        whole = {"apiversion": "modelslim_v1", "spec": spec | {"save": [{"type": "ascendv1_saver"}], "dataset": data}}
        recipes[name] = folder / f"recipe-{number}.yaml"
        recipes[name].write_text(json.dumps(whole))  # JSON is YAML
    return recipes


def run(folder: Path, recipe: Path, out: Path, device: str, arm: Callable[[], None], told: Path | None) -> int:
    """Carry out the command in a process of its own, which ``arm`` prepares for its death; its process number."""
    if child := os.fork():
        return child
    status = 70
    try:
        from slim_core.evaluation.report import write as write_module
        from slim_core.runners.ledger import Ledger

        write_module.draw_plots = lambda _data: {}
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if told is not None:
            log = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            note = Ledger.note

            def noting(self: Ledger, unit: str, given: Any) -> None:
                os.write(log, f"{unit}\n".encode())
                note(self, unit, given)

            Ledger.note = noting  # type: ignore[method-assign]
        arm()
        from slim_llm.__main__ import main

        given = {"model_path": folder / "model", "save_path": out, "model_type": "bench", "config_path": recipe}
        options = [part for name, value in (given | {"device": device}).items() for part in (f"--{name}", str(value))]
        resume = ["--resume"] if journal(out) else []
        status = int(main(["quant", *options, "--force", *resume]) or 0)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 70
    finally:
        os._exit(status)


def journal(out: Path) -> list[str]:
    """The whole lines that the journal of an unfinished run has; while the output is put in place it lies beside it."""
    for path in (out.parent / f".{out.name}.slim-partial" / "journal.jsonl", out.parent / f".{out.name}.slim-journal"):
        with suppress(FileNotFoundError):
            return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def begun(out: Path) -> bool:
    """Whether a run is at work: a fresh one has a journal; a resumed one has it anyway, so the lock is looked at."""
    if not journal(out):
        return False
    try:
        folder = os.open(out.parent / f".{out.name}.slim-partial", os.O_RDONLY)
    except FileNotFoundError:
        return True  # it has just become the output
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(folder)
    return False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_write(number: int) -> None:
    """Die half-way through a write to a weight file."""
    real, calls = os.pwrite, iter(range(1 << 30))

    def written(fd: int, data: Any, offset: int) -> int:
        if next(calls) == number:
            real(fd, data[: len(data) // 2], offset)
            die()
        return real(fd, data, offset)

    os.pwrite = written  # type: ignore[assignment]


def at_rename(number: int, behind: bool) -> None:
    """Die at a rename; the last ones put the finished folder in place."""
    calls = iter(range(1 << 30))

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def renamed(*paths: Any, **options: Any) -> None:
            hit = next(calls) == number
            if hit and not behind:
                die()
            real(*paths, **options)
            if hit:
                die()

        return renamed

    os.rename, os.replace = dying(os.rename), dying(os.replace)  # type: ignore[assignment]


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def counted(folder: Path, recipe: Path, device: str) -> tuple[dict[str, bytes], float, int, int]:
    """What an undisturbed run writes, how long that takes, and how often it writes and renames."""
    told = folder / "counts"

    def counting() -> None:
        counts = [0, 0]

        def counted(real: Any, which: int) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                counts[which] += 1
                told.write_text(json.dumps(counts))
                return real(*arguments, **options)

            return call

        os.pwrite = counted(os.pwrite, 0)
        os.rename, os.replace = counted(os.rename, 1), counted(os.replace, 1)

    out = folder / "straight"
    assert wait(run(folder, recipe, out, device, counting, None)) == 0
    writes, renames = json.loads(told.read_text())
    shutil.rmtree(out)
    process = run(folder, recipe, out, device, lambda: None, None)
    while not journal(out):
        time.sleep(0.001)
    began = time.monotonic()
    assert wait(process) == 0
    seconds = time.monotonic() - began
    wanted = files(out)
    shutil.rmtree(out)
    return wanted, seconds, writes, renames


def ways(chance: random.Random, seconds: float, writes: int, renames: int) -> Iterator[tuple[str, float, Any]]:
    """Ways to die, one after the other: name, when to be killed, what to do beforehand."""
    while True:
        yield "at some time", chance.uniform(0, seconds), lambda: None
        number = chance.randrange(writes)
        yield "in a write", 600.0, lambda number=number: at_write(number)
        number, behind = chance.randrange(renames), chance.random() < 0.5
        yield "at a rename", 600.0, lambda number=number, behind=behind: at_rename(number, behind)


def kill(folder: Path, name: str, recipe: Path, kills: int, device: str, chance: random.Random) -> Account:
    """Kill runs of one recipe until that was done so often, and see that every one that gets to its end is right."""
    wanted, seconds, writes, renames = counted(folder, recipe, device)
    account, out, told = Account(), folder / "out", folder / "units"
    finished = 0
    for place, after, arm in ways(chance, seconds, writes, renames):
        told.unlink(missing_ok=True)
        before = max(0, len(journal(out)) - 1)
        over = account.kills >= kills
        process = run(folder, recipe, out, device, (lambda: None) if over else arm, told)
        if not over:
            ends = None if place == "at some time" else time.monotonic() + after
            while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and (ends is None or time.monotonic() < ends):
                if ends is None and begun(out):
                    ends = time.monotonic() + after
                time.sleep(0.001)
            status = os.waitstatus_to_exitcode(ended[1]) if ended != (0, 0) else None
            if status is None:
                os.kill(process, signal.SIGKILL)
                status = wait(process)
        else:
            status = wait(process)
        if status == -signal.SIGKILL:
            computed = before + (len(told.read_text().splitlines()) if told.exists() else 0)
            known = max(0, len(journal(out)) - 1)
            account.places[place] += 1
            if not out.exists():
                account.done.append(computed)
                account.redone[max(0, computed - known)] += 1
        elif status:
            sys.exit(f"{name}: a run ended with status {status} ({place})")
        if out.exists():
            if files(out) != wanted:
                sys.exit(f"{name}: the files of a resumed run DIFFER")
            finished += 1
            shutil.rmtree(out)
            (out.parent / f".{out.name}.slim-journal").unlink(missing_ok=True)  # a kill behind the last rename
            if over:
                break
    left = [path.name for path in folder.iterdir() if path.name.startswith(".out")]
    places = ", ".join(f"{count} {place}" for place, count in account.places.items())
    redone = ", ".join(f"{units}: {count}" for units, count in sorted(account.redone.items()))
    print(
        f"{name}: {account.kills} kills ({places}), {finished} runs got to their end, all files the same; "
        f"straight run {seconds:.2f} s; finished units done again {{{redone}}}; left behind: {left or 'nothing'}",
        flush=True,
    )
    return account


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args(arguments)
    device = "cpu" if given.ranks == 1 else f"cpu:{','.join(map(str, range(given.ranks)))}"
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="slim-kills-") as name:
        folder = Path(name)
        if not (child := os.fork()):  # the process that forks has never computed anything
            recipes = write(folder)
            (folder / "recipes.json").write_text(json.dumps({name: str(path) for name, path in recipes.items()}))
            os._exit(0)
        assert wait(child) == 0
        recipes = {name: Path(path) for name, path in json.loads((folder / "recipes.json").read_text()).items()}
        for module in ("matplotlib.backends.backend_svg", "slim_llm.__main__", "slim_llm.quantize"):
            import_module(module)

        share = -(-given.kills // len(recipes))
        accounts = [kill(folder, name, recipe, share, device, chance) for name, recipe in recipes.items()]
    redone = sum((account.redone for account in accounts), Counter[int]())
    print(
        f"{sum(account.kills for account in accounts)} kills; finished units done again: {dict(sorted(redone.items()))}"
    )


if __name__ == "__main__":
    main()

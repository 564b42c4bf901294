"""The real thing: processes that stage and write are killed again and again, and end with the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slim_core.checkpoint.staging import JOURNAL

RUN = """
import os, sys, time
from pathlib import Path

import torch

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.staging import Staging
from slim_core.checkpoint.writer import ShardedWriter, lay_out

UNITS, PARTS, SIZE = 120, 3, 10_000

def run(target, resume):
    names = {unit: [f"{unit}.{part}" for part in range(PARTS)] for unit in range(UNITS)}
    metas = [TensorMeta(name, torch.int16, (SIZE,)) for group in names.values() for name in group]
    staging = Staging(target, "f", resume=resume)
    done = [name for unit in staging.finished for name in names[int(unit)]]
    writer = ShardedWriter(staging.folder, lay_out(metas, "w", 500_000), done)
    for unit, group in names.items():
        if str(unit) not in staging.finished:
            for name in group:
                seed = sum(map(ord, name)) * 1009 + unit
                writer.put(name, torch.arange(seed, seed + SIZE).to(torch.int16))
            writer.after_writing(lambda unit=unit: staging.record(str(unit)))
            time.sleep(0.0005)
    writer.finish()
    staging.commit()

for line in sys.stdin:
    target, resume = line.split()
    if not (child := os.fork()):
        run(Path(target), resume == "1")
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """A process that has its imports behind it and forks one for every run."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, target: Path, resume: bool) -> int:
        """Start a run; returns its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{target} {int(resume)}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.process.communicate()


def lines(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path, runs: Runs) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs.start(straight, resume=False)
    assert runs.answer() == 0
    want = {path.name: path.read_bytes() for path in straight.iterdir()}
    journal = tmp_path / ".killed.slim-partial" / JOURNAL
    chance = random.Random(20)
    kills = 0
    while kills < 10:
        noted = lines(journal)
        run = runs.start(killed, resume=noted > 0)
        pause = chance.uniform(0, 0.003)
        enough = noted + chance.choice([0, 1, 2, 4])
        deadline = time.monotonic() + 20
        while lines(journal) < enough and not killed.exists():
            assert time.monotonic() < deadline
            time.sleep(0.0002)
        time.sleep(pause)
        with contextlib.suppress(ProcessLookupError):
            os.kill(run, signal.SIGKILL)
        result = runs.answer()
        assert result in (-signal.SIGKILL, 0)
        kills += result != 0
        if killed.exists():  # it was quicker than the signal
            assert {path.name: path.read_bytes() for path in killed.iterdir()} == want
            shutil.rmtree(killed)
    runs.start(killed, resume=lines(journal) > 0)
    assert runs.answer() == 0
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == want
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "straight"]

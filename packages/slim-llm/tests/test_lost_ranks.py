"""Runs of several ranks of which one dies, hangs or fails: they end, say why, and can be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from slim_core.errors import EnvError, InvalidModelError

ModelFolder = Callable[..., Path]
Sabotage = Callable[[str], None]

SABOTAGE = """
import os, signal, time
if os.environ.get("SLIM_RANK_REPORT") and os.environ["RANK"] == "1":
    from slim_core.errors import InvalidModelError
    from slim_core.processors.linear_quant import LinearQuant

    process = LinearQuant.process

    def broken(self, work):
        process(self, work)
        if work.name == "model.layers.1":
            {}

    LinearQuant.process = broken
"""


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    """``sabotage(code)``: what rank 1 does once it is through with the second block; nothing if that is empty."""
    folder = tmp_path / "sabotage"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(code: str) -> None:
        (folder / "sitecustomize.py").write_text(SABOTAGE.format(code) if code else "")

    return write


@pytest.fixture
def undisturbed(
    model_folder: ModelFolder, dataset: Path, rank_cases: ModuleType, tmp_path: Path, no_plots: None
) -> Path:
    rank_cases.run(model_folder("qwen3"), tmp_path / "undisturbed", dataset, {"process": [rank_cases.linear()]})
    return tmp_path / "undisturbed"


@pytest.mark.parametrize("ranks_afterwards", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_that_dies(
    undisturbed: Path,
    sabotage: Sabotage,
    model_folder: ModelFolder,
    dataset: Path,
    rank_cases: ModuleType,
    content: Any,
    tmp_path: Path,
    ranks_afterwards: int,
) -> None:
    model, out, spec = model_folder("qwen3"), tmp_path / "out", {"process": [rank_cases.linear()]}
    sabotage("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EnvError, match=r"rank 1 is lost: its process was ended by SIGKILL.*run again with --resume"):
        rank_cases.run(model, out, dataset, spec, "cpu:0,1")
    assert not out.exists()
    assert not children()
    sabotage("")
    device = "cpu:" + ",".join(map(str, range(ranks_afterwards)))
    result = rank_cases.run(model, out, dataset, spec, device, resume=True)
    assert result.resumed_units == 2
    assert len(result.linears) == 21
    assert content(out) == content(undisturbed)


@pytest.mark.slow  # what it waits for depends on how busy the machine is
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "it has given no sign of life for 8 s"),
        ("time.sleep(1000)", "it hangs: no progress for 8 s, at "),
    ],
)
def test_a_rank_that_hangs(
    sabotage: Sabotage,
    model_folder: ModelFolder,
    dataset: Path,
    rank_cases: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    said: str,
) -> None:
    monkeypatch.setenv("SLIM_RANK_TIMEOUT", "8")
    sabotage(how)
    began = time.monotonic()
    with pytest.raises(EnvError, match=f"rank 1 is lost: {said}"):
        rank_cases.run(model_folder("qwen3"), tmp_path / "out", dataset, {"process": [rank_cases.linear()]}, "cpu:0,1")
    assert time.monotonic() - began < 120
    assert not (tmp_path / "out").exists()
    assert not children()


def test_a_rank_that_finds_an_error(
    sabotage: Sabotage, model_folder: ModelFolder, dataset: Path, rank_cases: ModuleType, tmp_path: Path
) -> None:
    """It is the same error as if one process had found it."""
    sabotage('raise InvalidModelError("holds NaN", where="a.weight", remedy="repair it")')
    with pytest.raises(InvalidModelError, match=r"a\.weight: holds NaN \(found by rank 1\) \(repair it\)"):
        rank_cases.run(model_folder("qwen3"), tmp_path / "out", dataset, {"process": [rank_cases.linear()]}, "cpu:0,1")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_never_comes(
    sabotage: Sabotage, model_folder: ModelFolder, dataset: Path, rank_cases: ModuleType, tmp_path: Path
) -> None:
    sabotage("pass\n\n    os._exit(7)\n\n    def unused():\n        pass")
    with pytest.raises(EnvError, match="rank 1 is lost: its process ended early, with status 7"):
        rank_cases.run(model_folder("qwen3"), tmp_path / "out", dataset, {"process": [rank_cases.linear()]}, "cpu:0,1")
    assert not (tmp_path / "out").exists()


def test_the_first_rank_dies(
    undisturbed: Path,
    sabotage: Sabotage,
    model_folder: ModelFolder,
    dataset: Path,
    rank_cases: ModuleType,
    content: Any,
    tmp_path: Path,
) -> None:
    """The others end too, and the run can be resumed."""
    model, out, spec = model_folder("qwen3"), tmp_path / "out", {"process": [rank_cases.linear()]}
    sabotage("time.sleep(1000)")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(rank_cases.__file__).parent)!r}); import rank_cases as cases\n"
        f"cases.run({str(model)!r}, {str(out)!r}, {str(dataset)!r}, {spec!r}, 'cpu:0,1')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    journal = tmp_path / ".out.slim-partial" / "journal.jsonl"
    try:
        wait_for(lambda: journal.exists() and "model.layers.0" in journal.read_text())
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, left = psutil.wait_procs(ranks, timeout=30)
    assert not left
    sabotage("")
    result = rank_cases.run(model, out, dataset, spec, "cpu:0,1", resume=True)
    assert result.resumed_units == 2
    assert content(out) == content(undisturbed)


def children() -> list[Any]:
    return [child for child in psutil.Process().children() if "rank_process" in " ".join(child.cmdline())]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.1)

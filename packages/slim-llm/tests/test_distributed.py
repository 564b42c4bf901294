"""Runs of several ranks: the same files as one process writes, whatever the processors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ModelFolder = Callable[..., Path]
OF_SEVERAL = ("gptq, quantized outputs handed on", "extra samples", "autoround", "flex_smooth_quant of experts")


@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, None), *(pytest.param(ranks, OF_SEVERAL, marks=pytest.mark.slow) for ranks in (3, 4))],
    ids=["two ranks", "three ranks", "four ranks"],
)
def test_ranks_write_what_one_process_writes(
    ranks: int,
    names: tuple[str, ...] | None,
    rank_cases: ModuleType,
    model_folder: ModelFolder,
    dataset: Path,
    content: Any,
    tmp_path: Path,
    no_plots: None,
) -> None:
    """Every processor. The ranks are started as ``torchrun`` starts them, once for all recipes."""
    chosen = {name: case for name, case in rank_cases.CASES.items() if names is None or name in names}
    models = {family: str(model_folder(family)) for family, _ in chosen.values()}
    (tmp_path / "one").mkdir()
    (tmp_path / "several").mkdir()
    given = {
        "models": models,
        "dataset": str(dataset),
        "outputs": str(tmp_path / "several"),
        "device": f"cpu:{','.join(map(str, range(ranks)))}",
        "ports": dict(zip(chosen, free_ports(len(chosen)), strict=True)),
    }
    (tmp_path / "plan.json").write_text(json.dumps(given))
    started = [start(rank_cases.__file__, tmp_path / "plan.json", rank, ranks) for rank in range(ranks)]
    linears = {
        name: [r.name for r in rank_cases.run(models[family], tmp_path / "one" / name, dataset, spec).linears]
        for name, (family, spec) in chosen.items()
    }
    assert [process.wait(600) for process in started] == [0] * ranks
    for name in chosen:
        told = json.loads((tmp_path / "several" / f"{name}.json").read_text())
        assert told == {"ranks": ranks, "linears": linears[name]}, name
        assert content(tmp_path / "several" / name) == content(tmp_path / "one" / name), name


def start(script: Any, plan: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, str(script), str(plan)], env=os.environ | own | paths)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_ranks_that_slim_starts_itself(
    rank_cases: ModuleType, model_folder: ModelFolder, dataset: Path, content: Any, tmp_path: Path, no_plots: None
) -> None:
    family, spec = rank_cases.CASES["gptq"]
    one = rank_cases.run(model_folder(family), tmp_path / "one", dataset, spec)
    two = rank_cases.run(model_folder(family), tmp_path / "two", dataset, spec, "cpu:0,1", debug=True)
    assert len(two.rank_peak_bytes) == 2
    assert (one.samples, one.block_forwards) == (two.samples, two.block_forwards)
    assert [record.name for record in one.linears] == [record.name for record in two.linears]
    assert [unit.name for unit in one.units] == [unit.name for unit in two.units]
    found = content(tmp_path / "two")
    assert {name: found[name] for name in content(tmp_path / "one")} == content(tmp_path / "one")
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["runner"] == "dp_layer_wise"
    assert len(report["rank_peak_memory"]) == 2

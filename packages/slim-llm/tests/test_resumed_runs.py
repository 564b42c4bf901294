"""Runs that go on from the activations that an interrupted one has kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from slim_core.runners import boundaries
from slim_core.runners.boundaries import FOLDER
from slim_core.runners.ledger import Ledger
from slim_core.runners.run import RunResult

ModelFolder = Callable[..., Path]
Runs = Callable[..., RunResult]
Interrupted = Callable[[Path], Path]
Ending = Callable[[str], AbstractContextManager[None]]


pytestmark = pytest.mark.usefixtures("all_kept")


@pytest.fixture
def run_case(rank_cases: ModuleType, model_folder: ModelFolder, dataset: Path, no_plots: None) -> Runs:
    """``run_case(name, save_path, device, family=...)``: a run of one of the cases that ranks are tried with."""

    def run(name: str, out: Path, device: str = "cpu", *, family: str = "", **request: Any) -> RunResult:
        own, spec = rank_cases.CASES[name]
        return rank_cases.run(model_folder(family or own), out, dataset, spec, device, **request)

    return run


def test_finished_blocks_are_not_run_again_whatever_the_processors(
    rank_cases: ModuleType, run_case: Runs, content: Any, ending_at: Ending, tmp_path: Path
) -> None:
    for name in rank_cases.CASES:
        whole, out = tmp_path / name / "whole", tmp_path / name / "out"
        wanted = run_case(name, whole)
        blocks = [unit.name for unit in wanted.units if ".layers." in unit.name]
        with ending_at(blocks[-1]):
            run_case(name, out)
        result = run_case(name, out, resume=True)
        assert content(out) == content(whole), name
        assert [unit.name for unit in result.units] == [unit.name for unit in wanted.units], name
        assert len(blocks) * result.block_forwards == wanted.block_forwards, name
        assert result.samples == wanted.samples, name


@pytest.fixture
def static(run_case: Runs) -> Runs:
    """``static(save_path)``: a run that hands quantized outputs on."""
    return partial(run_case, "static, quantized outputs handed on", family="qwen3")


@pytest.fixture
def interrupted(static: Runs, ending_at: Ending) -> Interrupted:
    """``interrupted(save_path)``: a run that died in its last block; the folder of what it has kept."""

    def run(out: Path) -> Path:
        with ending_at("model.layers.2"):
            static(out)
        return out.parent / f".{out.name}.slim-partial" / FOLDER

    return run


def test_no_more_is_kept_than_a_unit_needs(static: Runs, content: Any, tmp_path: Path) -> None:
    seen: list[set[str]] = []
    note = Ledger.note

    def looking(self: Ledger, unit: str, given: Any) -> None:
        note(self, unit, given)
        self._writer.flush()
        if (folder := tmp_path / ".out.slim-partial" / FOLDER).exists():
            seen.append({path.name for path in folder.iterdir()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "note", looking)
        static(tmp_path / "out")
    assert seen == [{"0"}, {"0", "1"}, {"0", "1"}, {"0", "1"}]  # the last block hands nothing on
    assert not (tmp_path / "out" / FOLDER).exists()


def test_a_run_whose_blocks_are_all_finished_runs_none(
    static: Runs, ending_at: Ending, content: Any, tmp_path: Path
) -> None:
    whole = static(tmp_path / "whole")
    with ending_at("epilogue"):
        static(tmp_path / "out")
    assert static(tmp_path / "out", resume=True).block_forwards == 0
    assert whole.block_forwards
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def truncate(folder: Path) -> None:
    path = next(folder.glob("1/0.0.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def change(folder: Path) -> None:
    """As if the power had failed: the file is there, its bytes are not."""
    path = next(folder.glob("1/3.0.safetensors"))
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)


def flip(folder: Path) -> None:
    path = next(folder.glob("1/2.0.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "a file is cut off": truncate,
    "numbers are others": change,
    "a bit is another": flip,
    "a file is gone": lambda folder: next(folder.glob("1/0.0.safetensors")).unlink(),
    "a note is cut off": lambda folder: (folder / "1" / "rank-0-of-1.json").write_text('{"needed": [1'),
    "a note is something else": lambda folder: (folder / "1" / "rank-0-of-1.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_used(
    static: Runs, interrupted: Interrupted, content: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = static(tmp_path / "whole")
    DAMAGES[damage](interrupted(tmp_path / "out"))
    result = static(tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert result.block_forwards >= 2 * whole.block_forwards // 3
    if "note" not in damage:
        assert "finished blocks are run once more, since their activations are of no use" in caplog.text


def test_an_older_boundary_is_taken_where_the_last_is_gone(
    static: Runs, interrupted: Interrupted, content: Any, tmp_path: Path
) -> None:
    whole = static(tmp_path / "whole")
    shutil.rmtree(interrupted(tmp_path / "out") / "1")
    result = static(tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert result.block_forwards == 2 * whole.block_forwards // 3


def test_a_disk_without_room_for_them_does_not_end_the_run(
    static: Runs, interrupted: Interrupted, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = static(tmp_path / "whole")
    save, calls = boundaries._write, iter(range(1000))

    def full(path: Path, tensors: Any) -> None:
        if next(calls) > 3:
            raise OSError(28, "No space left on device", str(path))
        save(path, tensors)

    monkeypatch.setattr(boundaries, "_write", full)
    folder = interrupted(tmp_path / "out")
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(boundaries, "_write", save)
    assert static(tmp_path / "out", resume=True).block_forwards > whole.block_forwards // 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_they_are_kept_less_often_if_they_cost_too_much(
    static: Runs, interrupted: Interrupted, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static(tmp_path / "whole")
    monkeypatch.setattr(boundaries, "_SHARE", 0.0)
    folder = interrupted(tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["0"]  # what it costs is not known before the first
    static(tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [("cpu:0,1", "cpu"), ("cpu", "cpu:0,1")])
def test_another_number_of_ranks_goes_on_from_them(
    static: Runs, ending_at: Ending, content: Any, tmp_path: Path, before: str, after: str
) -> None:
    """The first rank decides what is kept, and only it is patched here."""
    whole = static(tmp_path / "whole")
    with ending_at("model.layers.2"):
        static(tmp_path / "out", device=before)
    result = static(tmp_path / "out", device=after, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert 3 * result.block_forwards == whole.block_forwards


def test_ranks_that_run_all_samples_go_on_from_what_the_first_has_kept(
    run_case: Runs, content: Any, ending_at: Ending, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_case("autoround", whole)
    with ending_at("model.layers.2"):
        run_case("autoround", out, "cpu:0,1")
    assert {path.name for path in out.parent.glob(f".out.slim-partial/{FOLDER}/*/*.json")} == {"rank-0-of-1.json"}
    run_case("autoround", out, resume=True)
    assert content(out) == content(whole)


def test_extra_samples_that_nobody_needs_any_more_do_not_stand_in_the_way(
    run_case: Runs, content: Any, ending_at: Ending, tmp_path: Path
) -> None:
    """They are let go after the last block of experts; the one behind it is dense."""
    run = partial(run_case, "extra samples", family="qwen3_moe_16_first")
    whole = run(tmp_path / "whole")
    assert whole.extra_samples
    with ending_at("model.layers.2"):
        run(tmp_path / "out")
    result = run(tmp_path / "out", resume=True)
    assert result.block_forwards == whole.samples
    assert content(tmp_path / "out") == content(tmp_path / "whole")

"""The fingerprint changes with everything that decides the output, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slim_core import fingerprint as module
from slim_core.checkpoint.fp8_blocks import Fp8BlockSource
from slim_core.checkpoint.reader import Checkpoint
from slim_core.fingerprint import fingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    for file in tmp_path.iterdir():
        os.utime(file, ns=(10**18, 10**18))
    return tmp_path


def take(model: Path, recipe: str = "recipe", extra: tuple[Any, ...] = ()) -> str:
    return fingerprint(model, Checkpoint(model), recipe, extra)


def rewrite(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        save_file(tensors, model / "model.safetensors")
        os.utime(model / "model.safetensors", ns=(10**18, 10**18))

    return change


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a tensor's name": rewrite({"a": torch.ones(2, 3), "c": torch.ones(4)}),
    "a tensor's shape": rewrite({"a": torch.ones(3, 2), "b": torch.ones(4)}),
    "a tensor's type": rewrite({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int32)}),
    "one tensor less": rewrite({"a": torch.ones(2, 3)}),
    "time of the weights": lambda m: os.utime(m / "model.safetensors", ns=(10**18, 10**18 + 1)),
    "time of a side file": lambda m: os.utime(m / "config.json", ns=(10**18, 10**18 + 1)),
    "a file more": lambda m: (m / "tokenizer.json").write_text(""),
    "a file less": lambda m: (m / "config.json").unlink(),
    "a file's name": lambda m: (m / "config.json").rename(m / "config2.json"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_it(model: Path, change: Callable[[Path], Any]) -> None:
    before = take(model)
    change(model)
    assert take(model) != before


def test_a_file_of_another_size_and_the_same_time(model: Path) -> None:
    before = take(model)
    (model / "config.json").write_text("{ }")
    os.utime(model / "config.json", ns=(10**18, 10**18))
    assert take(model) != before


def test_recipe_data_and_version_count(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = {
        take(model),
        take(model, "recipe "),
        take(model, extra=([[1, 2]],)),
        take(model, extra=([[1], [2]],)),
        take(model, extra=([[1, 2]], "cpu")),
        take(model, extra=(Path("x"),)),
        take(model, extra=({"a", "b"},)),
        take(model, extra=({"a", "c"},)),
    }
    monkeypatch.setattr(module, "version", lambda _package: "9.9")
    prints.add(take(model))
    assert len(prints) == 9


def test_the_way_the_source_reads_counts(tmp_path: Path) -> None:
    save_file(
        {"w": torch.ones(2, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)}, tmp_path / "m.safetensors"
    )
    plain = Checkpoint(tmp_path)
    assert fingerprint(tmp_path, plain, "r") != fingerprint(tmp_path, Fp8BlockSource(plain), "r")


def test_what_does_not_change_it(model: Path) -> None:
    before = take(model)
    (model / "folder" / "x").write_text("")
    (model / "dangling").symlink_to("nowhere")
    model.touch()
    assert take(model) == before
    assert take(model, extra=({"a", "b", "c"},)) == take(model, extra=({"c", "b", "a"},))
    assert len(before) == 64


def test_it_is_the_same_in_every_process(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slim_core.checkpoint.reader import Checkpoint\n"
        "from slim_core.fingerprint import fingerprint\n"
        "m = Path(sys.argv[1]); print(fingerprint(m, Checkpoint(m), 'recipe', [set('abcdefgh')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert done.stdout.strip() == take(model, extra=(set("abcdefgh"),))

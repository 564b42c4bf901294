"""Runs of vision-language models: what they warn of, what goes wrong on the way, interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slim_core.devices import Devices

DATASET = "202 InvalidDatasetError"
VISION, TEXT = "model.visual", "model.language_model.layers"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def warnings_of(found) -> list[str]:
    return [line.partition(" WARNING ")[2] for line in found.stderr.splitlines() if " WARNING " in line]


def notes_of(found) -> list[str]:
    """The warnings of a plan."""
    assert found.exit_code == 0, found.output
    return [line.removeprefix("    - ") for line in found.stdout.splitlines() if line.startswith("    - ")]


def test_several_devices(workplace) -> None:
    workplace.patch.setattr("slim_core.devices._available", lambda kind: 3)
    workplace.patch.setattr(Devices, "first", property(lambda self: torch.device("cpu")))  # of which memory is asked
    workplace.options["device"] = "npu:1,0"
    found = workplace.run("--dry-run")
    assert notes_of(found) == []
    assert "runner     dp_layer_wise: 2 devices are given" in found.stdout
    assert "device     npu:1,0, 2 ranks" in found.stdout


def test_another_runner(workplace) -> None:
    workplace.edit("  process:", "  runner: dp_layer_wise\n  process:")
    found = workplace.run("--dry-run")
    only = "'dp_layer_wise' becomes 'layer_wise', the only one for vision-language models"
    assert notes_of(found) == [f"{workplace.recipe}:3: spec.runner: {only}"]
    assert "runner     layer_wise: " in found.stdout


def test_empty_texts_get_the_prompt_of_the_recipe(workplace) -> None:
    workplace.list_records(
        {"image": "a.png", "text": "?"},
        {"image": "more/b.jpg", "text": "?"},
        {"image": "a.png", "text": ""},
        {"image": "a.png"},
    )
    found = workplace.run("--dry-run")
    assert found.exit_code == 0, found.output
    [warning] = warnings_of(found)
    assert warning.startswith("2 of the 4 samples of ")
    assert warning.endswith(f"get the default prompt, 'What is this?'; the first is {workplace.dataset}:3")


def test_a_refusal_in_the_background(workplace, refused) -> None:
    """Samples are made by a thread while the model is at work; its errors are told like any other."""
    workplace.refuse_prompts_with("这")
    workplace.fill_save()
    what = "the model's processor raises TemplateError: no"
    refused(DATASET, what, "{dataset}:2", "change the picture or the prompt", "--overwrite", resumable=True)


def test_a_picture_that_breaks_during_the_run(workplace) -> None:
    """It was whole when the run began."""
    from slim_vlm.preparation import Preparation

    inputs, made = Preparation.inputs, []

    def breaking(self, sample):
        made.append(sample)
        if len(made) == 3:
            (workplace.pictures / "more" / "b.jpg").write_bytes(b"")
        return inputs(self, sample)

    workplace.patch.setattr(Preparation, "inputs", breaking)
    found = workplace.run()
    assert found.exit_code == 1
    assert f"error 202 InvalidDatasetError: {workplace.dataset}:2: the image" in found.stderr
    assert "b.jpg' is empty (replace the file)" in found.stderr
    assert not workplace.save.exists()


@pytest.mark.parametrize("unit", [VISION, f"{TEXT}.0", f"{TEXT}.2"])
def test_an_interrupted_run_is_resumed(workplace, unit: str) -> None:
    """Ctrl-C after a unit; with --resume the end is that of an undisturbed run, bit for bit."""
    from slim_core.processors.linear_quant import LinearQuant

    assert workplace.run().exit_code == 0
    whole = written(workplace.save)
    process = LinearQuant.process

    def interrupted(self, work) -> None:
        process(self, work)
        if work.name == unit:
            raise KeyboardInterrupt

    with workplace.patch.context() as patch:
        patch.setattr(LinearQuant, "process", interrupted)
        found = workplace.run("--overwrite")
    assert found.exit_code == 130, found.output
    assert written(workplace.save) == whole
    again = workplace.run("--overwrite", "--resume")
    assert again.exit_code == 0, again.output
    assert "units taken over from the interrupted run" in again.stdout
    assert written(workplace.save) == whole
    assert not (workplace.folder / ".out.slim-partial").exists()


KILLED = """
import os, signal, sys
from slim_core.processors.linear_quant import LinearQuant
from slim_vlm.__main__ import main

process = LinearQuant.process

def killed(self, work):
    process(self, work)
    if work.name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)

LinearQuant.process = killed
main(sys.argv[2:])
"""


def test_a_killed_run_is_resumed(workplace) -> None:
    """A process that is gone from one moment to the next, in the last block."""
    assert workplace.run().exit_code == 0
    whole = written(workplace.save)
    shutil.rmtree(workplace.save)
    command = [sys.executable, "-c", KILLED, f"{TEXT}.2", "quant", *given(workplace)]
    killed = subprocess.run(command, capture_output=True, env=ONE_THREAD, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not workplace.save.exists()
    again = workplace.run("--resume")
    assert again.exit_code == 0, again.output
    assert "units taken over from the interrupted run" in again.stdout
    assert written(workplace.save) == whole


def given(w) -> list[str]:
    """The options of the command."""
    return [part for name, value in w.options.items() for part in (f"--{name}", value)]


def written(folder: Path) -> dict[str, bytes]:
    """The files that engines read; reports tell of times."""
    skipped = ("report.html", "report.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in skipped}


def test_a_signal_ends_the_run(workplace) -> None:
    """Ctrl-C while pictures are decoded in the background; the process does not wait for all of them."""
    workplace.list_records(*({"image": "a.png", "text": f"What is in picture {i}?"} for i in range(400)))
    run = subprocess.Popen(
        [sys.executable, "-m", "slim_vlm", "quant", *given(workplace)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    assert run.stderr is not None
    for line in run.stderr:
        if "Quantizing" in line:
            break
    run.send_signal(signal.SIGINT)
    rest = run.communicate(timeout=60)[1]
    assert run.returncode == 130, rest
    assert rest.splitlines()[-1] == "interrupted"
    assert "Traceback" not in rest
    assert not workplace.save.exists()


def test_nothing_is_broken_to_begin_with(workplace) -> None:
    """Without a fault the same command succeeds, and replaces an older output."""
    workplace.fill_save()
    found = workplace.run("--overwrite")
    assert found.exit_code == 0, found.output
    assert warnings_of(found) == []
    assert not (workplace.save / "mine.txt").exists()
    kinds = json.loads((workplace.save / "quant_model_description.json").read_text())
    assert kinds[f"{VISION}.blocks.1.attn.qkv.weight"] == kinds[f"{TEXT}.2.mlp.down_proj.weight"] == "W8A8"

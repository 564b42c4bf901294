"""Captured inputs that are not what they should be, captures that fail on the way, and places that cannot be used."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ENVIRONMENT, DATASET, SECURITY = "100 EnvError", "202 InvalidDatasetError", "204 SecurityError"
ANEW = "delete the file, so that the next run captures anew"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Command:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> object:
        return os.system, ("touch pwned",)


def record(**changes: Any) -> list[Any]:
    """One call of the tiny transformer."""
    arguments: dict[str, Any] = {
        "hidden_states": torch.ones(1, 16, 2, 8, 8),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.ones(1, 6, 32),
        "encoder_hidden_states_image": None,
        "return_dict": False,
        "attention_kwargs": None,
    }
    return list((arguments | changes).values())


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def bare(value: object) -> Callable[[Path], None]:
    """A pickle that is in no archive, as Python writes it."""
    return lambda path: path.write_bytes(pickle.dumps(value)) and None


def bomb(path: Path) -> None:
    """A small archive of a large pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"0" * (64 << 20))
        archive.writestr("x/version", "3")


# A captured file, and what is said of it.
FILES: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "a command": (
        saved([[Command()]]),
        SECURITY,
        "the file wants posix.system to be run when it is read; it was not",
        ANEW,
    ),
    "a command in a bare pickle": (bare([[Command()]]), SECURITY, "a bare pickle, which can run code", ANEW),
    "an archive that is a bomb": (bomb, DATASET, "entries are compressed", ANEW),
    "an empty file": (raw(b""), DATASET, "is damaged or was not written by torch.save", ANEW),
    "a text": (raw(b"no tensors"), DATASET, "is damaged or was not written by torch.save", ANEW),
    "a dict": (saved({"a": torch.ones(2)}), DATASET, "it holds dict where a list of records belongs", ANEW),
    "no record": (saved([]), DATASET, "it holds no record", ANEW),
    "too few arguments": (
        saved([[torch.ones(2)]]),
        DATASET,
        "record 0 has 1 arguments, and the transformer's forward takes 6: hidden_states, timestep",
        "captured from another transformer or version of diffusers",
    ),
    "other channels": (
        saved([record(), record(hidden_states=torch.ones(1, 3, 2, 8, 8))]),
        DATASET,
        "record 1: hidden_states is a tensor of shape [1, 3, 2, 8, 8], and the transformer takes 16 channels",
        "it was captured from another model",
    ),
    "text of another width": (
        saved([record(encoder_hidden_states=torch.ones(1, 6, 24))]),
        DATASET,
        "record 0: encoder_hidden_states | [1, 6, 24]",
        "it was captured from another model",
    ),
}


@pytest.mark.parametrize(("write", "kind", "what", "remedy"), FILES.values(), ids=FILES)
def test_files(workplace, refused, write: Callable[[Path], None], kind, what, remedy) -> None:
    """One that lies in save_path is never replaced, and nothing in it is run."""
    workplace.save.mkdir()
    write(workplace.capture)
    refused(kind, what, "{save}/calib_data.pth", remedy)
    assert not (workplace.folder / "pwned").exists()


def test_bad_numbers(workplace, refused) -> None:
    workplace.save.mkdir()
    torch.save([record(), record(timestep=torch.tensor([float("nan")]))], workplace.capture)
    what = "record 1, argument timestep: a calibration input has NaN"
    refused(DATASET, what, "{save}/calib_data.pth", ANEW, resumable=True)


def test_a_folder_of_that_name(workplace, refused) -> None:
    workplace.capture.mkdir(parents=True)
    refused(DATASET, "is not a regular file", "{save}/calib_data.pth", "move it away")


def test_files_of_others_are_read_without_their_sidecar(workplace) -> None:
    """As other tools write them: no sidecar, and nothing but the records is checked."""
    path = workplace.dump_elsewhere()
    path.parent.mkdir()
    torch.save([record(hidden_states=torch.randn(1, 16, 2, 8, 8, generator=torch.Generator()))], path)
    before = path.read_bytes()
    found = workplace.run()
    assert found.exit_code == 0, found.output
    assert "calibrating on 1 calls" in found.stderr
    assert (path.read_bytes(), list(path.parent.iterdir())) == (before, [path])
    assert not (workplace.save / "calib_data.pth").exists()


# What happens after a run, and what the next one says of what the first captured.
CHANGES: dict[str, tuple[Callable[[Any], object], str, str, str]] = {
    "another prompt": (
        lambda w: w.say(prompt="two cats"),
        "of another capture: prompt was 'a red fox in the snow' and is 'two cats'",
        "{save}/calib_data.pth",
        "pass --reuse_calib to use it as it is, or delete it",
    ),
    "more steps": (
        lambda w: w.say(sample_steps=3),
        "of another capture: num_inference_steps was 2 and is 3",
        "{save}/calib_data.pth",
        "pass --reuse_calib",
    ),
    "other weights": (
        lambda w: w.change(lambda tensors: tensors["blocks.0.attn1.to_q.weight"].mul_(2)),
        "of another capture: the model is another one or has changed",
        "{save}/calib_data.pth",
        "pass --reuse_calib",
    ),
    "a broken sidecar": (
        lambda w: (w.save / "calib_data.json").write_text("{"),
        "is damaged, so it does not say what calib_data.pth was captured from",
        "{save}/calib_data.json",
        "pass --reuse_calib",
    ),
}


@pytest.mark.parametrize(("change", "what", "where", "remedy"), CHANGES.values(), ids=CHANGES)
def test_a_capture_of_something_else_is_used_only_if_asked(workplace, refused, change, what, where, remedy) -> None:
    assert workplace.run().exit_code == 0
    change(workplace)
    refused(DATASET, what, where, remedy, "--overwrite")
    captured = workplace.capture.read_bytes()
    found = workplace.run("--overwrite", "--reuse_calib")
    assert found.exit_code == 0, found.output
    assert "capturing" not in found.stderr
    assert workplace.capture.read_bytes() == captured


def test_a_truncated_capture(workplace, refused) -> None:
    assert workplace.run().exit_code == 0
    workplace.capture.write_bytes(workplace.capture.read_bytes()[:-5000])
    what = "is damaged or was not written by torch.save"
    for flags in ((), ("--reuse_calib",)):
        refused(DATASET, what, "{save}/calib_data.pth", ANEW, "--overwrite", *flags)


def test_what_was_captured_is_captured_once(workplace) -> None:
    """The second run reads the file that the first one wrote, and ends with the same bytes."""
    first = workplace.run()
    assert first.exit_code == 0, first.output
    assert first.stderr.count("capturing calibration inputs") == 1
    files = {path.name: path.read_bytes() for path in workplace.save.iterdir() if not path.name.startswith("report")}
    second = workplace.run("--overwrite")
    assert second.exit_code == 0, second.output
    assert "capturing" not in second.stderr
    assert files == {
        path.name: path.read_bytes() for path in workplace.save.iterdir() if not path.name.startswith("report")
    }
    assert {path.stat().st_mode & 0o777 for path in workplace.save.iterdir()} <= {0o600, 0o640}


def test_a_recipe_without_data_captures_nothing(workplace) -> None:
    workplace.need_no_data()
    found = workplace.run()
    assert found.exit_code == 0, found.output
    assert "no calibration data needed" in found.stdout
    assert "capturing" not in found.stderr
    assert not workplace.capture.exists()


def test_a_full_disk_during_the_capture(workplace, refused) -> None:
    """The disk fills up after some of the inputs were written."""
    from slim_sd.captured.files import RecordWriter

    workplace.fill_save()
    write, calls = RecordWriter.add, []

    def full(self, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        if len(calls) == 3:
            with self._errors():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *arguments, **options)

    workplace.patch.setattr(RecordWriter, "add", full)
    refused(
        ENVIRONMENT,
        "calibration inputs cannot be written: No space left on device",
        "{folder}/.out.slim-calib/calib_data.pth",
        "set dump_data_dir to a folder on another disk",
        "--overwrite",
    )
    assert len(calls) == 3


KILLED = """
import os, signal, sys
from slim_sd.captured.files import RecordWriter
from slim_sd.__main__ import main

write, calls = RecordWriter.add, []

def killed(self, *arguments, **options):
    made = write(self, *arguments, **options)
    calls.append(self)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return made

RecordWriter.add = killed
main(sys.argv[1:])
"""


def test_a_killed_capture_is_made_again(workplace) -> None:
    """Nothing that it left counts as captured, and the next run ends with the bytes of an undisturbed one."""
    assert workplace.run().exit_code == 0
    names = ("calib_data.pth", "quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json")
    whole = {name: (workplace.save / name).read_bytes() for name in names}
    shutil.rmtree(workplace.save)
    command = [sys.executable, "-c", KILLED, "quant", *given(workplace)]
    killed = subprocess.run(command, capture_output=True, env=ONE_THREAD, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not workplace.save.exists()
    left = [path for path in workplace.folder.rglob("*") if path.is_file() and path.name == "calib_data.pth"]
    assert left == []
    again = workplace.run()
    assert again.exit_code == 0, again.output
    assert "capturing calibration inputs" in again.stderr
    assert {name: (workplace.save / name).read_bytes() for name in names} == whole
    assert not (workplace.folder / ".out.slim-calib").exists()


def test_a_run_that_fails_after_the_capture_keeps_it(workplace, refused) -> None:
    """What took hours is not taken anew."""
    from slim_core.processors.linear_quant import LinearQuant

    process = LinearQuant.process

    def interrupted(self, work) -> None:
        process(self, work)
        if work.name == "blocks.0":
            raise KeyboardInterrupt

    with workplace.patch.context() as patch:
        patch.setattr(LinearQuant, "process", interrupted)
        found = workplace.run()
    assert found.exit_code == 130, found.output
    assert not workplace.save.exists()
    assert (workplace.folder / ".out.slim-calib" / "calib_data.pth").is_file()
    again = workplace.run("--resume")
    assert again.exit_code == 0, again.output
    assert "capturing" not in again.stderr
    assert "units taken over from the interrupted run" in again.stdout
    assert workplace.capture.is_file()
    assert not (workplace.folder / ".out.slim-calib").exists()


def given(w) -> list[str]:
    """The options of the command."""
    return [part for name, value in w.options.items() for part in (f"--{name}", value)]


def blocked(w) -> None:
    w.dump_elsewhere()
    (w.folder / "captured").write_text("in the way")


PLACES: dict[str, tuple[Callable[[Any], object], str, str, str, str]] = {
    "save_path is a file": (
        lambda w: w.save.write_text("x"),
        SECURITY,
        "save_path is a file",
        "{save}",
        "choose a folder",
    ),
    "save_path in the model": (
        lambda w: w.options.update(save_path=str(w.model / "transformer" / "out")),
        SECURITY,
        "save_path and model_path overlap",
        "{model}/transformer/out",
        "choose a folder outside the model",
    ),
    "save_path is the model": (
        lambda w: w.options.update(save_path=str(w.model)),
        SECURITY,
        "save_path and model_path overlap",
        "{model}",
        "choose a folder outside the model",
    ),
    "save_path with other files": (
        lambda w: w.fill_save(),
        SECURITY,
        "save_path exists and is not empty",
        "{save}",
        "pass --overwrite",
    ),
    "dump_data_dir is a file": (
        blocked,
        ENVIRONMENT,
        "calibration inputs cannot be written: File exists",
        "captured/calib_data.pth",
        "set dump_data_dir to",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), PLACES.values(), ids=PLACES)
def test_places(workplace, refused, fault, kind, what, where, remedy) -> None:
    fault(workplace)
    refused(kind, what, where, remedy)


def test_one_capture_of_two_is_not_enough(workplace) -> None:
    """Of two experts both are captured, even if the file of one is there."""
    workplace.become("wan2_2_t2v")
    workplace.say(sample_steps=3)
    assert workplace.run().exit_code == 0
    low, high = (workplace.save / f"calib_data_{name}_noise_model.pth" for name in ("low", "high"))
    before = low.read_bytes(), high.read_bytes()
    low.unlink()
    found = workplace.run("--overwrite")
    assert found.exit_code == 0, found.output
    assert "capturing calibration inputs" in found.stderr
    assert (low.read_bytes(), high.read_bytes()) == before


def test_an_expert_that_no_step_reaches(workplace, refused) -> None:
    workplace.become("wan2_2_t2v")
    workplace.fill_save()
    what = "the pipeline never called this transformer"
    refused(DATASET, what, "WanTransformer3DModel", "raise sample_steps", "--overwrite")


def test_nothing_is_broken_to_begin_with(workplace) -> None:
    """Without a fault the same command succeeds, and replaces an older output."""
    workplace.fill_save()
    found = workplace.run("--overwrite")
    assert found.exit_code == 0, found.output
    assert " WARNING " not in found.stderr
    assert not (workplace.save / "mine.txt").exists()
    kinds = json.loads((workplace.save / "quant_model_description_w8a8.json").read_text())
    assert (kinds["blocks.1.ffn.0.weight"], kinds["blocks.1.ffn.2.weight"]) == ("W8A8", "FLOAT")

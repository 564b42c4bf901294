"""Faults of what is around the files: where the output goes, the device, the options, the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENT, VARIABLE = "100 EnvError", "102 EnvVarError"
SCHEMA, SECURITY, UNSUPPORTED = "203 SchemaValidateError", "204 SecurityError", "301 UnsupportedError"


def option(**options: str | None) -> Callable[..., None]:
    """Give or take out options of the command; values may name places of the workplace."""
    return lambda w: w.options.update({name: value and w.fill(value) for name, value in options.items()})


def save_is_a_link_to_itself(w) -> None:
    w.save.symlink_to(w.save)


def working_folder_inside(w) -> None:
    (w.save / "below").mkdir(parents=True)
    w.patch.chdir(w.save / "below")


def home_inside(w) -> None:
    (w.save / "me").mkdir(parents=True)
    w.patch.setenv("HOME", str(w.save / "me"))


def mount_point(w) -> None:
    w.save.mkdir()
    ismount = os.path.ismount
    w.patch.setattr(os.path, "ismount", lambda path: Path(path) == w.save or ismount(path))


def another_run(w) -> None:
    staging = w.folder / ".out.slim-partial"
    staging.mkdir()
    held = os.open(staging, os.O_RDONLY)
    w.cleanup.callback(os.close, held)
    fcntl.flock(held, fcntl.LOCK_EX)


def other_journal(w) -> None:
    staging = w.folder / ".out.slim-partial"
    staging.mkdir()
    (staging / "journal.jsonl").write_text('{"fingerprint": "of another run", "replaces": false}\n')


def damaged_journal(w) -> None:
    staging = w.folder / ".out.slim-partial"
    staging.mkdir()
    (staging / "journal.jsonl").write_text("")


def devices(**counts: int) -> Callable[..., None]:
    return lambda w: w.patch.setattr("slim_core.devices._available", lambda kind: counts.get(kind, int(kind == "cpu")))


def both(*faults: Callable[..., object]) -> Callable[..., None]:
    def do(w) -> None:
        for fault in faults:
            fault(w)

    return do


PLACES = {
    "not empty": (lambda w: w.fill_save(), (), SECURITY, "exists and is not empty", "{save}", "pass --overwrite"),
    "not empty, dashes": (
        both(lambda w: w.fill_save(), option(save_path="{save}/../out/")),
        (),
        SECURITY,
        "exists and is not empty",
        "out",
        "pass --overwrite",
    ),
    "a file": (lambda w: w.save.write_text("x") and None, (), SECURITY, "is a file", "{save}", "choose a folder"),
    "a file, overwrite": (
        lambda w: w.save.write_text("x") and None,
        ("--overwrite",),
        SECURITY,
        "is a file",
        "{save}",
        "choose a folder",
    ),
    "the model": (option(save_path="{model}"), ("--overwrite",), SECURITY, "overlap", "{model}", "outside the model"),
    "inside the model": (option(save_path="{model}/out"), (), SECURITY, "overlap", "{model}/out", "outside the model"),
    "around the model": (option(save_path="{folder}"), ("--overwrite",), SECURITY, "overlap", "{folder}", "outside"),
    "a link to the model": (
        lambda w: w.save.symlink_to(w.model),
        ("--overwrite",),
        SECURITY,
        "overlap",
        "{save}",
        "outside the model",
    ),
    "a loop of links": (save_is_a_link_to_itself, (), SECURITY, "loop of symbolic links", "{save}", "choose"),
    "a mount point": (mount_point, (), SECURITY, "is a mount point", "{save}", "choose a folder inside it"),
    "below a file": (
        option(save_path="{dataset}/deeper/out"),
        (),
        ENVIRONMENT,
        "Not a directory",
        "{dataset}",
        "choose",
    ),
    "name too long": (option(save_path="{folder}/" + "x" * 300), (), ENVIRONMENT, "File name too long", "x", "choose"),
    "hidden name too long": (
        option(save_path="{folder}/" + "x" * 250),
        (),
        ENVIRONMENT,
        "File name too long",
        "{folder}",
        "choose",
    ),
    "around the working folder": (
        working_folder_inside,
        ("--overwrite",),
        SECURITY,
        "is never replaced",
        "{save}",
        "choose another folder",
    ),
    "around the home folder": (
        home_inside,
        ("--overwrite",),
        SECURITY,
        "is never replaced",
        "{save}",
        "choose another folder",
    ),
    "in use": (another_run, (), ENVIRONMENT, "another run is writing", ".out.slim-partial", "wait"),
    "nothing to resume": (
        lambda w: None,
        ("--resume",),
        UNSUPPORTED,
        "no interrupted run to resume",
        "{folder}/.out.slim-partial",
        "run without --resume",
    ),
    "journal of another run": (
        other_journal,
        ("--resume",),
        UNSUPPORTED,
        "had another recipe, model, data set or version",
        "{folder}/.out.slim-partial",
        "run without --resume",
    ),
    "empty journal": (
        damaged_journal,
        ("--resume",),
        UNSUPPORTED,
        "no interrupted run to resume",
        "{folder}/.out.slim-partial",
        "run without --resume",
    ),
}

ASKED = {
    "npu": (
        both(devices(), option(device="npu")),
        (),
        ENVIRONMENT,
        "there is no npu device",
        "--device",
        "pass --device cpu",
    ),
    "cuda": (
        both(devices(), option(device="cuda:7")),
        (),
        ENVIRONMENT,
        "there is no cuda device",
        "--device",
        "pass --device cpu",
    ),
    "index too high": (
        both(devices(cuda=2), option(device="cuda:7")),
        (),
        SCHEMA,
        "cuda:7 does not exist, this machine has 2",
        "--device",
        "from 0 to 1",
    ),
    "tpu": (option(device="tpu"), (), SCHEMA, "unknown device 'tpu'", "--device", "use one of npu, cuda, cpu"),
    "no number": (option(device="npu:a"), (), SCHEMA, "must be numbers", "--device", "write npu:0"),
    "index twice": (option(device="npu:0,0"), (), SCHEMA, "is repeated", "--device", "each index once"),
    "recipe and type": (
        option(quant_type="w8a8"),
        (),
        SCHEMA,
        "exclude each other",
        "--config_path",
        "not both",
    ),
    "unknown type": (
        option(config_path=None, quant_type="w8a9"),
        ("--yes",),
        SCHEMA,
        "got 'w8a9'",
        "quant_type",
        "did you mean 'w8a8'",
    ),
    "type that no practice has": (
        option(config_path=None, quant_type="w4a4"),
        (),
        UNSUPPORTED,
        "a question needs an answer | w4a4",
        "random",
        "pass --yes",
    ),
    "question": (
        option(config_path=None, quant_type="w8a8"),
        (),
        UNSUPPORTED,
        "a question needs an answer | was not made for random",
        "standard input is no terminal",
        "pass --yes",
    ),
    "log level": (
        lambda w: w.patch.setenv("MSMODELSLIM_LOG_LEVEL", "LOUD"),
        (),
        VARIABLE,
        "LOUD",
        "MSMODELSLIM_LOG_LEVEL",
        "INFO",
    ),
}

ROWS = [
    pytest.param(*row, id=f"{table}: {name}")
    for table, rows in (("save_path", PLACES), ("asked", ASKED))
    for name, row in rows.items()
]


@pytest.mark.parametrize(("fault", "flags", "kind", "what", "where", "remedy"), ROWS)
def test_place_or_option(
    workplace, refused, fault: Callable[..., object], flags: tuple[str, ...], kind, what, where, remedy
) -> None:
    fault(workplace)
    refused(kind, what, where, remedy, *flags)


USAGE = {
    "no model": (option(model_path=None), (), "Missing option", "--model_path", "-h' for help"),
    "no save_path": (option(save_path=None), (), "Missing option", "--save_path", "-h' for help"),
    "misspelt": (lambda w: None, ("--overwrit",), "No such option", "--overwrit", "--overwrite"),
    "no boolean": (option(trust_remote_code="maybe"), (), "not 'maybe'", "trust_remote_code", "write True or False"),
    "a word too many": (lambda w: None, ("please",), "unexpected extra argument", "please", "-h' for help"),
}


@pytest.mark.parametrize(("fault", "flags", "what", "where", "remedy"), USAGE.values(), ids=USAGE)
def test_usage(workplace, refused, fault: Callable[..., object], flags: tuple[str, ...], what, where, remedy) -> None:
    fault(workplace)
    refused("usage", what, where, remedy, *flags, status=2)


def counting(w, function: str) -> int:
    """How often a function of the operating system is called in a run without a fault."""
    calls, original = [0], getattr(os, function)

    def call(*arguments):
        calls[0] += 1
        return original(*arguments)

    with w.patch.context() as patch:
        patch.setattr(os, function, call)
        assert w.run("--save_path", str(w.folder / "counted")).exit_code == 0
    shutil.rmtree(w.folder / "counted")
    return calls[0]


def refuses(share: float, error: int, function: str = "pwrite") -> Callable[..., None]:
    """After this share of the calls of a whole run a function of the operating system fails for good."""

    def fault(w) -> None:
        granted, original = [int(share * (counting(w, function) - 1))], getattr(os, function)

        def call(*arguments):
            granted[0] -= 1
            if granted[0] < 0:
                raise OSError(error, os.strerror(error))
            return original(*arguments)

        w.patch.setattr(os, function, call)

    return fault


def no_kernel_copy(w) -> None:
    """Every byte goes through ``pwrite``, as between two file systems."""
    w.patch.delattr(os, "copy_file_range", raising=False)


def cannot_copy(w) -> None:
    def copyfile(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    w.patch.setattr(shutil, "copyfile", copyfile)


FULL, WRITING = "No space left on device", "writing the output failed: "
STAGING = "{folder}/.out.slim-partial"
DISK = {
    "full at once": (refuses(0.0, errno.ENOSPC), WRITING + FULL, STAGING),
    "full early": (refuses(0.1, errno.ENOSPC), WRITING + FULL, STAGING),
    "full half-way": (refuses(0.5, errno.ENOSPC), WRITING + FULL, STAGING),
    "full at the last write": (refuses(1.0, errno.ENOSPC), WRITING + FULL, STAGING),
    "over quota": (refuses(0.9, errno.EDQUOT), "quota exceeded", STAGING),
    "broken": (refuses(0.9, errno.EIO), WRITING + "Input/output error", STAGING),
    "no flush": (refuses(0.0, errno.EIO, "fsync"), WRITING + "Input/output error", STAGING),
    "full beside the weights": (cannot_copy, FULL, STAGING),
    "no rename": (refuses(0.0, errno.EPERM, "rename"), "put in place: Operation not permitted", "{save}"),
}


@pytest.mark.parametrize("before", [(), ("--overwrite",)], ids=["new", "overwrite"])
@pytest.mark.parametrize(("fault", "what", "where"), DISK.values(), ids=DISK)
def test_disk(workplace, refused, fault: Callable[..., object], what, where, before: tuple[str, ...]) -> None:
    """An older output is as it was; once there is room the run ends as if nothing had happened, resumed or anew."""
    if before:
        workplace.fill_save()
    no_kernel_copy(workplace)
    with workplace.patch.context() as patch:
        outer, workplace.patch = workplace.patch, patch
        fault(workplace)
        refused(ENVIRONMENT, what, where, "run again with --resume", *before, resumable=True)
    workplace.patch = outer
    resumed = ("--resume",) if (workplace.folder / ".out.slim-partial").exists() else ()
    again = workplace.run(*before, *resumed)
    assert again.exit_code == 0, again.output
    found = weights(workplace.save)
    assert not (workplace.folder / ".out.slim-partial").exists()
    assert not (workplace.save / "mine.txt").exists()
    assert workplace.run("--overwrite").exit_code == 0
    assert weights(workplace.save) == found


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_nothing_is_broken_to_begin_with(workplace) -> None:
    """The faults above are the only ones: without one the same command succeeds, and replaces an older output."""
    workplace.fill_save()
    found = workplace.run("--overwrite")
    assert found.exit_code == 0, found.output
    assert "12 W8A8" in found.stdout
    assert (workplace.save / "quant_model_description.json").exists()
    assert not (workplace.save / "mine.txt").exists()
    workplace.split()
    assert workplace.run("--overwrite").exit_code == 0

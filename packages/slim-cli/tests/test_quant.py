"""`slim quant`."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slim_core import commands
from slim_core.progress import SilentProgress


def test_writes_a_checkpoint_and_says_where(slim, quant, tmp_path: Path) -> None:
    found = slim(*quant())
    assert found.exit_code == 0, found.output
    out = tmp_path / "out"
    assert (out / "quant_model_description.json").exists()
    for expected in ("13 W8A8_DYNAMIC, 2 stay FLOAT", "layer_wise: ", "no calibration data needed", "peak memory"):
        assert expected in found.stdout
    assert found.stdout.index("Plan") < found.stdout.index("Done")
    assert f"written to   {out}" in found.stdout


def test_installed_script_with_dashes(installed, model: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"model-path": model, "save-path": out, "model-type": "random", "config-path": recipe, "device": "cpu"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    found = installed("quant", *arguments, "--trust-remote-code", "True")
    assert found.returncode == 0, found.stderr
    assert (out / "config.json").exists()
    assert "units" in found.stderr  # progress as plain lines
    assert "\x1b[" not in found.stdout + found.stderr


@pytest.mark.parametrize("spelling", ["--dry_run", "--dry-run"])
def test_dry_run_tells_every_linear_and_writes_nothing(slim, quant, tmp_path: Path, spelling: str) -> None:
    found = slim(*quant(spelling))
    assert found.exit_code == 0, found.output
    assert list(tmp_path.iterdir()) == []
    assert "model.layers.0: " in found.stdout
    assert "model.layers.1: " in found.stdout
    down = [line.split() for line in found.stdout.splitlines() if "down_proj" in line]
    assert [line[4] for line in down] == ["FLOAT", "W8A8_DYNAMIC"]
    assert "excluded by spec.process[0].exclude" in found.stdout
    assert "lm_head" in found.stdout
    assert "Done" not in found.stdout


def test_dry_run_warns_of_patterns_that_match_nothing_and_of_a_full_save_path(
    slim, quant, recipe: Path, tmp_path: Path
) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text(recipe.read_text().replace("*layers.0.mlp", "*layers.0.mpl"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    found = slim(*quant("--dry_run", "--config_path", str(typo)))
    assert found.exit_code == 0, found.output
    assert "pattern '*layers.0.mpl.down_proj' matches no linear" in found.stdout
    assert "The run itself would be refused" in found.stdout
    assert "model.layers.0-1 (2 units): " in found.stdout


def test_full_save_path_is_refused_without_overwrite(slim, quant, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    found = slim(*quant())
    assert found.exit_code == 1
    assert found.stderr.startswith("error 204 SecurityError: ")
    assert "--overwrite" in found.stderr
    assert (out / "mine.txt").read_text() == "keep me"
    assert slim(*quant("--overwrite")).exit_code == 0
    assert not (out / "mine.txt").exists()


def test_what_no_engine_loads_is_refused_unless_forced(slim, quant, recipe: Path, tmp_path: Path) -> None:
    four = tmp_path / "w4a8.yaml"
    four.write_text(recipe.read_text().replace("scope: per_channel, dtype: int8", "scope: per_channel, dtype: int4"))
    given = [str(four) if part == str(recipe) else part for part in quant()]
    found = slim(*given)
    assert found.exit_code == 1
    assert "no engine can load what this recipe makes of the model" in found.stderr
    assert "mindie-llm: loads W4A8_DYNAMIC linear layers only in groups" in found.stderr
    assert "--force" in found.stderr
    assert list(tmp_path.iterdir()) == [four]
    shown = slim(*given, "--dry_run")
    assert shown.exit_code == 0
    assert "The run itself would be refused: spec.process: no engine" in shown.stdout
    forced = slim(*given, "--force")
    assert forced.exit_code == 0, forced.output
    assert "- no engine can load" in forced.stdout
    assert (tmp_path / "out" / "quant_model_description.json").exists()


@pytest.mark.parametrize("literal", ["True", "False", "true", "false", "1", "0"])
def test_trust_remote_code_takes_literals(slim, quant, monkeypatch: pytest.MonkeyPatch, literal: str) -> None:
    seen = []
    monkeypatch.setattr(commands, "quantize", seen.append)
    assert slim(*quant("--trust_remote_code", literal)).exit_code == 0
    assert seen[0].trust_remote_code is (literal in ("True", "true", "1"))


def test_other_booleans_are_a_usage_error(slim, quant) -> None:
    found = slim(*quant("--trust_remote_code", "yes"))
    assert found.exit_code == 2
    assert "write True or False, not 'yes'" in found.stderr


def test_only_given_options_reach_the_request(slim, quant, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "quantize", seen.append)
    slim(*quant(device=False))
    slim(*quant("--tag", "vLLM_Ascend", "--tag", "Atlas_A2", "--resume", "--yes", "--debug"))
    first, second = seen
    assert first.model_fields_set == {"model_path", "save_path", "model_type", "config_path"}
    assert first.device == "npu"
    assert "device" in second.model_fields_set
    assert second.tag == ["vLLM_Ascend", "Atlas_A2"]
    assert (second.resume, second.yes, second.debug, second.overwrite) == (True, True, True, False)


def test_default_device_gives_way_once_and_loudly(slim, quant, only_a_cpu) -> None:
    found = slim(*quant(device=False))
    assert found.exit_code == 0, found.output
    assert found.stderr.count("no NPU here") == 1


@pytest.mark.parametrize(
    ("device", "code", "text"),
    [
        ("npu", "error 100 EnvError", "no npu device"),
        ("npu:0,1", "error 100 EnvError", "no npu device"),
        ("NPU", "error 203 SchemaValidateError", "unknown device 'NPU'"),
        ("cpu:x", "error 203 SchemaValidateError", "must be numbers"),
        ("cpu:0,0", "error 203 SchemaValidateError", "repeated"),
    ],
)
def test_device_errors(slim, quant, only_a_cpu, device: str, code: str, text: str) -> None:
    found = slim(*quant("--device", device, device=False))
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1].startswith(f"{code}: --device: ")
    assert text in found.stderr
    assert "Traceback" not in found.stderr


def test_recipe_and_type_exclude_each_other(slim, quant, recipe: Path) -> None:
    found = slim(*quant("--quant_type", "w8a8", "--config_path", str(recipe)))
    assert found.exit_code == 1
    assert found.stderr == (
        "error 203 SchemaValidateError: --config_path and --quant_type exclude each other "
        "(give the recipe or the type, not both)\n"
    )


def test_broken_recipe_is_told_with_line_and_field(slim, quant, recipe: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(recipe.read_text().replace("include:", "inlcude:"))
    found = slim(*quant("--config_path", str(broken)))
    assert found.exit_code == 1
    assert "error 203 SchemaValidateError: " in found.stderr
    assert "spec.process[0].inlcude" in found.stderr
    assert "did you mean 'include'" in found.stderr


def test_missing_model_is_an_error(slim, quant, tmp_path: Path) -> None:
    found = slim(*quant("--model_path", str(tmp_path / "nowhere")))
    assert found.exit_code == 1
    assert "error 201 InvalidModelError: " in found.stderr


def test_question_without_a_terminal_names_yes(slim, quant) -> None:
    found = slim(*quant("--quant_type", "w8a8"))
    assert found.exit_code == 1
    assert found.stderr.startswith("error 301 UnsupportedError: a question needs an answer")
    assert "was not made for random" in found.stderr
    assert "--yes" in found.stderr


def test_yes_answers_the_question(slim, quant) -> None:
    found = slim(*quant("--quant_type", "w8a16", "--yes", "--dry_run"))
    assert found.exit_code == 0, found.output
    assert "14 W8A16" in found.stdout


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("", 1), ("y", 0), ("Yes", 0)])
def test_question_on_a_terminal(model: Path, tmp_path: Path, answer: str, status: int) -> None:
    """The real script on a pseudo-terminal, with a stand-in for the work behind the question."""
    program = (
        "import sys; from slim_core import commands, console\n"
        "from slim_cli.main import app\n"
        "commands.quantize = lambda request: console.say('went on' if commands.ask('Really?') else sys.exit(1))\n"
        f"app(['quant', '--model_path', {str(model)!r}, '--save_path', 'x', '--model_type', 'm'])\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == status
    assert b"Really? [y/N] " in err
    assert (b"went on" in out) is (status == 0)


class _StopsAt(SilentProgress):
    """Does something when work on a unit begins."""

    def __init__(self, step: str, action) -> None:
        self.step, self.action = step, action

    def begin(self, step: str) -> None:
        if step == self.step:
            time.sleep(0.2)  # the writer runs in a thread of its own
            self.action()


def _control_c() -> None:
    raise KeyboardInterrupt


def _termination() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("action", [_control_c, _termination])
def test_interrupted_run_exits_130_and_resumes(slim, quant, tmp_path: Path, monkeypatch, action) -> None:
    assert slim(*quant("--save_path", str(tmp_path / "whole"))).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(commands, "show_progress", lambda: _StopsAt("model.layers.1", action))
        found = slim(*quant())
    assert found.exit_code == 130
    assert "run again with --resume" in found.stderr
    assert found.stderr.endswith("interrupted\n")
    assert not (tmp_path / "out").exists()
    resumed = slim(*quant("--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert "2 units taken over from the interrupted run" in resumed.stdout
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_nothing_to_resume(slim, quant) -> None:
    found = slim(*quant("--resume"))
    assert found.exit_code == 1
    assert "error 301 UnsupportedError: " in found.stderr


def _raises(error: BaseException):
    def quantize(request: object) -> None:
        raise error

    return quantize


def test_bug_is_told_in_one_line_and_asks_for_a_report(slim, quant, monkeypatch) -> None:
    monkeypatch.setattr(commands, "quantize", _raises(ZeroDivisionError("by nought")))
    found = slim(*quant())
    assert found.exit_code == 1
    assert found.stderr.startswith(
        "error 500 UnexpectedError: ZeroDivisionError: by nought (a bug in Slim; please report"
    )
    assert "--debug" in found.stderr
    assert "Traceback" not in found.stderr
    assert "Traceback" in slim(*quant("--debug")).stderr


def test_full_disk_is_no_bug(slim, quant, monkeypatch) -> None:
    monkeypatch.setattr(commands, "quantize", _raises(OSError(errno.ENOSPC, "No space left on device", "/out/x")))
    assert slim(*quant()).stderr == "error 100 EnvError: /out/x: No space left on device\n"


def test_used_up_memory_is_no_bug(slim, quant, monkeypatch) -> None:
    monkeypatch.setattr(commands, "quantize", _raises(MemoryError()))
    assert slim(*quant()).stderr.startswith("error 100 EnvError: the memory of this machine is used up")


@pytest.mark.parametrize("verb", [["practices", "list"], ["schema"]])
def test_log_level_is_checked_at_start(installed, verb: list[str]) -> None:
    found = installed(*verb, MSMODELSLIM_LOG_LEVEL="LOUD")
    assert found.returncode == 1
    assert found.stderr.startswith("error 102 EnvVarError: ")
    assert found.stdout == ""


def test_closed_pipe_is_quiet(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "slim"
    found = subprocess.run(
        ["bash", "-c", f"'{script}' schema | head -1"], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "{\n"
    assert found.stderr == ""


def test_practice_folder_of_the_environment_is_used(slim, quant, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "practices" / "default"
    folder.mkdir(parents=True)
    text = recipe.read_text() + "metadata: {config_id: mine, score: 99, label: {w_bit: 8, a_bit: 8}}\n"
    (folder / "mine.yaml").write_text(text)
    (folder / "junk.yaml").write_text("- not a recipe\n")
    monkeypatch.setenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", str(tmp_path / "practices"))
    found = slim(*quant("--quant_type", "w8a8", "--yes", "--dry_run"))
    assert found.exit_code == 0, found.output
    assert "practice: mine" in found.stderr
    assert "practice ignored: " in found.stderr

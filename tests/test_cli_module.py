"""`python -m slim_llm` and `python -m slim_vlm` speak as `slim` does."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = EXAMPLES / "vlm-w8a8.yaml"
OLD = Path(__file__).parents[1] / "packages" / "slim-llm" / "tests" / "v0" / "recipes" / "qwen2-72b-w8a8.yaml"


def _slim(arguments: list[str]) -> int | None:
    from slim_cli.main import app

    return app(arguments)


def _llm(arguments: list[str]) -> int:
    from slim_llm.__main__ import main

    return main(arguments)


def _vlm(arguments: list[str]) -> int:
    from slim_vlm.__main__ import main

    return main(arguments)


COMMANDS = {"slim": _slim, "slim_llm": _llm, "slim_vlm": _vlm}


def _run(command: str, *arguments: object) -> SimpleNamespace:
    """Run a command in this process; standard input is no terminal under pytest."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = COMMANDS[command]([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return SimpleNamespace(returncode=status or 0, stdout=out.getvalue(), stderr=err.getvalue())


def _steady(text: str) -> str:
    """Without what differs from run to run: clock, free memory."""
    text = re.sub(r"^\d\d:\d\d:\d\d ", "", text, flags=re.MULTILINE)
    return re.sub(r"free .*\)", "free)", text)


MODEL = ("--model-path", EXAMPLES / "tiny-qwen3", "--model_type", "tiny-qwen3", "--device", "cpu")
RECIPE = ("--config_path", EXAMPLES / "w8a8-dynamic.yaml")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["quant", *MODEL, *RECIPE, "--save_path", "out", "--dry-run"], 0),
        (["quant", *MODEL, "--save_path", "out"], 1),
        (["quant", *MODEL, *RECIPE, "--quant_type", "w8a8", "--save_path", "out"], 1),
        (["eval", EXAMPLES / "tiny-qwen3", "--device", "cpu"], 1),
        (["practices", "list"], 0),
        (["practices", "show", "qwen3-w8a8"], 0),
        (["practices", "match", "Qwen3-8B", "--quant-type", "w8a16", "--tag", "x"], 0),
        (["practices", "show", "nothing-like-it"], 1),
        (["recipe", "check", EXAMPLES / "w8a8-dynamic.yaml"], 0),
        (["recipe", "check", OLD], 0),
        (["recipe", "check", IMAGES], 0),
        (["eval", EXAMPLES / "tiny-qwen3", "--device", "cpu", "--dataset", "calibImages"], 1),
        (["eval", EXAMPLES / "tiny-qwen3", "--device", "cpu", "--dataset", "calibImages", "--text", "t.txt"], 1),
        (["recipe", "migrate", OLD], 0),
        (["recipe", "migrate", OLD, "--output", OLD], 1),
        (["recipe", "migrate", EXAMPLES / "w8a8-dynamic.yaml"], 1),
    ],
)
def test_all_commands_say_the_same(arguments: list[object], status: int) -> None:
    found = [_run(command, *arguments) for command in COMMANDS]
    assert [one.returncode for one in found] == [status] * 3, found
    assert len({_steady(one.stdout) for one in found}) == 1
    assert len({_steady(one.stderr) for one in found}) == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [["quant"], ["quant", "--no_such"], ["eval"], ["nonsense"]])
def test_usage_errors_are_2(command: str, arguments: list[str]) -> None:
    assert _run(command, *arguments).returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_both_spellings_and_the_descriptions(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slim_core.options import options_of
    from slim_core.service import EvalRequest, QuantRequest

    monkeypatch.setenv("COLUMNS", "1000")
    for verb, request in (("quant", QuantRequest), ("eval", EvalRequest)):
        found = _run(command, verb, "-h")
        assert found.returncode == 0
        for option in options_of(request):
            assert option.name == "model_path" or all(spelling in found.stdout for spelling in option.spellings)
            assert " ".join(option.help.split()) in " ".join(found.stdout.split())


@pytest.mark.parametrize(("command", "package"), [("slim_llm", "slim-llm"), ("slim_vlm", "slim-vlm")])
def test_a_module_has_the_version_of_its_package(command: str, package: str) -> None:
    assert _run(command, "--version").stdout == f"{package} {version(package)}\n"
    assert f"usage: python -m {command} " in _run(command, "--help").stdout


def test_module_as_a_process_quantizes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quant", *MODEL, *RECIPE, "--save_path", out, "--trust_remote_code", "False"]
    made = subprocess.run(
        [sys.executable, "-m", "slim_llm", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert f"written to   {out}" in made.stdout
    text = ("--text", EXAMPLES / "heldout.txt", "--max_windows", "1", "--sequence-length", "64")
    scored = _run("slim_llm", "eval", EXAMPLES / "tiny-qwen3", "--quantized", out, "--device", "cpu", *text)
    assert scored.returncode == 0, scored.stderr
    assert "top-1 agreement" in scored.stdout


@pytest.mark.parametrize("package", ["slim_llm", "slim_vlm"])
def test_module_needs_no_command_line_package(package: str) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = [{package!r}, 'practices', 'list']\n"
        f"try:\n    runpy.run_module({package!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert not {'typer', 'slim_cli', 'PIL', 'diffusers', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

"""Help, version and start-up."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "matplotlib")


@pytest.mark.parametrize("arguments", [["--help"], ["quant", "--help"], ["eval", "-h"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from slim_cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"assert not [name for name in {HEAVY!r} if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_usage_error_loads_nothing_heavy(installed) -> None:
    found = installed("quant", "--model_path", "here")
    assert found.returncode == 2
    assert "Missing option '--save_path' / '--save-path'" in found.stderr
    assert found.stdout == ""


def test_bare_command_shows_help(installed) -> None:
    found = installed()
    assert found.returncode == 0
    for verb in ("quant", "eval", "inspect", "verify", "practices", "recipe", "schema"):
        assert f"\n  {verb} " in found.stdout


def test_version_names_every_installed_package(slim) -> None:
    lines = slim("--version").stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["slim-cli", "slim-core"]


@pytest.mark.parametrize(
    "option",
    [
        *("model_path", "save_path", "device", "model_type", "config_path", "quant_type", "trust_remote_code", "tag"),
        *("dry_run", "probe", "overwrite", "resume", "yes", "debug"),
    ],
)
def test_quant_help_has_every_option_in_both_spellings(slim, option: str) -> None:
    shown = slim("quant", "--help").stdout
    assert f"--{option}" in shown
    assert f"--{option.replace('_', '-')}" in shown


def test_help_texts_are_the_descriptions_of_the_request(slim) -> None:
    from slim_core.service import QuantRequest

    shown = " ".join(slim("quant", "--help").stdout.split())
    for field in QuantRequest.model_fields.values():
        assert " ".join((field.description or "?").split()) in shown
    assert "[default: npu]" in shown

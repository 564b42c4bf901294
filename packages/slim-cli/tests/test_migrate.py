"""``slim recipe migrate``, and what the other verbs make of old recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

OLD = """\
apiversion: modelslim_v0
spec:
  calib_cfg:
    a_bit: 16
    pr: 0.5
    mm_tensor: false
  calib_dataset: null
  batch_size: 2
"""
SMOOTHED = OLD.replace("spec:\n", "spec:\n  anti_cfg: {anti_method: m1}\n").replace("null", "mix_calib.jsonl")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def test_migrate_prints_a_recipe(slim, old: Path, tmp_path: Path) -> None:
    found = slim("recipe", "migrate", old)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == "# Migrated by Slim from old.yaml, a recipe of modelslim_v0."
    assert "# - spec.calib_cfg.pr: 0.5 is taken as 1: activations are not left out at random" in lines
    assert "# - spec.batch_size" in lines
    recipe = yaml.safe_load(found.stdout)
    assert recipe["apiversion"] == "modelslim_v1"
    assert [one["type"] for one in recipe["spec"]["process"]] == ["linear_quant"]
    assert found.stderr == ""
    new = tmp_path / "new.yaml"
    new.write_text(found.stdout)
    assert slim("recipe", "check", new).exit_code == 0


def test_migrate_to_a_new_file(slim, old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    found = slim("recipe", "migrate", old, "--output", new)
    assert found.exit_code == 0, found.output
    assert found.stdout == f"written to {new}; its first lines tell what is not the same\n"
    assert new.read_text() == slim("recipe", "migrate", old).stdout


@pytest.mark.parametrize("name", ["old.yaml", "other.yaml"])
def test_migrate_overwrites_nothing(slim, old: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.write_text(OLD)
    found = slim("recipe", "migrate", old, "--output", target)
    assert found.exit_code == 1
    assert found.stderr == (
        f"error 204 SecurityError: {target}: exists and is not overwritten (remove it, or give another path)\n"
    )
    assert target.read_text() == OLD


def test_migrate_where_nothing_can_be_written(slim, old: Path, tmp_path: Path) -> None:
    found = slim("recipe", "migrate", old, "--output", tmp_path / "no" / "new.yaml")
    assert found.exit_code == 1
    assert "error 100 EnvError: " in found.stderr
    assert "cannot be written: No such file or directory" in found.stderr


def test_migrate_refuses_what_is_new_already(slim, recipe: Path) -> None:
    found = slim("recipe", "migrate", recipe)
    assert found.exit_code == 1
    assert found.stderr == (
        f"error 301 UnsupportedError: {recipe}: apiversion: the recipe is already modelslim_v1, which no newer "
        "protocol replaces (use it as it is)\n"
    )


def test_migrate_refuses_a_broken_recipe(slim, old: Path) -> None:
    old.write_text(OLD.replace("a_bit", "abit"))
    found = slim("recipe", "migrate", old)
    assert found.exit_code == 1
    assert f"error 203 SchemaValidateError: {old}:4: spec.calib_cfg.abit: unknown field; did you mean" in found.stderr
    assert found.stdout == ""


def test_migrate_says_at_the_end_what_cannot_be_run_here(slim, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slim_core.recipe import plugins

    points = plugins._points
    without = {name: point for name, point in points("slim.processors").items() if name != "smooth_quant"}
    monkeypatch.setattr(plugins, "_points", lambda group: without if group == "slim.processors" else points(group))
    old.write_text(SMOOTHED)
    found = slim("recipe", "migrate", old)
    assert found.exit_code == 0, found.output
    assert yaml.safe_load(found.stdout)["spec"]["process"][0]["type"] == "smooth_quant"
    (line,) = found.stderr.splitlines()
    assert "WARNING this recipe cannot be run here yet: " in line
    assert f"{old} as modelslim_v1: spec.process[0].type: no installed package provides the processor" in line
    checked = slim("recipe", "check", old)
    assert checked.exit_code == 1
    assert "no installed package provides the processor 'smooth_quant'" in checked.stderr


def test_check_shows_what_an_old_recipe_is_run_as(slim, old: Path) -> None:
    found = slim("recipe", "check", old)
    assert found.exit_code == 0, found.output
    effective = yaml.safe_load(found.stdout)
    assert effective["apiversion"] == "modelslim_v1"
    assert effective["spec"]["propagate"] == "float"
    assert len(re.findall("deprecated", found.stderr)) == 1
    assert "spec.calib_cfg.pr: 0.5 is taken as 1" in found.stderr


@pytest.mark.usefixtures("only_a_cpu")
def test_quant_warns_once(slim, old: Path, model: Path, tmp_path: Path) -> None:
    given = ("--model_path", model, "--save_path", tmp_path / "out", "--model_type", "x", "--config_path", old)
    for more in (("--dry_run",), ()):
        found = slim("quant", *given, "--device", "cpu", *more)
        assert found.exit_code == 0, found.output
        assert len(re.findall("deprecated", found.stdout + found.stderr)) == 1
        assert f"{old}: modelslim_v0 is deprecated; the recipe is run as modelslim_v1" in found.stderr
        assert found.stdout.count("    - spec.calib_cfg.pr: 0.5 is taken as 1") == 1
    written = yaml.safe_load((tmp_path / "out" / "x_best_practice.yaml").read_text())
    assert written["apiversion"] == "modelslim_v1"

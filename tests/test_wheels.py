"""The built packages in clean environments: what is in them, and that each does its part without the others.

Slow; run with ``pytest -m slow tests/test_wheels.py``. An environment holds the wheels under test and, as links to what
is installed here, nothing but the distributions that they require, directly or not. So a requirement that is used but
not declared shows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterable
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OURS = ("slim-core", "slim-llm", "slim-vlm", "slim-sd", "slim-cli")
RECIPE = "apiversion: {apiversion}\nspec:\n  process:\n    - {{type: linear_quant, qconfig: {{weight: {{}}}}}}\n"


def find_uv() -> list[str]:
    """The uv command: on the path, where the README puts it, or in this environment."""
    found = shutil.which("uv") or shutil.which("uv", path=ROOT / ".uv" / "bin")
    return [found] if found else [sys.executable, "-m", "uv"]


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command outside of the repository and of this environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1", "UV_NO_PROGRESS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def build(folder: Path, *options: str) -> dict[str, Path]:
    """The wheels of all packages, by distribution name."""
    found = run(*find_uv(), "build", "--all-packages", *options, "--out-dir", folder, ROOT, folder=ROOT)
    assert found.returncode == 0, found.stderr
    return {canonicalize_name(path.name.split("-")[0]): path for path in folder.glob("*.whl")}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built straight from the sources."""
    return build(tmp_path_factory.mktemp("wheels"), "--wheel")


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def required_by(wheel: Path) -> list[str]:
    """The third-party distributions behind a wheel, all of which are installed here."""
    metadata = next(data for name, data in content(wheel).items() if name.endswith(".dist-info/METADATA"))
    waiting = list(Parser().parsestr(metadata.decode()).get_all("Requires-Dist") or ())
    found: set[tuple[str, ...]] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name, extras = canonicalize_name(requirement.name), sorted(requirement.extras)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name in OURS or (name, *extras) in found:
            continue
        found.add((name, *extras))
        for line in distribution(name).requires or ():
            inner = Requirement(line)
            if not inner.marker or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                inner.marker = None
                waiting.append(str(inner))
    return sorted({name for name, *_ in found})


def link(names: Iterable[str], folder: Path) -> None:
    """Make installed distributions importable from ``folder``."""
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(installed.locate_file(top)))
            if target.exists() and not top.endswith(".pth") and not (folder / top).exists():
                (folder / top).symlink_to(target)


Environment = Callable[..., Path]


@pytest.fixture
def environment(wheels: dict[str, Path], tmp_path: Path) -> Environment:
    """Make a clean virtual environment with some of our wheels; gives its folder of programs."""

    def make(*packages: str, without: tuple[str, ...] = ()) -> Path:
        home, others = tmp_path / "venv", tmp_path / "others"
        venv.create(home, symlinks=True)
        python = home / "bin" / "python"
        chosen = [wheels[name] for name in packages]
        found = run(
            *find_uv(), "pip", "install", "--no-deps", "--offline", "--python", python, *chosen, folder=tmp_path
        )
        assert found.returncode == 0, found.stderr
        others.mkdir()
        link({name for wheel in chosen for name in required_by(wheel)} - set(without), others)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path)
        (Path(site.stdout.strip()) / "others.pth").write_text(f"{others}\n")
        absent = [name.replace("-", "_") for name in OURS if name not in packages]
        assert importable(home / "bin", *absent) == []
        return home / "bin"

    return make


def importable(programs: Path, *modules: str) -> list[str]:
    """Those of the modules that an environment has."""
    code = f"from importlib.util import find_spec; print(*(m for m in {modules!r} if find_spec(m)))"
    found = run(programs / "python", "-c", code, folder=programs)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def recipe(folder: Path, apiversion: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(apiversion=apiversion))
    return path


def arguments(folder: Path, **more: object) -> list[object]:
    """Of a ``quant`` of the example model."""
    options: dict[str, object] = {
        "model_path": EXAMPLES / "tiny-qwen3",
        "save_path": folder / "out",
        "model_type": "tiny-qwen3",
        "device": "cpu",
    }
    return ["quant", *(part for name, value in (options | more).items() for part in (f"--{name}", value))]


def test_every_wheel_has_its_licence_and_types(wheels: dict[str, Path]) -> None:
    assert wheels.keys() == set(OURS)
    licence = (ROOT / "LICENSE").read_bytes()
    for name, wheel in wheels.items():
        module, files = name.replace("-", "_"), content(wheel)
        assert f"{module}/py.typed" in files
        assert [data for path, data in files.items() if path.endswith("licenses/LICENSE")] == [licence]
        assert {path.split("/")[0].split("-")[0] for path in files} == {module}
        sources = ROOT / "packages" / name / "src" / module
        assert {str(path.relative_to(sources.parent)) for path in sources.rglob("*.py")} <= files.keys()


def test_data_files_are_real_files(wheels: dict[str, Path]) -> None:
    """Where the repository has links, a wheel has what they point to."""
    llm, vlm, core = (content(wheels[name]) for name in ("slim-llm", "slim-vlm", "slim-core"))
    samples = ROOT / "lab_calib" / "mix_calib.jsonl"
    assert llm["slim_llm/lab_calib/mix_calib.jsonl"] == samples.read_bytes()
    images = sorted((ROOT / "lab_calib" / "calibImages").iterdir())
    assert images
    for path in images:
        assert vlm[f"slim_vlm/{path.relative_to(ROOT)}"] == path.read_bytes()
    sources = ROOT / "packages" / "slim-core" / "src"
    data = [*sources.rglob("templates/*.j2"), *sources.rglob("loader_tables.yaml")]
    assert len(data) >= 2
    for path in data:
        assert core[str(path.relative_to(sources))] == path.read_bytes()


def test_practices_are_in_the_wheel_of_their_service(wheels: dict[str, Path]) -> None:
    """And in no other, so that none is listed twice where both are installed."""
    owners = {
        "modelslim_v1": "slim-llm",
        "multimodal_vlm_modelslim_v1": "slim-vlm",
        "multimodal_sd_modelslim_v1": "slim-sd",
    }
    wanted: dict[str, dict[str, bytes]] = {name: {} for name in OURS}
    for path in sorted((ROOT / "lab_practice").rglob("*.yaml")):
        owner = owners[yaml.safe_load(path.read_text("utf-8"))["apiversion"]]
        wanted[owner][f"{owner.replace('-', '_')}/{path.relative_to(ROOT)}"] = path.read_bytes()
    assert all(wanted[owner] for owner in owners.values())
    for name, wheel in wheels.items():
        assert {path: data for path, data in content(wheel).items() if "/lab_practice/" in path} == wanted[name], name


def test_calibration_sets_are_in_one_wheel_each(wheels: dict[str, Path]) -> None:
    """And the scripts that draw the images in none."""
    found = {name: [path for path in content(wheel) if "/lab_calib/" in path] for name, wheel in wheels.items()}
    sets = {name: {path.split("/")[2] for path in paths} - {"README.md"} for name, paths in found.items()}
    assert {name: kept for name, kept in sets.items() if kept} == {
        "slim-llm": {"mix_calib.jsonl"},
        "slim-vlm": {"calibImages"},
    }


def test_documented_build_makes_the_same_wheels(wheels: dict[str, Path], tmp_path: Path) -> None:
    """``uv build --all-packages``, as docs/install.md has it, builds wheels from the source archives."""
    assert "\nuv build --all-packages\n" in (ROOT / "docs" / "install.md").read_text()
    through_archives = build(tmp_path)
    assert {name: set(content(path)) for name, path in through_archives.items()} == {
        name: set(content(path)) for name, path in wheels.items()
    }


def test_slim_llm_alone_quantizes(environment: Environment, tmp_path: Path) -> None:
    """By a practice and with the calibration set that the wheel carries, from the command line and from Python."""
    # pillow stays, because matplotlib, which draws the report, needs it.
    programs = environment("slim-core", "slim-llm", without=("typer", "diffusers"))
    assert importable(programs, "slim_cli", "slim_vlm", "slim_sd", "typer", "diffusers") == []
    python = programs / "python"
    found = run(python, "-m", "slim_llm", *arguments(tmp_path, quant_type="w8a8"), folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "practice: qwen3-w8a8" in found.stderr
    for name in ("quant_model_description.json", "config.json", "tokenizer.json", "report.html", "report.json"):
        assert (tmp_path / "out" / name).is_file()
    request = f"model_path={str(EXAMPLES / 'tiny-qwen3')!r}, save_path='python', model_type='tiny-qwen3', device='cpu'"
    program = f"""
from pathlib import Path
import slim_core, slim_llm
from slim_core.progress import SilentProgress
from slim_core.recipe import load_recipe
from slim_core.service import QuantRequest, find_service

recipe = load_recipe(Path({str(EXAMPLES / "w8a8-static.yaml")!r}))
result = find_service(recipe.apiversion).quantize(QuantRequest({request}), recipe, SilentProgress())
assert result.samples >= 128, result.samples
print(slim_core.__file__, slim_llm.__file__)
"""
    found = run(python, "-c", program, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert all(path.startswith(str(tmp_path / "venv")) for path in found.stdout.split())
    assert (tmp_path / "python" / "quant_model_description.json").is_file()


def test_slim_llm_needs_no_pillow(environment: Environment, tmp_path: Path) -> None:
    programs = environment("slim-core", "slim-llm", without=("typer", "diffusers", "pillow"))
    found = run(programs / "python", "-m", "slim_llm", *arguments(tmp_path, quant_type="w8a8"), folder=tmp_path)
    assert found.returncode == 0, found.stderr


def test_slim_core_alone_needs_no_transformers(environment: Environment, tmp_path: Path) -> None:
    """Every module of it can be imported, in an environment that has none and with any attempt to import it refused."""
    programs = environment("slim-core")
    code = (
        "import sys, pkgutil, importlib; sys.modules['transformers'] = None; import slim_core;"
        "names = [m.name for m in pkgutil.walk_packages(slim_core.__path__, 'slim_core.')];"
        "[importlib.import_module(name) for name in names]; print(*names)"
    )
    found = run(programs / "python", "-c", code, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    rooms = ("recipe", "checkpoint", "model", "quantization", "processors", "savers", "runners", "evaluation")
    assert {f"slim_core.{room}" for room in rooms} <= set(found.stdout.split())
    assert importable(programs, "transformers", "tokenizers", "typer", "diffusers") == []


@pytest.mark.parametrize(
    ("apiversion", "present", "missing"),
    [
        ("modelslim_v1", (), "slim-llm"),
        ("modelslim_v0", (), "slim-llm"),
        ("multimodal_vlm_modelslim_v1", ("slim-llm",), "slim-vlm"),
        ("multimodal_sd_modelslim_v1", ("slim-llm",), "slim-sd"),
    ],
)
def test_recipe_of_an_absent_package_names_it(
    environment: Environment, tmp_path: Path, apiversion: str, present: tuple[str, ...], missing: str
) -> None:
    programs = environment("slim-core", "slim-cli", *present)
    for command in (
        arguments(tmp_path, config_path=recipe(tmp_path, apiversion)),
        ["recipe", "check", tmp_path / "recipe.yaml"],
    ):
        found = run(programs / "slim", *command, folder=tmp_path)
        assert found.returncode == 1, found.stdout + found.stderr
        assert found.stderr.startswith(f"error 301 UnsupportedError: {tmp_path / 'recipe.yaml'}: apiversion: ")
        assert f"pip install --upgrade {missing})" in found.stderr
        assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()


def test_evaluation_without_services_names_the_packages(environment: Environment, tmp_path: Path) -> None:
    programs = environment("slim-core", "slim-cli")
    assert run(programs / "slim", "--version", folder=tmp_path).stdout.split()[::2] == ["slim-cli", "slim-core"]
    found = run(programs / "slim", "eval", EXAMPLES / "tiny-qwen3", folder=tmp_path)
    assert found.returncode == 1
    assert "pip install slim-llm" in found.stderr


def test_type_without_services_names_the_packages(environment: Environment, tmp_path: Path) -> None:
    programs = environment("slim-core", "slim-cli")
    found = run(programs / "slim", *arguments(tmp_path, quant_type="w8a8"), folder=tmp_path)
    assert found.returncode == 1
    assert "slim-llm" in found.stderr


def test_all_packages_together(environment: Environment, tmp_path: Path) -> None:
    """The command reaches the services through the entry points of the wheels."""
    programs = environment(*OURS)
    versions = run(programs / "slim", "--version", folder=tmp_path).stdout.split()
    assert set(versions[::2]) == set(OURS)
    found = run(programs / "slim", *arguments(tmp_path, quant_type="w8a16"), folder=tmp_path)
    assert found.returncode == 0, found.stderr
    found = run(programs / "slim", "verify", tmp_path / "out", folder=tmp_path)
    assert found.returncode == 0, found.stdout
    for apiversion, said in (
        ("multimodal_vlm_modelslim_v1", "does not know model_type 'qwen3' as a vision-language model"),
        ("multimodal_sd_modelslim_v1", "no diffusion model: neither model_index.json"),
    ):
        chosen = arguments(tmp_path, save_path=tmp_path / "no", config_path=recipe(tmp_path, apiversion))
        found = run(programs / "slim", *chosen, folder=tmp_path)
        assert found.returncode == 1
        assert said in found.stderr
    # The library is that of all packages, and each practice is in one of them.
    found = run(programs / "slim", "practices", "list", folder=tmp_path)
    rows = [line.split() for line in found.stdout.splitlines()]
    ids = {path.stem for path in (ROOT / "lab_practice").glob("*/*.yaml")}
    assert sorted(row[1] for row in rows if len(row) > 1 and row[1] in ids) == sorted(ids)
    owners = {"Qwen3-VL-30B-A3B-Instruct": "slim_vlm", "Qwen3-30B-A3B": "slim_llm", "Wan2.1": "slim_sd"}
    for name, folder in owners.items():
        found = run(programs / "slim", "practices", "match", name, "--quant_type", "w8a8", folder=tmp_path)
        assert re.search(rf"^file +{re.escape(str(tmp_path))}/.*/{folder}/lab_practice/", found.stdout, re.M), (
            found.stdout
        )
        assert "question  none" in found.stdout

"""From a request to a recipe and its service: selectors, packages that are missing or broken, the question."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from slim_core import service as services_module
from slim_core.dispatch import choose_recipe, match_practice, open_library, original_opener, service_for
from slim_core.errors import EnvError, InvalidModelError, SchemaValidateError, UnsupportedError
from slim_core.service import QuantRequest, find_service, installed_services

LABEL = {"w_bit": 8, "a_bit": 8}


class FakeService:
    apiversion = "modelslim_v1"
    folders: tuple[Path, ...] = ()
    known: dict[str, str] = {}  # noqa: RUF012
    claim: Any = False

    def practice_folders(self) -> list[Path]:
        return list(self.folders)

    def pedigree(self, model_type: str) -> str | None:
        return self.known.get(model_type)

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        if isinstance(self.claim, Exception):
            raise self.claim
        return self.claim


class Point:
    """An entry point of an installed package."""

    def __init__(self, name: str, load: Callable[[], Any], package: str | None = "slim-fake") -> None:
        self.name = name
        self.load = load
        self.value = "slim_fake.service:Fake"
        self.dist = SimpleNamespace(name=package) if package else None


Install = Callable[..., None]


def service(**attributes: Any) -> type[FakeService]:
    return type("Fake", (FakeService,), attributes)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes these the installed services."""
    monkeypatch.delenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", raising=False)
    monkeypatch.setattr(logging.getLogger("slim"), "propagate", True)

    def install(**found: Any) -> None:
        points = [
            value if isinstance(value, Point) else Point(name, lambda value=value: value)
            for name, value in found.items()
        ]
        monkeypatch.setattr(services_module, "entry_points", lambda group: points if group == "slim.services" else [])

    install()
    return install


def request(tmp_path: Path, **options: Any) -> QuantRequest:
    return QuantRequest(model_path=tmp_path, save_path=tmp_path / "out", model_type="Qwen3-32B", **options)


def write_recipe(path: Path, apiversion: str = "modelslim_v1", **metadata: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"apiversion": apiversion, "metadata": metadata, "spec": {}}))
    return path


def library(folder: Path) -> Path:
    """A practice for Qwen3-32B, and one for everything else."""
    write_recipe(folder / "qwen3" / "good.yaml", config_id="good", label=LABEL, verified_model_types=["Qwen3-32B"])
    write_recipe(folder / "default" / "any.yaml", config_id="any", label=LABEL)
    return folder


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


def test_a_recipe_file_decides(tmp_path: Path, install: Install) -> None:
    install(modelslim_v1=service())
    path = write_recipe(tmp_path / "mine.yaml")
    recipe, found = choose_recipe(request(tmp_path, config_path=path, tag=["ignored"]), never)
    assert recipe.apiversion == "modelslim_v1"
    assert isinstance(found, FakeService)


def test_both_selectors(tmp_path: Path, install: Install) -> None:
    """Refused before the recipe is looked at."""
    with pytest.raises(SchemaValidateError, match=r"--config_path and --quant_type exclude each other .*not both"):
        choose_recipe(request(tmp_path, config_path=tmp_path / "absent.yaml", quant_type="w8a8"), never)


@pytest.mark.parametrize(
    ("apiversion", "remedy"),
    [
        ("modelslim_v2", r"unknown apiversion 'modelslim_v2' \(did you mean 'modelslim_v1'\?\)"),
        ("acme_v1_model", r"did you mean 'acme_v1'\?"),
        ("zzz", r"\(known: acme_v1, modelslim_v0, modelslim_v1, multimodal_sd_modelslim_v1, multimodal_vlm_"),
    ],
)
def test_an_unknown_apiversion(tmp_path: Path, install: Install, apiversion: str, remedy: str) -> None:
    install(acme_v1=service())
    path = write_recipe(tmp_path / "mine.yaml", apiversion)
    with pytest.raises(UnsupportedError, match=remedy) as caught:
        choose_recipe(request(tmp_path, config_path=path), never)
    assert caught.value.where == f"{path}: apiversion"


@pytest.mark.parametrize(
    ("apiversion", "package"),
    [
        ("modelslim_v0", "slim-llm"),
        ("modelslim_v1", "slim-llm"),
        ("multimodal_vlm_modelslim_v1", "slim-vlm"),
        ("multimodal_sd_modelslim_v1", "slim-sd"),
    ],
)
def test_a_missing_package_is_named(tmp_path: Path, install: Install, apiversion: str, package: str) -> None:
    path = write_recipe(tmp_path / "mine.yaml", apiversion)
    with pytest.raises(UnsupportedError, match=rf"served by the package {package}.*pip install --upgrade {package}"):
        choose_recipe(request(tmp_path, config_path=path), never)


def broken(error: Exception) -> Callable[[], Any]:
    def load() -> Any:
        raise error

    return load


@pytest.mark.parametrize(("package", "named"), [("slim-vlm", "slim-vlm"), (None, "slim_fake.service:Fake")])
@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'PIL'"), AttributeError("no attribute 'Fake'")])
def test_a_broken_package_harms_only_those_who_need_it(
    tmp_path: Path, install: Install, caplog: pytest.LogCaptureFixture, error: Exception, package: Any, named: str
) -> None:
    good = service(folders=(library(tmp_path / "lib"),), known={"Qwen3-32B": "qwen3"}, claim=True)
    install(modelslim_v1=good, broken_v1=Point("broken_v1", broken(error), package))
    with pytest.raises(EnvError, match=rf"the service 'broken_v1' of {named} cannot be imported: .*{error}"):
        find_service("broken_v1")
    recipe, _ = choose_recipe(request(tmp_path, quant_type="w8a8"), never)
    assert recipe.metadata.config_id == "good"
    assert isinstance(service_for(tmp_path), good)
    assert "'broken_v1'" in caplog.text


def test_the_question_is_asked_only_when_needed(tmp_path: Path, install: Install) -> None:
    install(modelslim_v1=service(folders=(library(tmp_path / "lib"),), known={"Qwen3-32B": "qwen3"}))
    asked: list[str] = []

    def answer(reply: bool) -> Callable[[str], bool]:
        return lambda question: asked.append(question) or reply

    recipe, found = choose_recipe(request(tmp_path, quant_type="w8a8"), never)
    assert recipe.metadata.config_id == "good"
    assert isinstance(found, FakeService)
    # No type is given: w8a8 is assumed, and that is asked although there is a verified practice.
    assert choose_recipe(request(tmp_path), answer(True))[0].metadata.config_id == "good"
    assert "w8a8 is assumed" in asked.pop()
    with pytest.raises(UnsupportedError, match=r"no practice was chosen .give a recipe with --config_path"):
        choose_recipe(request(tmp_path), answer(False))
    assert len(asked) == 1
    assert choose_recipe(request(tmp_path, yes=True), never)[0].metadata.config_id == "good"


def test_an_unknown_model_falls_back_to_the_default_folder(
    tmp_path: Path, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "slim")
    install(modelslim_v1=service(folders=(library(tmp_path / "lib"),)))
    (tmp_path / "lib" / "default" / "torn.yaml").write_text("{")
    asked: list[str] = []
    recipe, _ = choose_recipe(request(tmp_path, quant_type="w8a8"), lambda q: asked.append(q) or True)
    assert recipe.metadata.config_id == "any"
    assert "was not made for Qwen3-32B" in asked[0]
    assert "practice: any" in caplog.text
    assert "practice ignored" in caplog.text
    assert "torn.yaml" in caplog.text


@pytest.mark.parametrize(
    ("texts", "pictures", "chosen"),
    [
        (False, True, "pictures"),
        (True, False, "any"),
        (True, True, "any"),
        (False, False, "any"),
        (InvalidModelError("config.json is torn"), True, "pictures"),
        (InvalidModelError("config.json is torn"), InvalidModelError("config.json is torn"), "any"),
    ],
)
def test_the_fallback_is_one_whose_service_takes_the_model(
    tmp_path: Path, install: Install, texts: Any, pictures: Any, chosen: str
) -> None:
    folder, api = library(tmp_path / "lib"), "multimodal_vlm_modelslim_v1"
    write_recipe(folder / "default" / "pictures.yaml", api, config_id="pictures", label=LABEL, score=1)
    install(
        modelslim_v1=service(folders=(folder,), claim=texts),
        multimodal_vlm_modelslim_v1=service(folders=(folder,), claim=pictures, apiversion=api),
    )
    recipe, found = choose_recipe(request(tmp_path, quant_type="w8a8", yes=True), never)
    assert (recipe.metadata.config_id, found.apiversion) == (chosen, recipe.apiversion)
    # Without a folder there is nothing to ask.
    assert match_practice("Qwen3-32B", "w8a8").practice.config_id == "any"
    assert match_practice("Qwen3-32B", "w8a8", model_path=tmp_path).practice.config_id == chosen


def test_a_fallback_of_a_package_that_is_missing_is_the_last_one(tmp_path: Path, install: Install) -> None:
    folder, api = library(tmp_path / "lib"), "multimodal_vlm_modelslim_v1"
    write_recipe(folder / "default" / "pictures.yaml", api, config_id="pictures", label=LABEL, score=99)
    install(modelslim_v1=service(folders=(folder,), claim=True))
    assert match_practice("X", "w8a8", model_path=tmp_path).practice.config_id == "any"


def test_a_practice_whose_package_is_missing(tmp_path: Path, install: Install) -> None:
    folder = library(tmp_path / "lib")
    write_recipe(folder / "default" / "any.yaml", "multimodal_sd_modelslim_v1", config_id="any", label=LABEL)
    install(modelslim_v1=service(folders=(folder,)))
    with pytest.raises(UnsupportedError, match=r"practice any: apiversion .* served by the package slim-sd"):
        choose_recipe(request(tmp_path, quant_type="w8a8", yes=True), never)


def test_practices_of_all_services_once(tmp_path: Path, install: Install) -> None:
    folder, more = library(tmp_path / "lib"), tmp_path / "more"
    write_recipe(more / "default" / "other.yaml", config_id="other", label=LABEL, score=1)
    install(b=service(folders=(folder, more)), a=service(folders=(tmp_path / "x" / ".." / "lib",)))
    (tmp_path / "x").mkdir()
    assert [practice.config_id for practice in open_library().list()] == ["any", "other", "good"]
    assert sorted(installed_services()) == ["a", "b"]


def test_the_first_service_that_knows_the_model_names_its_folder(tmp_path: Path, install: Install) -> None:
    folder = library(tmp_path / "lib")
    install(b=service(folders=(folder,), known={"X": "default"}), a=service(known={"X": "qwen3", "Qwen3-32B": "qwen3"}))
    assert match_practice("Qwen3-32B", "w8a8").question is None
    assert match_practice("X", "w8a8", ["tag"]).practice.config_id == "any"


def test_the_service_of_a_folder(tmp_path: Path, install: Install) -> None:
    trouble = InvalidModelError("config.json is torn")
    yes, no, cannot = service(claim=True), service(claim=False), service(claim=trouble)
    install(a=no, b=cannot, c=yes)
    assert isinstance(service_for(tmp_path), yes)
    install(a=no, b=cannot)
    with pytest.raises(InvalidModelError, match=r"config\.json is torn"):
        service_for(tmp_path)
    install(a=no)
    with pytest.raises(
        UnsupportedError, match=r"no installed package can score this kind of model .pip install slim-llm"
    ):
        service_for(tmp_path)


def test_nothing_is_loaded_that_takes_long() -> None:
    code = "import sys, slim_core.dispatch, slim_core.checkpoint.staging; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_service_that_made_a_folder_opens_its_original(tmp_path: Path, install: Install) -> None:
    from slim_core.evaluation.verify import open_original

    def renaming(_self: Any, folder: Path, names: Any, part: str) -> str:
        return f"{folder.name}, {part}: {', '.join(names)}"

    install(modelslim_v1=service(), with_names_of_its_own=service(open_original=renaming))
    assert original_opener(tmp_path) is open_original  # no recipe
    for apiversion in ("modelslim_v1", "not_installed"):
        folder = tmp_path / apiversion
        recipe = write_recipe(folder / "tiny_best_practice.yaml", apiversion)
        recipe.write_text(yaml.safe_dump({"apiversion": apiversion, "spec": {"process": []}}))
        assert original_opener(folder) is open_original
    above = tmp_path / "several" / "tiny_best_practice.yaml"
    above.parent.mkdir()
    above.write_text(yaml.safe_dump({"apiversion": "with_names_of_its_own", "spec": {"process": []}}))
    (above.parent / "transformer").mkdir()
    opener: Any = original_opener(above.parent / "transformer")
    assert opener(tmp_path / "model", ["a", "b"], "transformer") == "model, transformer: a, b"

"""The documentation is true: links resolve, recipes parse, commands are the ones CI runs, examples do what they say."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from typing_extensions import is_typeddict

from slim_core.errors import SlimError
from slim_core.model.streamed import StreamedModel
from slim_core.options import options_of
from slim_core.progress import SilentProgress
from slim_core.quantization.affine import dequantize, quantize
from slim_core.quantization.kinds import LayerKind
from slim_core.recipe import (
    DatasetConfig,
    Metadata,
    PriorStage,
    SpecV1,
    forget_plugins,
    load_recipe,
    plugin_names,
    recipe_from_dict,
)
from slim_core.recipe.plugins import PluginConfig
from slim_core.recipe.qconfig import METHODS
from slim_core.recipe.schema import Label
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.savers.loaders import engine_format, engines
from slim_core.service import EvalRequest, Migrator, QuantRequest, find_service
from slim_sd.recipe import DumpConfig, SdConfig
from slim_sd.settings import GeneralSettings, WanSettings, field_names
from slim_vlm.recipe import SpecVlm

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin"
TINY = ROOT / "examples" / "tiny-qwen3"
SKIPPED = {".venv", ".uv", ".git", ".pytest_cache", ".scratch", "node_modules", "out", "dist"}
MARKDOWN = sorted(path for path in ROOT.rglob("*.md") if not SKIPPED & set(path.relative_to(ROOT).parts))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
# A recipe, and right below it what Slim says of it.
_REFUSED = re.compile(r"^```yaml\n((?:(?!^```).)*)^```\n+^```text\n(error (?:(?!^```).)*)^```", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]\[]*(?:\[[^\]]*\])?[^\]\[]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.M)


def named(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def read(path: Path | str) -> str:
    return (ROOT / path).read_text("utf-8")


def blocks(path: Path | str, *languages: str) -> list[str]:
    """The fenced blocks of a page, in order; of the languages given, or all."""
    found = ((match["language"], match["code"]) for match in _FENCE.finditer(read(path)))
    return [code for language, code in found if not languages or language in languages]


def prose(path: Path | str) -> str:
    return _FENCE.sub("", read(path))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(path)))
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", named(MARKDOWN))
def test_relative_links_resolve(page: Path) -> None:
    broken: list[str] = []
    for target in _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", named(MARKDOWN))
def test_pages_name_no_machine(page: Path) -> None:
    """Neither folders of the machine they were written on, nor hosts of package registries."""
    text = read(page)
    assert not re.findall(r"(?<![\w.])/(?:work|home|root)/\w+", text)
    assert not re.findall(r"(?:pypi|pythonhosted|download\.pytorch|mirrors?\.)[\w.]*\.\w+", text)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example package, installed as far as entry points can tell."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text("utf-8"))["project"]
    info = tmp_path / "site" / f"slim_example-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items()) for group, points in groups
    ]
    (info / "entry_points.txt").write_text("\n\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    forget_plugins()
    yield tmp_path
    forget_plugins()


def recipes() -> list[Any]:
    found: list[Any] = []
    for page in MARKDOWN:
        refused = [code for code, _ in _REFUSED.findall(page.read_text("utf-8"))]
        for i, code in enumerate(blocks(page, "yaml", "yml")):
            if code not in refused and re.search(r"^apiversion:", code, re.M):
                found.append(pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("code", recipes())
def test_recipes_parse(code: str) -> None:
    recipe = recipe_from_dict(yaml.safe_load(code))
    service = find_service(recipe.apiversion)
    if isinstance(service, Migrator):
        recipe = service.migrate(recipe).recipe
    recipe.spec(find_service(recipe.apiversion).spec_type())


def test_the_migrated_recipe_is_what_slim_prints(tmp_path: Path) -> None:
    """docs/migrating.md shows an old recipe and, right below it, what becomes of it."""
    old, new, *_ = blocks("docs/migrating.md", "yaml")
    (tmp_path / "old.yaml").write_text(old, "utf-8")
    recipe = load_recipe(tmp_path / "old.yaml")
    service = find_service(recipe.apiversion)
    assert isinstance(service, Migrator)
    assert service.migrate(recipe).text() == new


def refusal(path: Path) -> str:
    """What the command says of a broken recipe."""
    try:
        recipe = load_recipe(path)
        service = find_service(recipe.apiversion, where=f"{path}: apiversion")
        if isinstance(service, Migrator):
            recipe = service.migrate(recipe).recipe
        recipe.spec(find_service(recipe.apiversion).spec_type())
    except SlimError as error:
        return f"error {error.code} {type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("page", "least"), [("docs/recipes.md", 5), ("docs/migrating.md", 1), ("docs/diffusion.md", 1)]
)
def test_error_examples_are_what_slim_says(
    page: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = _REFUSED.findall(read(page))
    assert len(pairs) >= least
    for code, message in pairs:
        Path("recipe.yaml").write_text(code, "utf-8")
        assert refusal(Path("recipe.yaml")) == message.rstrip("\n")


def fields_of(model: Any) -> Iterator[str]:
    """Names of the fields of a model and of the models inside it; of the settings in ``ext`` too."""
    for name, field in model.model_fields.items():
        yield name
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields_of(kind)
            elif is_typeddict(kind):
                yield from kind.__annotations__
            else:
                waiting += get_args(kind)


def test_every_field_is_described() -> None:
    """The pages on recipes name every field that one can have, every processor, and every layer that comes of it."""
    names = {name for model in (SpecV1, SpecVlm, Metadata, DatasetConfig, PriorStage) for name in fields_of(model)}
    for group in ("slim.processors", "slim.savers"):
        for plugin in plugin_names(group):
            names |= {plugin, *fields_of(PluginConfig(group).config_class(plugin))}
    names |= Label.__annotations__.keys() | set(METHODS) | set(LayerKind) - {"FLOAT"}
    text = "".join(map(prose, ("docs/recipes.md", "docs/processors.md", "docs/outlier-suppression.md")))
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", text))))
    assert names - words == set()


def commands(page: str) -> list[str]:
    return [line for code in blocks(page, "bash") for line in code.splitlines() if "pip install -q --upgrade" in line]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_readme_commands(page: str) -> None:
    """The two commands: one that CI runs word by word, one whose files and options exist."""
    job, tests = commands(page)
    assert tests in read(".ci/run").splitlines()
    bootstrap, *runs = job.split(" && ")
    assert tests.startswith(f"{bootstrap} && ")
    known = {"quant": QuantRequest, "eval": EvalRequest}
    for run in runs:
        prefix, _, rest = run.partition(" slim ")
        assert prefix == ".uv/bin/uv run --no-dev"
        verb, *arguments = shlex.split(rest)
        options = {spelling for option in options_of(known[verb]) for spelling in option.spellings}
        assert {word for word in arguments if word.startswith("--")} <= options
        assert all((ROOT / word).exists() for word in arguments if word.startswith("examples/"))


def test_readmes_are_one_text_in_two_languages() -> None:
    english, chinese = "README.md", "README.zh-CN.md"
    levels = [re.findall(r"^(#{1,6}) ", prose(page), re.M) for page in (english, chinese)]
    assert levels[0] == levels[1]
    assert blocks(english) == blocks(chinese)
    tables = [len(re.findall(r"^\|", prose(page), re.M)) for page in (english, chinese)]
    assert tables[0] == tables[1]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run examples in, with ``examples/`` as in the repository."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PYTHON_PAGES = [
    "README.md",
    "docs/recipes.md",
    "docs/calibration.md",
    *(f"packages/{name}/README.md" for name in ("slim-core", "slim-llm", "slim-vlm", "slim-sd")),
]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_examples_run(page: str) -> None:
    codes = blocks(page, "python")
    assert codes
    for code in codes:
        exec(compile(code, page, "exec"), {"__name__": "example"})  # noqa: S102 - our own pages


def test_the_recipe_for_pictures_is_shown_as_it_is() -> None:
    recipe = read("examples/vlm-w8a8.yaml")
    for page in ("docs/recipes.md", "packages/slim-vlm/README.md"):
        assert recipe in blocks(page, "yaml")


def test_the_recipe_for_diffusion_models_is_shown_as_it_is() -> None:
    recipe = read("examples/sd-w8a8.yaml")
    for page in ("docs/diffusion.md", "packages/slim-sd/README.md"):
        assert recipe in blocks(page, "yaml")


def test_every_field_for_diffusion_models_is_described() -> None:
    names = {field.alias or name for model in (DumpConfig, SdConfig) for name, field in model.model_fields.items()}
    assert {"model_config", "inference_config", "time_steps"} <= names
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", prose("docs/diffusion.md")))))
    assert names | field_names(WanSettings).keys() | field_names(GeneralSettings).keys() <= words


def test_the_command_line_page_shows_the_help() -> None:
    """docs/cli.md shows ``--help`` of the verbs that are made from requests, word by word."""
    from slim_cli.main import app

    page = " ".join("".join(blocks("docs/cli.md", "console")).split())
    for verb in ("quant", "eval"):
        shown = CliRunner().invoke(app, [verb, "--help"], prog_name="slim")
        assert " ".join(shown.stdout.split()) in page


def test_extending_shows_the_example_package() -> None:
    """Every file of the plug-in that docs/extending.md shows is shown as it is."""
    shown = blocks("docs/extending.md", "python", "toml")
    files = [PLUGIN / "pyproject.toml", *sorted((PLUGIN / "src" / "slim_example").glob("[!_]*.py"))]
    assert {file.name for file in files if file.read_text("utf-8") in shown} == {file.name for file in files}


def quantize_with(apiversion: str, model: Path, out: Path, spec: dict[str, Any]) -> Any:
    recipe = recipe_from_dict({"apiversion": apiversion, "spec": spec})
    request = QuantRequest(model_path=model, save_path=out, model_type="example", device="cpu")
    shown: list[Any] = []
    result = find_service(apiversion).quantize(request, recipe, SilentProgress(), on_plan=shown.append)
    assert len(shown) == 1
    return result


def test_example_processor_beats_the_full_range(plugin: Path) -> None:
    for name in ("mse_quant", "linear_quant"):
        part: dict[str, Any] = {"type": name, "include": ["*.layers.0.*"]}
        if name == "linear_quant":
            part["qconfig"] = {"act": {"scope": "per_token"}, "weight": {}}
        spec = {"process": [part], "save": [{"type": "ascendv1_saver"}]}
        result = quantize_with("modelslim_v1", TINY, plugin / name, spec)
        assert {record.kind for record in result.linears} == {"W8A8_DYNAMIC"}
        assert len(result.linears) == 7
    weight = load_file(TINY / "model.safetensors")
    errors = [0.0, 0.0]
    for i, name in enumerate(("mse_quant", "linear_quant")):
        folder = AscendV1Folder(plugin / name)
        for prefix, _ in folder.layers():
            layer = folder.layer(prefix)
            assert layer is not None
            errors[i] += float((layer.dequantized() - weight[f"{prefix}.weight"].float()).square().sum())
    assert errors[0] < errors[1]


def test_example_saver_writes_an_ordinary_checkpoint(plugin: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = {"process": [{"type": "linear_quant", "qconfig": {"weight": {}}}], "save": [{"type": "float_saver"}]}
    quantize_with("modelslim_v1", TINY, plugin / "out", spec)
    name = "model.layers.0.mlp.down_proj.weight"
    original, written = (
        load_file(TINY / "model.safetensors")[name],
        load_file(plugin / "out" / "model.safetensors")[name],
    )
    scale = (original.float().abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.zeros_like(scale)
    assert torch.equal(written, dequantize(quantize(original, scale, zero, 8), scale, zero).to(original.dtype))
    model = AutoModelForCausalLM.from_pretrained(plugin / "out")
    assert torch.equal(model.state_dict()[name], written)


def test_example_service_streams_a_model_of_its_own(plugin: Path) -> None:
    from slim_example.service import Mlp, open_mlp

    torch.manual_seed(0)
    module, folder = Mlp(16, 3), plugin / "mlp"
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "example_mlp", "width": 16, "depth": 3}))
    samples = torch.randn(5, 16)
    save_file({"x": samples}, plugin / "x.safetensors")
    spec = {
        "process": [{"type": "linear_quant", "qconfig": {"act": {}, "weight": {}}}],
        "save": [{"type": "ascendv1_saver"}],
        "dataset": str(plugin / "x.safetensors"),
    }
    result = quantize_with("example_mlp_v1", folder, plugin / "out", spec)
    assert isinstance(open_mlp(folder), StreamedModel)
    assert (result.block_forwards, result.samples, len(result.linears)) == (15, 5, 6)
    seen = module.trunk[0].norm(samples).detach()
    first = next(record for record in result.linears if record.name == "trunk.0.up")
    assert (first.low, first.high) == pytest.approx((float(seen.min()), float(seen.max())), abs=1e-5)


def test_example_service_explores_its_model(plugin: Path) -> None:
    """Smoothing needs the example of an input; the model that is written computes the same."""
    from slim_example.service import Mlp

    torch.manual_seed(0)
    module, folder, x = Mlp(16, 3), plugin / "mlp", torch.randn(5, 16) * torch.logspace(0, 2, 16)
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "example_mlp", "width": 16, "depth": 3}))
    save_file({"x": x}, plugin / "x.safetensors")
    process = [{"type": "iter_smooth", "alpha": 0.5}]
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": str(plugin / "x.safetensors")}
    quantize_with("example_mlp_v1", folder, plugin / "out", spec)
    written = AscendV1Folder(plugin / "out").source
    state = {name: written.load(name) for name in written}
    assert not torch.equal(state["trunk.0.up.weight"], module.trunk[0].up.weight)
    smoothed = Mlp(16, 3)
    smoothed.load_state_dict(state)
    assert torch.allclose(smoothed(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page", named(MARKDOWN))
def test_tests_that_pages_name_exist(page: Path) -> None:
    for file, test in re.findall(r"`([\w/.-]+\.py)::(\w+)`", read(page)):
        assert f"def {test}(" in read(file)


_ASKED = {
    "per_channel": "per channel",
    "grouped": "in groups",
    "symmetric": "symmetric",
    "packed": "8 divides the input",
    "even_blocks": "64 divides the input",
    "whole_blocks": "32 divides the input",
    "alone": "no groups in the model",
}


def engine_table() -> list[str]:
    """Which engine of this format loads which of the types that Slim writes, as rows of Markdown."""
    tables: dict[str, Any] = yaml.safe_load(read("packages/slim-core/src/slim_core/savers/loader_tables.yaml"))
    names = [name for name in engines() if engine_format(name) == "ascendv1"]
    rows = [["type", *names], ["---"] * (1 + len(names))]
    for kind in LayerKind:
        label = {"WFP8AFP8_DYNAMIC": "W8A8FP8_DYNAMIC"}.get(kind, str(kind))
        cells: list[str] = []
        for name in names:
            places: dict[str, Any] = tables[name]["types"].get(label, {})
            told = (
                place + ("" if asked is True else f" ({', '.join(_ASKED[word] for word in asked)})")
                for place, asked in places.items()
            )
            cells.append(", ".join(told) or "-")
        rows.append([f"`{label}`", *cells])
    for kind in ("C8", "FAKQuant"):
        known = [tables[name].get("attention", {}).get(kind) for name in names]
        rows.append([f"`{kind}`", *(f"{' and '.join(places)} attention" if places else "-" for places in known)])
    return [f"| {' | '.join(row)} |" for row in rows]


def test_the_table_of_engines_is_the_one_in_use() -> None:
    assert "\n".join(engine_table()) in prose("docs/verify.md")

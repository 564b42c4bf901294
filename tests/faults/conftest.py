"""A workplace where everything is right, until a fault breaks one thing; and what must be true of the refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
RECIPE = """\
apiversion: modelslim_v1
metadata:
  config_id: good
  score: 50
  label: {w_bit: 8, a_bit: 8}
spec:
  runner: layer_wise
  process:
    - type: linear_quant
      qconfig:
        act:
          dtype: int8
          scope: per_tensor
          symmetric: false
          method: minmax
          ext: {aggregation_type: max}
        weight:
          dtype: int8
          scope: per_channel
          symmetric: true
          method: minmax
      include: ["*"]
      exclude: ["*.down_proj"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
  dataset:
    path: DATASET
    max_length: 32
"""
SAMPLES = (
    {"inputs_pretokenized": "A generator is a function that returns an iterator."},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, world!"}]},
    "量化把浮点数变成整数。",
)
_REPORT = re.compile(r"^error (\d{3} \w+): ", re.M)
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) .*")


@dataclass
class Workplace:
    """A model, a recipe, a calibration set, and the command that would quantize the one with the others.

    Faults change the files, ``options`` (None takes one out) and, for the outside world, use ``patch`` and ``cleanup``.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    options: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    cleanup: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"
        self.recipe = self.folder / "recipe.yaml"
        self.dataset = self.folder / "data.jsonl"
        self.save = self.folder / "out"
        self.options = {
            "model_path": str(self.model),
            "save_path": str(self.save),
            "model_type": "random",
            "device": "cpu",
            "config_path": str(self.recipe),
        }
        self.recipe.write_text(RECIPE.replace("DATASET", str(self.dataset)))
        self.dataset.write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def fill_save(self) -> None:
        """Put an older output where the new one goes."""
        self.save.mkdir()
        (self.save / "mine.txt").write_text("keep me")

    def edit(self, old: str, new: str) -> None:
        """Replace a part of the recipe."""
        text = self.recipe.read_text("utf-8")
        assert old in text
        self.recipe.write_text(text.replace(old, new), "utf-8")

    def configure(self, **changes: Any) -> None:
        """Set fields of ``config.json``; None removes one."""
        path = self.model / "config.json"
        config = {**json.loads(path.read_text("utf-8")), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def change(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Rewrite the weights after ``change`` was at the tensors."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})

    def split(self, edit: Callable[[dict[str, str]], object] = lambda listed: None) -> None:
        """Store the weights in two shards with an index; ``edit`` may make the index lie."""
        tensors = load_file(self.weights)
        self.weights.unlink()
        names = sorted(tensors)
        listed: dict[str, str] = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, self.model / file, {"format": "pt"})
            listed |= dict.fromkeys(part, file)
        edit(listed)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))

    def edit_header(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Rewrite the header of the weight file, its data untouched."""
        raw = self.weights.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    def run(self, *flags: str) -> Result:
        """``slim quant``, in this process; standard input is no terminal."""
        from slim_cli.main import app

        given = [(f"--{name}", value) for name, value in self.options.items() if value is not None]
        return CliRunner().invoke(app, ["quant", *(part for pair in given for part in pair), *flags])

    def listing(self) -> dict[str, tuple[int, bytes | str | None]]:
        """Every file, folder and link of the workplace with mode and content."""
        return {
            str(path.relative_to(self.folder)): (path.lstat().st_mode, _content(path))
            for path in sorted(self.folder.rglob("*"))
        }

    def fill(self, text: str) -> str:
        """``text`` with the paths of this workplace in the place of ``{recipe}`` and the like."""
        paths = {name: getattr(self, name) for name in ("folder", "model", "recipe", "dataset", "save", "weights")}
        return text.format(**paths)


def _content(path: Path) -> bytes | str | None:
    if path.is_symlink():
        return str(path.readlink())
    return path.read_bytes() if path.is_file() else None


@pytest.fixture(scope="session")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random blocks behind the tokenizer of the example."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("faults") / "model"
    config = Qwen3Config(
        vocab_size=json.loads((EXAMPLE / "config.json").read_text())["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


@pytest.fixture
def workplace(good_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A fresh one, and the current folder."""
    monkeypatch.delenv("MSMODELSLIM_LOG_LEVEL", raising=False)
    folder = tmp_path / "w"
    shutil.copytree(good_model, folder / "model")
    monkeypatch.chdir(folder)
    place = Workplace(folder, monkeypatch)
    with place.cleanup:
        yield place


@dataclass(frozen=True)
class Refusal:
    """How the command refused: exit status, code and class, the message, and what was logged before it."""

    status: int
    kind: str
    text: str
    log: str = ""


Refused = Callable[..., Refusal]


@pytest.fixture
def refused(workplace: Workplace) -> Refused:
    """Run the command of the workplace and hold its refusal against what is expected.

    The message must hold each part of ``what`` (separated by bars), ``where`` and ``remedy``. Nothing in the workplace
    may have changed. ``resumable``: there may be the hidden folders from which a run is resumed, and the way out may be
    in the warning that says so.
    """

    def check(
        kind: str, what: str, where: str, remedy: str, *flags: str, status: int = 1, resumable: bool = False
    ) -> Refusal:
        before = workplace.listing()
        found = workplace.run(*flags)
        refusal = read_refusal(found)
        assert (refusal.status, refusal.kind) == (status, kind), found.output
        parts = [workplace.fill(part) for part in (*what.split(" | "), where)]
        lacking = [part for part in parts if part not in refusal.text]
        if remedy not in (refusal.log + refusal.text if resumable else refusal.text):
            lacking.append(remedy)
        if lacking:
            pytest.fail(f"{lacking} not in: {refusal.text}", pytrace=False)
        after = workplace.listing()
        if resumable:
            hidden = (".out.slim-partial", ".out.slim-calib")
            after = {name: state for name, state in after.items() if not name.startswith(hidden)}
        assert after == before
        return refusal

    return check


def read_refusal(found: Result) -> Refusal:
    """The message of a failed command, which is the end of standard error, with nothing but log lines before it."""
    assert "Traceback" not in found.output, found.output
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output
    if found.exit_code == 2:
        return Refusal(2, "usage", found.stderr)
    begin = _REPORT.search(found.stderr)
    assert begin, found.output
    noise = [line for line in found.stderr[: begin.start()].splitlines() if not _LOG_LINE.fullmatch(line)]
    assert not noise, found.output
    assert 'File "' not in found.stderr
    return Refusal(found.exit_code, begin[1], found.stderr[begin.end() :], found.stderr[: begin.start()])

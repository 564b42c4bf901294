"""The workplace of the other faults with a tiny Wan2.1 pipeline and a recipe that needs calibration inputs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parents[3] / "packages" / "slim-sd" / "tests"
RECIPE = """\
apiversion: multimodal_sd_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*"]
      exclude: ["*ffn.2*"]
  save:
    - type: mindie_format_saver
      part_file_size: 0
  multimodal_sd_config:
    dump_config:
      capture_mode: args
      dump_data_dir: ""
    model_config:
      prompt: a red fox in the snow
      size: "64*64"
      frame_num: 5
      sample_steps: 2
      offload_model: true
"""


def beside(name: str) -> Any:
    """A module of the tests of slim-sd, which import one another by these names."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TINY / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``tiny_folder(name, **options)``: a tiny pipeline, only to be read or copied."""
    for name in ("tiny_tokenizers", "tiny_components", "tiny_wan", "tiny_pipelines"):
        beside(name)
    made: dict[str, Path] = {}

    def folder(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(name) / "model"
            made[key] = sys.modules["tiny_pipelines"].build(name, path, **options)
        return made[key]

    return folder


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures: drawing takes longer than all the rest of a small run."""
    monkeypatch.setattr("slim_core.evaluation.report.write.draw_plots", lambda _data: {})


def with_pipelines(base: Any, tiny_folder: Any) -> Any:
    """The class of the workplace below, whose base is that of the other faults."""

    class SdWorkplace(base):
        @property
        def weights(self) -> Path:
            return self.model / "transformer" / "diffusion_pytorch_model.safetensors"

        @property
        def config(self) -> Path:
            return self.model / "transformer" / "config.json"

        @property
        def capture(self) -> Path:
            """Where captured inputs are kept that the recipe names no other place for."""
            return self.save / "calib_data.pth"

        def become(self, name: str, **options: Any) -> None:
            """Put another pipeline in the place of Wan2.1."""
            shutil.rmtree(self.model)
            shutil.copytree(tiny_folder(name, **options), self.model)

        def configure(self, **changes: Any) -> None:
            """Set fields of the transformer's configuration; None removes one."""
            config = {**json.loads(self.config.read_text("utf-8")), **changes}
            self.config.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

        def set_index(self, **changes: Any) -> None:
            """Set entries of ``model_index.json``; None removes one."""
            path = self.model / "model_index.json"
            index = {**json.loads(path.read_text("utf-8")), **changes}
            path.write_text(json.dumps({key: value for key, value in index.items() if value is not None}))

        def say(self, **changes: Any) -> None:
            """Change or add settings of the model_config of the recipe; None removes one."""
            lines = self.recipe.read_text("utf-8").splitlines()
            for name, value in changes.items():
                lines = [line for line in lines if not line.startswith(f"      {name}: ")]
                if value is not None:
                    lines.append(f"      {name}: {value}")
            self.recipe.write_text("\n".join(lines) + "\n", "utf-8")

        def need_no_data(self) -> None:
            """Let the recipe quantize dynamically."""
            self.edit(
                "scope: per_tensor, dtype: int8, symmetric: false", "scope: per_token, dtype: int8, symmetric: true"
            )

        def dump_elsewhere(self) -> Path:
            """Keep captured inputs in a folder of their own; gives the file."""
            self.edit('dump_data_dir: ""', "dump_data_dir: captured")
            return self.folder / "captured" / "calib_data.pth"

    return SdWorkplace


@pytest.fixture
def workplace(workplace, tiny_folder):
    place = with_pipelines(type(workplace), tiny_folder)(workplace.folder, workplace.patch, cleanup=workplace.cleanup)
    place.become("wan2_1_t2v")
    place.dataset.unlink()
    place.recipe.write_text(RECIPE)
    return place

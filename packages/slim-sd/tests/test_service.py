"""The service as others find it: by its apiversion, by a model's name or folder, without loading torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slim_core.service import find_service
from slim_sd.recipe import SpecSd
from slim_sd.resources import PRACTICE_FOLDER
from slim_sd.service import DiffusionService

PipelineFolder = Callable[..., Path]


def test_it_is_found_by_its_apiversion() -> None:
    service = find_service("multimodal_sd_modelslim_v1")
    assert isinstance(service, DiffusionService)
    assert service.spec_type() is SpecSd


def test_it_brings_practices_and_knows_names() -> None:
    service = DiffusionService()
    assert service.practice_folders() == [PRACTICE_FOLDER]
    assert (PRACTICE_FOLDER / "wan2_1" / "wan2_1_w8a8_dynamic.yaml").is_file()
    assert service.pedigree("Wan2.1") == "wan2_1"
    assert service.pedigree("wan2.1") is None
    assert service.pedigree("Qwen3-8B") is None


def test_it_handles_diffusion_models_in_both_layouts(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    service = DiffusionService()
    for model in (
        pipeline_folder("flux"),
        pipeline_folder("wan2_1_t2v", layout="original"),
        pipeline_folder("wan2_2_t2v", layout="original"),
    ):
        assert service.handles(model)
        assert not service.handles(model, images=True)
    assert not service.handles(pipeline_folder("flux") / "transformer")
    assert not service.handles(tmp_path)
    assert not service.handles(tmp_path / "nothing")


def test_torch_is_loaded_when_work_begins() -> None:
    code = (
        "import sys; from slim_sd.service import DiffusionService; from slim_sd import __main__;"
        "DiffusionService().pedigree('Wan2.1');"
        "print(sorted({'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "[]"

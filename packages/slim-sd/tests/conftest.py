"""Tiny diffusion pipelines, each made once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _beside(name: str) -> ModuleType:
    """A module in this folder, which is no package; those beside it import it by this name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny_wan() -> ModuleType:
    """``tiny_wan.py`` in this folder."""
    for name in ("tiny_tokenizers", "tiny_components"):
        _beside(name)
    return _beside("tiny_wan")


@pytest.fixture(scope="session")
def tiny_pipelines(tiny_wan: ModuleType) -> ModuleType:
    """``tiny_pipelines.py`` in this folder."""
    return _beside("tiny_pipelines")


PipelineFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory, tiny_pipelines: ModuleType) -> PipelineFolder:
    """``pipeline_folder(name, **options)``: a tiny model folder, only to be read; options are those of build."""
    made: dict[str, Path] = {}

    def folder(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = tiny_pipelines.build(name, tmp_path_factory.mktemp(name) / "model", **options)
        return made[key]

    return folder


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr("slim_core.evaluation.report.write.draw_plots", lambda data: {})

"""Tiny vision-language models, each made once."""

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
def tiny_processors() -> ModuleType:
    """``tiny_processors.py`` in this folder."""
    return _beside("tiny_processors")


@pytest.fixture(scope="session")
def tiny_vlms(tiny_processors: ModuleType) -> ModuleType:
    """``tiny_vlms.py`` in this folder."""
    _beside("tiny_families")
    return _beside("tiny_vlms")


VlmFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_vlms: ModuleType) -> VlmFolder:
    """``vlm_folder(family, **options)``: the folder of a tiny model, only to be read; options are those of build."""
    made: dict[str, Path] = {}

    def folder(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = tiny_vlms.build(family, tmp_path_factory.mktemp(family) / "model", **options)
        return made[key]

    return folder

"""Layers of every kind, for the tests of what is checked in a layer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    """A module in this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"slim_core_verify_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


KINDS = _load("kinds")


@pytest.fixture
def kinds() -> ModuleType:
    """What builds the layers, ``kinds.py`` in this folder."""
    return KINDS


@pytest.fixture(params=KINDS.KINDS)
def every_kind(request: pytest.FixtureRequest) -> str:
    """The name of each kind, one after the other."""
    return request.param

"""A model as transformers has it, and as Slim opens it; tiny models for the tests of attentions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slim_core.model.streamed import StreamedModel
from slim_llm.models.loading import open_model


def in_memory(model: nn.Module) -> Any:
    """The model with tensors that are no views of a file: how they are aligned there decides how sums are rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
    return model.eval()


@pytest.fixture(scope="session")
def plain() -> Callable[[Path], Any]:
    """``plain(folder)``: the model as transformers has it, with the forward that indexes the stacks of experts."""

    def load(folder: Path) -> Any:
        options = {"dtype": torch.float32, "experts_implementation": "eager"}
        return in_memory(AutoModelForCausalLM.from_pretrained(folder, **options))

    return load


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], tuple[StreamedModel, Any]]:
    """``opened(folder)``: the model as Slim opens it, all of it loaded, and its module."""

    def load(folder: Path) -> tuple[StreamedModel, Any]:
        model = open_model(folder)
        model.load([name for unit in model.units for name in unit.parameters], torch.device("cpu"))
        assert not [name for name, parameter in model.module.named_parameters() if parameter.is_meta]
        return model, in_memory(model.module)

    return load


def _load(name: str) -> ModuleType:
    """A module in this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"slim_llm_models_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TINY = _load("tiny_attentions")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """``tiny_attentions.py`` in this folder."""
    return TINY


@pytest.fixture(params=TINY.FAMILIES)
def every_family(request: pytest.FixtureRequest) -> str:
    """The families of tiny models, one after the other."""
    return request.param


@pytest.fixture(params=TINY.MODERN)
def modern_family(request: pytest.FixtureRequest) -> str:
    """Those families whose attentions show their queries."""
    return request.param

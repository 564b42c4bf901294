"""Adapters: data about a model family, found through entry points."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import pytest

from slim_core.errors import EnvError
from slim_core.model import adapter as module
from slim_core.model.adapter import ADAPTER_GROUP, ModelAdapter, find_adapter

GOOD = ModelAdapter(blocks="trunk", tensor_name=str.upper)


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("good", "family_of_a_third_party:good", ADAPTER_GROUP),
        EntryPoint("wrong", "family_of_a_third_party:wrong", ADAPTER_GROUP),
        EntryPoint("gone", "no_such_module_here:adapter", ADAPTER_GROUP),
    ]
    monkeypatch.setattr(module, "entry_points", lambda **given: EntryPoints(points).select(**given))
    monkeypatch.setitem(sys.modules, "family_of_a_third_party", SimpleNamespace(good=GOOD, wrong="something else"))


@pytest.mark.usefixtures("_installed")
def test_an_adapter_is_found_by_model_type() -> None:
    assert find_adapter("good") is GOOD


@pytest.mark.usefixtures("_installed")
def test_most_families_need_none() -> None:
    found = find_adapter("qwen3")
    assert found == ModelAdapter()
    assert found.tensor_name("model.norm.weight") == "model.norm.weight"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(("model_type", "message"), [("wrong", "is no ModelAdapter"), ("gone", "cannot be imported")])
def test_a_broken_adapter_is_named(model_type: str, message: str) -> None:
    with pytest.raises(EnvError, match=f"{model_type!r}.*{message}"):
        find_adapter(model_type)

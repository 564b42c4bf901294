"""The service of a package that cannot quantize yet says so, and gets in nobody's way."""

from __future__ import annotations

from pathlib import Path

import pytest

from slim_core.errors import UnsupportedError
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest, QuantRequest, find_service
from slim_sd.service import DiffusionService

REQUEST = QuantRequest(model_path=Path("model"), save_path=Path("out"), model_type="any")


def test_it_is_found_by_its_apiversion() -> None:
    assert isinstance(find_service("multimodal_sd_modelslim_v1"), DiffusionService)


def test_it_claims_no_model_and_brings_no_practice() -> None:
    service = DiffusionService()
    assert not service.handles(Path("model"))
    assert service.pedigree("Qwen3-8B") is None
    assert service.practice_folders() == []


def test_every_request_is_refused_with_the_package_to_upgrade() -> None:
    service = DiffusionService()
    for ask in (
        lambda: service.plan(REQUEST, None),
        lambda: service.quantize(REQUEST, None, SilentProgress()),
        lambda: service.evaluate(EvalRequest(model_path=Path("model")), SilentProgress()),
    ):
        with pytest.raises(UnsupportedError, match=r"cannot quantize diffusion transformers yet.*upgrade slim-sd"):
            ask()

"""Runs whose feed-forward parts are given some tokens at a time, against runs that give them all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slim_core.model import portions

INT8: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True}


def linear(act: dict[str, Any], weight: dict[str, Any] = INT8) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}}


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Portions of a few tokens; the lengths of all that parts are given by them."""
    seen: list[int] = []
    real = portions._in_portions  # pyright: ignore[reportPrivateUsage]

    def watched(forward: Any, *given: Any) -> Any:
        def noting(x: Any) -> Any:
            seen.append(x.shape[-2])
            return forward(x)

        return real(noting, *given)

    monkeypatch.setattr(portions, "_in_portions", watched)
    return seen


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("family", "process", "options"),
    [
        ("qwen3", [linear(STATIC)], {}),
        ("qwen3", [{"type": "iter_smooth"}, linear(STATIC | {"method": "histogram"})], {}),
        ("qwen3", [linear(TOKEN, INT8 | {"method": "gptq"})], {"propagate": "quantized"}),
        ("deepseek_v3", [linear(STATIC)], {}),  # the shared expert, and the dense first block
    ],
)
def test_portions_change_no_more_than_the_last_bits(
    naive: ModuleType,
    model_folder: Callable[..., Path],
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    family: str,
    process: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    model = model_folder(family, torch.float32)
    quantize(model, tmp_path / "whole", process=process, **options)
    longest = max(lengths)
    lengths.clear()
    monkeypatch.setattr(portions, "_BYTES", 7 * 48 * 2)
    quantize(model, tmp_path / "out", process=process, **options)
    assert max(lengths) <= 7 * 48 // 32 < longest
    assert len(set(lengths)) > 1  # the last tokens of a sample
    whole, parts = naive.read(tmp_path / "whole"), naive.read(tmp_path / "out")
    assert set(whole.tensors) == set(parts.tensors)
    for name, tensor in whole.tensors.items():
        other = parts.tensors[name]
        if tensor.dtype == torch.int8:
            assert (tensor.int() - other.int()).abs().max() <= 1, name
            assert (tensor != other).float().mean() < 0.01, name
        else:
            assert torch.allclose(tensor.double(), other.double(), rtol=1e-2, atol=1e-6), name


@pytest.mark.usefixtures("no_plots")
def test_samples_stay_whole_where_their_extremes_are_asked_for(
    model_folder: Callable[..., Path],
    quantize: Callable[..., Any],
    content: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
) -> None:
    model = model_folder("qwen3")
    process = [linear(STATIC | {"ext": {"aggregation_type": "mean"}})]
    quantize(model, tmp_path / "whole", process=process)
    monkeypatch.setattr(portions, "_BYTES", 1)
    quantize(model, tmp_path / "out", process=process)
    assert not lengths
    assert content(tmp_path / "out") == content(tmp_path / "whole")

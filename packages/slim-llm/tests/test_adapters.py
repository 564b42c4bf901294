"""What an adapter says of subgraphs, in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.errors import UnsupportedError
from slim_core.model.adapter import ModelAdapter
from slim_core.model.subgraphs import GivenSubgraph
from slim_llm.models import loading

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
SMOOTH = [{"type": "iter_smooth"}]


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelAdapter], None]:
    return lambda adapter: monkeypatch.setattr(loading, "find_adapter", lambda _type: adapter)


def smoothed(folder: Path) -> set[tuple[str, str]]:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    return {(one["type"], one["source"].removeprefix("model.layers.1.")) for one in report["smoothing"]}


def test_a_source_is_left_alone(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, adapted: Callable[[ModelAdapter], None]
) -> None:
    adapted(ModelAdapter(unsmoothed=("*.post_attention_layernorm", "*.v_proj")))
    result = quantize(model_folder("llama"), tmp_path / "out", process=SMOOTH)
    own = {pair for pair in smoothed(tmp_path / "out") if not pair[1].startswith("model.")}
    assert own == {("norm-linear", "input_layernorm"), ("up-down", "mlp.up_proj")}
    assert any("adapter says to leave it alone" in warning for warning in result.warnings)


def test_a_subgraph_that_does_not_hold_is_refused_with_the_reason(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, adapted: Callable[[ModelAdapter], None]
) -> None:
    adapted(ModelAdapter(subgraphs=(GivenSubgraph("up-down", "gate_proj", "down_proj"),)))
    result = quantize(model_folder("llama"), tmp_path / "out", process=SMOOTH)
    assert ("up-down", "mlp.gate_proj") not in smoothed(tmp_path / "out")
    assert ("up-down", "mlp.up_proj") in smoothed(tmp_path / "out")
    assert any("gate_proj" in warning and "changes what" in warning for warning in result.warnings)


def test_shapes_that_do_not_fit_stop_the_run(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, adapted: Callable[[ModelAdapter], None]
) -> None:
    adapted(ModelAdapter(subgraphs=(GivenSubgraph("ov", "v_proj", "o_proj", first_row=1),)))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.v_proj: .*adapter"):
        quantize(model_folder("llama"), tmp_path / "out", process=SMOOTH)
    assert not (tmp_path / "out").exists()

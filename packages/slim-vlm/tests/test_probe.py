"""``--probe`` of vision-language models: towers are tried as blocks are, and the run is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.runners import probe as probing

VlmFolder = Callable[..., Path]
Quantize = Callable[..., Any]


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "internvl"])
@pytest.mark.parametrize("rule", ["static", "dynamic"])
def test_the_run_is_the_same(
    family: str,
    rule: str,
    vlm_folder: VlmFolder,
    quantize: Quantize,
    rules: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probing, "_WRITTEN", 1 << 20)
    seen: list[set[str]] = []
    whole = probing.probe

    def noted(plan: Any, *given: Any, **options: Any) -> Any:
        time = whole(plan, *given, **options)
        seen.append({phase for phase, seconds in time.parts.items() if seconds > 0})
        return time

    monkeypatch.setattr("slim_core.job.probe", noted)
    folder = vlm_folder(family)
    quantize(folder, tmp_path / "plain", process=[rules[rule]])
    assert not seen
    quantize(folder, tmp_path / "out", process=[rules[rule]], options={"probe": True})
    (phases,) = seen
    assert phases >= ({"forwards", "quantizing"} if rule == "static" else {"quantizing"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    for path in (tmp_path / "plain").rglob("*.safetensors"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "plain")).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["predicted_seconds"] > 0

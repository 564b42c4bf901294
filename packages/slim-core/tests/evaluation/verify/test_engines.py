"""What an engine cannot load, and linears that engines fuse."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slim_core.evaluation.verify import verify_folder

DOWN = "model.layers.1.mlp.down_proj"  # engines cut it along its input
ENGINES: dict[str, tuple[str, str, str | None]] = {
    "groups of eight bits": (
        "vllm-ascend",
        "W8A8_DYNAMIC grouped",
        "loads W8A8_DYNAMIC linear layers only per channel",
    ),
    "offsets": ("vllm-ascend", "W8A16 grouped asymmetric", "loads W8A16 linear layers only per channel"),
    "offsets of four bits": ("mindie-sd", "W4A16 asymmetric", "only without weight_offset; quantize symmetrically"),
    "weights of four bits": ("vllm-ascend", "W4A16", "has no class for W4A16 linear layers"),
    "weights of four bits elsewhere": ("mindie-llm", "W4A16 grouped asymmetric", None),
    "the reference's name": ("vllm-ascend", "FP8", "write them with fp8_label: W8A8FP8_DYNAMIC"),
    "the engine's name": ("vllm-ascend", "FP8 as the engine calls it", None),
    "linears of W4A8": ("vllm-ascend", "W4A8", "has no class for W4A8_DYNAMIC linear layers"),
    "dense W4A8": ("mindie-llm", "W4A8", "loads W4A8_DYNAMIC linear layers only in groups"),
    "dense W4A8 in two levels": ("mindie-llm", "W4A8 in two levels", None),
    "sparse on its chip": ("vllm-ascend-310p", "W8A8S", None),
    "pruned": ("vllm-ascend", "W16A16S", "has no class for W16A16S linear layers"),
    "dual scales": ("vllm-ascend", "dual scale", "has no class for W4A4_MXFP4_DUALSCALE linear layers"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_engines(kinds: ModuleType, case: str, draft: Any, tmp_path: Path) -> None:
    engine, name, message = ENGINES[case]
    kinds.put(draft, name, kinds.matrix())
    about = [text for text in kinds.verified(draft, tmp_path, engine).problems if text.startswith(DOWN)]
    assert len(about) == (message is not None), about
    assert all(engine in text and message in text for text in about)


def test_odd_blocks(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "MXFP8 with MXFP4", kinds.matrix(columns=96))
    found = kinds.verified(draft, tmp_path, "vllm-ascend")
    assert any("only if 64 divides their input features" in text for text in found.problems)


def test_layers_that_an_engine_refuses_together(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W4A16 grouped", kinds.matrix())
    for expert in range(2):
        kind = ("W4A8_DYNAMIC", lambda w: kinds.w4a8(w, 16), 32)
        kinds.put(draft, kind, kinds.matrix(), f"model.layers.0.mlp.experts.{expert}.down_proj")
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
    text = "only in models without grouped or MX layers (here model.layers.1.mlp.down_proj)"
    assert any(text in warning for warning in found.warnings)


def test_an_engine_of_another_format(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    found = kinds.verified(draft, tmp_path, "mindie-sd")
    assert any("mindie-sd wants other files around its layers" in text for text in found.problems)
    folder = tmp_path / "out"
    assert not any(entry.engine == "mindie-sd" for entry in verify_folder(folder).loadable)


def test_fused_linears_need_one_size_of_groups(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    for leaf, name in (("gate_proj", "W8A8_DYNAMIC grouped"), ("up_proj", "W8A8_DYNAMIC grouped")):
        kinds.put(draft, name, kinds.matrix(), f"model.layers.0.mlp.{leaf}")
    assert not kinds.verified(draft, tmp_path).problems
    kinds.put(
        draft, ("W8A8_DYNAMIC", lambda w: kinds.integers(w, 8, 64), 32), kinds.matrix(), "model.layers.0.mlp.up_proj"
    )
    found = verify_folder(draft.write(tmp_path / "more"))
    text = "gate_proj is W8A8_DYNAMIC in groups of 32, up_proj is W8A8_DYNAMIC in groups of 64"
    assert any(text in problem for problem in found.problems), found.text()


def test_fused_sparse_linears_see_their_input_alike(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    for leaf in ("gate_proj", "up_proj"):
        kinds.put(draft, "W8A8S", kinds.matrix(), f"model.layers.0.mlp.{leaf}")
    draft.tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor([0.0625])
    found = kinds.verified(draft, tmp_path)
    assert any("up_proj.input_scale: is 0.0625, expected 0.03125" in text for text in found.problems)


@pytest.mark.parametrize("part", ["input_scale", "input_offset"])
def test_queries_of_a_cross_attention_may_see_another_input(
    kinds: ModuleType, part: str, draft: Any, tmp_path: Path
) -> None:
    """Keys and values agree there; where these differ, no attention is right."""
    attention = "model.layers.0.self_attn"
    for leaf in ("q_proj", "k_proj", "v_proj"):
        kinds.put(draft, "W8A8S", kinds.matrix(), f"{attention}.{leaf}")
    name = f"{attention}.q_proj.{part}"
    draft.tensors[name] = draft.tensors[name] / 2 if part == "input_scale" else draft.tensors[name] + 1
    for folder in ("queries", "values"):
        (tmp_path / folder).mkdir()
    found = kinds.verified(draft, tmp_path / "queries")
    assert not any("engines fuse" in text for text in found.problems)
    assert [text for text in found.warnings if text.startswith(name)]
    name = f"{attention}.v_proj.{part}"
    draft.tensors[name] = draft.tensors[name] * 4
    found = kinds.verified(draft, tmp_path / "values")
    assert any(text.startswith(name) and "engines fuse them" in text for text in found.problems)

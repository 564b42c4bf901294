"""Biases that an asymmetric smoothing leaves in norms and linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slim_core.evaluation.verify import verify_folder

O = "model.layers.1.self_attn.o_proj"  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj"
LAYER = "model.layers.0"
NORM = f"{LAYER}.input_layernorm"


def shifted(draft: Any, *linears: str, value: float = 0.5) -> None:
    """A norm that was given a bias, and linears that were given one to make up for it."""
    draft.tensors[f"{NORM}.bias"] = torch.full((16,), value)
    draft.types[f"{NORM}.bias"] = "FLOAT"
    for linear in linears:
        draft.tensors[f"{linear}.bias"] = torch.full((len(draft.tensors[f"{linear}.weight"]),), value)
        draft.types[f"{linear}.bias"] = "FLOAT"
        if f"{linear}.quant_bias" in draft.tensors:
            extra = draft.tensors[f"{linear}.bias"].double() / draft.tensors[f"{linear}.deq_scale"].double()
            exact = -draft.tensors[f"{linear}.input_offset"].double() * draft.tensors[f"{linear}.weight"].double().sum(
                1
            )
            draft.tensors[f"{linear}.quant_bias"] = (exact + extra).round().to(torch.int32)


SHIFT = """\
spec:
  process:
    - {type: iter_smooth, symmetric: false}
    - {type: linear_quant, qconfig: {weight: {method: minmax}}}
"""


def test_a_shift_may_leave_biases(draft: Any, tmp_path: Path) -> None:
    draft.recipe = SHIFT
    shifted(draft, f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj")
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert len(found.warnings) == 1  # that layers were not compared


def test_a_shifted_bias_is_finite(draft: Any, tmp_path: Path) -> None:
    draft.recipe = SHIFT
    shifted(draft)
    draft.set(f"{NORM}.bias", 3, float("nan"))
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.problems == [f"{NORM}.bias: holds NaN or infinity"]


def test_biases_that_the_engine_drops(draft: Any, tmp_path: Path) -> None:
    draft.recipe = SHIFT
    shifted(draft, f"{LAYER}.self_attn.k_proj", DOWN, O)
    original = draft.write_original(tmp_path / "model")
    found = verify_folder(draft.write(tmp_path / "out"), original)
    assert not found.problems
    dropped = {warning.partition(":")[0] for warning in found.warnings if "drops it" in warning}
    assert dropped == {f"{DOWN}.bias", f"{O}.bias"}
    shifted(draft, DOWN, O, value=0.0)
    found = verify_folder(draft.write(tmp_path / "zeros"), original)
    assert not [warning for warning in found.warnings if "drops it" in warning]


def test_biases_that_no_shift_explains(draft: Any, tmp_path: Path) -> None:
    shifted(draft)
    original = draft.write_original(tmp_path / "model")
    found = verify_folder(draft.write(tmp_path / "out"), original)
    assert f"{NORM}.bias: is not in the original" in found.warnings
    draft.recipe = None
    found = verify_folder(draft.write(tmp_path / "foreign"), original)
    (warning,) = [text for text in found.warnings if "not in the original" in text]
    assert warning == f"{NORM}.bias: is not in the original, like 1 biases; an asymmetric smoothing leaves such"

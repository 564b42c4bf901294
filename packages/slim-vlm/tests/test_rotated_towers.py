"""Rotations that take images in: what makes hidden states of them is rotated with the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.errors import SlimError
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest
from slim_vlm.service import VlmService

VlmFolder = Callable[..., Path]
Quantize = Callable[..., Any]


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "llava", "mistral3", "idefics3"]
)
def test_a_rotated_model_computes_the_same(
    family: str, vlm_folder: VlmFolder, pictures: Path, quantize: Quantize, tmp_path: Path
) -> None:
    folder = vlm_folder(family, dtype=torch.float32)
    quantize(folder, tmp_path / "out", process=[{"type": "quarot", "block_size": 16}])
    request = EvalRequest(model_path=folder, quantized=tmp_path / "out", dataset=str(pictures), device="cpu")
    scores = VlmService().evaluate(request, SilentProgress())
    assert scores.kl_divergence is not None
    assert scores.kl_divergence < 1e-6
    assert scores.top1_agreement == 1.0
    assert scores.logits_sqnr_db is not None
    assert scores.logits_sqnr_db > 80


def test_what_makes_hidden_states_of_an_image_is_rotated_too(
    vlm_folder: VlmFolder, quantize: Quantize, naive: ModuleType, tmp_path: Path
) -> None:
    folder = vlm_folder("qwen3_vl_moe", dtype=torch.float32)
    quantize(folder, tmp_path / "out", process=[{"type": "quarot", "block_size": 16}])
    stored, _ = naive.read_tensors(folder)
    written = naive.read(tmp_path / "out").tensors
    rotation = naive.read_tensors(tmp_path / "out" / "optional")[0]["global_rotation"]
    writers = ["model.visual.merger.linear_fc2"]
    writers += [f"model.visual.deepstack_merger_list.{i}.linear_fc2" for i in range(3)]
    changed = {n for n in stored if n in written and "visual" in n and not torch.equal(stored[n], written[n])}
    assert changed == {f"{name}.{part}" for name in writers for part in ("weight", "bias")}
    for name in writers:
        torch.testing.assert_close(written[f"{name}.weight"], rotation.T @ stored[f"{name}.weight"])
        torch.testing.assert_close(written[f"{name}.bias"], rotation.T @ stored[f"{name}.bias"])


@pytest.mark.parametrize(
    ("family", "what"),
    [("gemma3", "passes a norm"), ("aya_vision", "subtracts the mean")],
)
def test_what_cannot_be_rotated_is_refused(
    family: str, what: str, vlm_folder: VlmFolder, quantize: Quantize, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match=what):
        quantize(vlm_folder(family), tmp_path / "out", process=[{"type": "quarot", "block_size": 16}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["scaled", "mixed"])
def test_pictures_that_do_not_enter_as_the_output_of_a_linear(
    change: str, vlm_folder: VlmFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    made = LlavaMultiModalProjector.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        found = made(self, *args, **kwargs)
        return found * 3 if change == "scaled" else found + found.roll(1, -1)

    monkeypatch.setattr(LlavaMultiModalProjector, "forward", changed)
    with pytest.raises(SlimError, match="not the output of a linear as it is"):
        quantize(vlm_folder("llava"), tmp_path / "out", process=[{"type": "quarot", "block_size": 16}])
    assert list(tmp_path.iterdir()) == []

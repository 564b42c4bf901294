"""What smoothing and rotations leave, seen by a stranger: the written tensors in a model of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slim_core.model.subgraphs import is_norm
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest
from slim_llm.service import LlmService


@pytest.fixture(autouse=True)
def _without_plots(no_plots: None) -> None:
    """No test here looks at them."""


class Stranger:
    """Opens folders of models, and folders that a run has written a float model to."""

    def __init__(self, naive: ModuleType) -> None:
        self._naive = naive

    def tensors(self, folder: Path) -> dict[str, Tensor]:
        return self._naive.read_tensors(folder)[0]

    def as_model(self, written: Path) -> Path:
        """A copy of what a run has written, under the names that transformers looks for."""
        folder = written.with_name(f"{written.name}-model")
        if not folder.exists():
            shutil.copytree(
                written,
                folder,
                ignore=shutil.ignore_patterns("*.safetensors*", "quant_model_description.json", "optional"),
            )
            save_file(self.tensors(written), folder / "model.safetensors", {"format": "pt"})
        return folder

    def opened(self, folder: Path) -> Any:
        """The model of a folder in float32; biases that its classes do not have are given to linears, and added to the
        outputs of norms."""
        if (folder / "quant_model_description.json").exists():
            folder = self.as_model(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        net, told = loaded
        assert not told["missing_keys"]
        known, modules = dict(net.named_parameters()), dict(net.named_modules())
        for name, bias in self.tensors(folder).items():
            path, _, leaf = name.rpartition(".")
            if leaf != "bias" or name in known or path not in modules:
                continue
            if isinstance(modules[path], nn.Linear):
                modules[path].bias = nn.Parameter(bias)
            else:
                assert is_norm(modules[path])
                modules[path].register_forward_hook(lambda _m, _a, output, bias=bias: output + bias)
        return net.eval()

    @staticmethod
    def logits(net: Any, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        with torch.no_grad():
            return [net(input_ids=torch.tensor([each]), use_cache=False).logits for each in ids]

    @staticmethod
    def far(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
        """The largest difference, relative to the largest value."""
        return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(want, got, strict=True))

    def error(self, model: Path, written: Path, ids: Sequence[Sequence[int]]) -> float:
        """How far the logits of what was written are off."""
        want, got = (self.logits(self.opened(folder), ids) for folder in (model, written))
        return self.far(want, got)

    @staticmethod
    def scores(model: Path, written: Path, text: str, **options: Any) -> Any:
        """Slim's own evaluation: the written files held against the model."""
        path = written.with_name(f"{written.name}.txt")
        path.write_text(text)
        request = EvalRequest(model_path=model, quantized=written, text=path, device="cpu", **options)
        return LlmService().evaluate(request, SilentProgress())


@pytest.fixture(scope="session")
def stranger(naive: ModuleType) -> Stranger:
    return Stranger(naive)

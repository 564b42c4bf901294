"""What the tests of recording share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from slim_sd.captured.recorder import Recorder


class Layer(nn.Module):
    """A stand-in for a transformer: any values may be passed, and what comes is changed in place."""

    def forward(self, hidden_states: Tensor, timestep: Any = 1, *, extra: Any = None, **others: Any) -> Tensor:
        return hidden_states.add_(1)


class Recording:
    """Recording the calls of a module, and what lies in the files afterwards."""

    SETTINGS: ClassVar[dict[str, Any]] = {"size": "32*32", "sample_steps": 3}
    Layer = Layer

    def recorder(self, module: nn.Module, path: Path) -> Recorder:
        return Recorder(module, path, fingerprint="model", settings=self.SETTINGS)

    def records(self, path: Path) -> list[list[Any]]:
        return torch.load(path, weights_only=True)

    def capture(self, path: Path, *calls: dict[str, Any], module: nn.Module | None = None) -> list[list[Any]]:
        module = Layer() if module is None else module
        with self.recorder(module, path):
            for call in calls:
                module(**call)
        return self.records(path)

    def left(self, folder: Path) -> list[str]:
        return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def recording() -> Recording:
    return Recording()

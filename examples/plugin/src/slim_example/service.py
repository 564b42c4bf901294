"""``example_mlp_v1``: a model that is no transformers model, streamed and quantized like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.staging import check_target
from slim_core.devices import resolve_devices
from slim_core.errors import UnsupportedError
from slim_core.fingerprint import fingerprint
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.progress import Progress
from slim_core.recipe import Recipe, SpecV1, dump_recipe
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.run import RunResult, run_plan
from slim_core.service import EvalRequest, QuantRequest

__all__ = ["Mlp", "MlpService", "open_mlp"]


class Block(nn.Module):
    """A residual block of two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """``x``: ``(samples, width)``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.trunk:
            x = block(x)
        return self.head(x)


def open_mlp(folder: Path) -> StreamedModel:
    """The model with its parameters on ``meta``, over the weights in the folder."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with parameters_on_meta():
        module = Mlp(config["width"], config["depth"])
    return StreamedModel(module, Checkpoint(folder), folder, config, block_lists=("trunk",))


class MlpService:
    """``spec.dataset`` names a safetensors file with the tensor ``x``, ``(samples, width)``."""

    apiversion = "example_mlp_v1"

    def practice_folders(self) -> list[Path]:
        return []

    def pedigree(self, model_type: str) -> str | None:
        return None

    def spec_type(self) -> type[SpecV1]:
        return SpecV1

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        config = model_path / "config.json"
        if images or not config.is_file():
            return False
        return json.loads(config.read_text("utf-8")).get("model_type") == "example_mlp"

    def plan(self, request: QuantRequest, recipe: Recipe) -> Plan:
        return self._plan(open_mlp(request.model_path), request, recipe)

    def quantize(
        self, request: QuantRequest, recipe: Recipe, progress: Progress, on_plan: Callable[[Plan], None] | None = None
    ) -> RunResult:
        check_target(request.save_path, request.model_path, request.overwrite or request.resume)
        model, spec = open_mlp(request.model_path), recipe.spec()
        plan = self._plan(model, request, recipe)
        if on_plan is not None:
            on_plan(plan)
        return run_plan(
            plan,
            request.save_path,
            fingerprint=fingerprint(request.model_path, model.source, dump_recipe(recipe)),
            progress=progress,
            calibration=partial(_samples, spec.dataset.path),
            propagate=spec.propagate,
            resume=request.resume,
        )

    def evaluate(self, request: EvalRequest, progress: Progress) -> NoReturn:
        raise UnsupportedError("models of this kind cannot be scored", where=self.apiversion)

    def _plan(self, model: StreamedModel, request: QuantRequest, recipe: Recipe) -> Plan:
        devices = resolve_devices(request.device, explicit="device" in request.model_fields_set)
        rows = torch.randn(4, model.config["width"], generator=torch.Generator().manual_seed(0))
        return make_plan(model, recipe.spec(), devices, example=lambda: {"x": rows})


def _samples(path: str) -> list[dict[str, Any]]:
    return [{"x": row} for row in torch.split(load_file(path)["x"], 1)]

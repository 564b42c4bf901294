"""Stand-ins for installed processors and savers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import settings
from pydantic import Field

from slim_core.recipe import (
    AnyProcessor,
    Exclude,
    Include,
    LinearQConfig,
    ProcessorConfig,
    SaverConfig,
    forget_plugins,
)

settings.register_profile("slim", deadline=None)
settings.load_profile("slim")


class LinearQuantConfig(ProcessorConfig):
    type: Literal["linear_quant"] = Field(default="linear_quant", description="Quantize linear layers")
    qconfig: LinearQConfig = Field(description="How")
    include: Include = ("*",)
    exclude: Exclude = ()


class GroupConfig(ProcessorConfig):
    type: Literal["group"] = Field(default="group", description="Several processors on one pass")
    configs: tuple[AnyProcessor, ...] = Field(min_length=1, description="The processors")


class SmoothConfig(ProcessorConfig):
    """Has a field of every scalar kind, and a union that pydantic reports branch by branch."""

    type: Literal["iter_smooth"] = Field(default="iter_smooth", description="Smooth outliers")
    alpha: float = Field(default=0.9, ge=0, le=1, description="Strength")
    scale_min: float = Field(default=1e-5, gt=0, description="Smallest scale")
    steps: int = Field(default=1, description="Steps")
    symmetric: bool = Field(default=True, description="No shift")
    limit: int | list[int] = Field(default=1, description="One or several limits")
    enable_subgraph_type: tuple[Literal["norm-linear", "linear-linear", "ov", "up-down"], ...] = Field(
        default=("norm-linear", "ov"), description="Where"
    )


class AscendConfig(SaverConfig):
    type: Literal["ascendv1_saver"] = Field(default="ascendv1_saver", description="AscendV1 format")
    part_file_size: int = Field(default=4, ge=0, description="GiB per shard")


def plugin(config: Any) -> Any:
    return SimpleNamespace(Config=config)


@dataclass
class FakePoint:
    name: str
    loaded: Any
    group: str = "slim.processors"
    package: str = "slim-core"
    value: str = "somewhere:Something"
    loads: int = 0

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=self.package, version="1.2")

    def load(self) -> Any:
        self.loads += 1
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


Install = Callable[..., list[FakePoint]]
# The mixed recipe of the protocol guide: anchors in free top-level blocks, used through aliases.
MIXED = """\
apiversion: modelslim_v1

default_w8a8_dynamic: &default_w8a8_dynamic
  act:
    scope: "per_token"
    dtype: "int8"
    symmetric: True
    method: "minmax"
  weight:
    scope: "per_channel"
    dtype: "int8"
    symmetric: True
    method: "minmax"

default_w8a8: &default_w8a8
  act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}
  weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}

spec:
  process:
    - type: "iter_smooth"
      scale_min: 1e-5
    - type: "group"
      configs:
        - type: "linear_quant"
          qconfig: *default_w8a8
          include: ["*self_attn*"]
        - type: "linear_quant"
          qconfig: *default_w8a8_dynamic
          include: ["*mlp*"]
          exclude: ["*gate"]
  save:
    - type: "ascendv1_saver"
      part_file_size: 4
"""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Replaces the installed entry points; starts with linear_quant, group, iter_smooth and ascendv1_saver."""
    points = [
        FakePoint("linear_quant", plugin(LinearQuantConfig)),
        FakePoint("group", plugin(GroupConfig)),
        FakePoint("iter_smooth", plugin(SmoothConfig)),
        FakePoint("ascendv1_saver", plugin(AscendConfig), group="slim.savers"),
    ]

    def add(*more: FakePoint) -> list[FakePoint]:
        points.extend(more)
        forget_plugins()
        return points

    def entry_points(*, group: str) -> list[FakePoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    forget_plugins()
    yield add
    forget_plugins()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """``write(text)``: a recipe file."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def mixed() -> str:
    """The text of a recipe that uses about everything."""
    return MIXED

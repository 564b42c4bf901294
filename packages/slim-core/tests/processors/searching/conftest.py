"""A block on the bench, which is never run, and what the smoothers that search make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.model.probing import Findings
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import Structure
from slim_core.model.subgraphs import Subgraph
from slim_core.model.weights import UnitWeights
from slim_core.processors.base import UnitWork, create_processor
from slim_core.processors.searching import SearchingSmoother
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import recipe_from_dict
from slim_core.smoothing.scales import SmoothingNote

HIDDEN, WIDE, DIM, EXPERTS = 16, 24, 4, 12
UNIT = "layers.0"
INT4: dict[str, Any] = {"dtype": "int4", "scope": "per_channel", "symmetric": True, "method": "ssz"}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
FLEX: dict[str, Any] = {"type": "flex_smooth_quant"}
SSZ: dict[str, Any] = {"type": "flex_awq_ssz", "qconfig": {"act": TOKEN, "weight": INT4}}
AWQ: dict[str, Any] = {"type": "awq", "weight_qconfig": INT4}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, WIDE, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(WIDE, HIDDEN, bias=False)


class Router(nn.Module):
    """No linear that could be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN))


class Block(nn.Module):
    """The weights of a block with grouped queries and experts; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, bias=False)
        self.q, self.k = (nn.Linear(HIDDEN, 4 * DIM) for _ in range(2))
        self.v, self.o = nn.Linear(HIDDEN, 2 * DIM), nn.Linear(4 * DIM, HIDDEN)
        self.mlp_norm = nn.LayerNorm(HIDDEN, bias=False)
        self.router = Router()
        self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return x


def at(*names: str) -> tuple[str, ...]:
    return tuple(f"{UNIT}.{name}" for name in names)


COLUMNS = torch.arange(HIDDEN)
NORM = Subgraph("norm-linear", *at("norm"), at("q", "k", "v"), COLUMNS)
OV = Subgraph("ov", *at("v"), at("o"), torch.arange(4 * DIM) // (2 * DIM) * DIM + COLUMNS % DIM, torch.arange(2 * DIM))
MOE = Subgraph(
    "norm-linear",
    *at("mlp_norm"),
    at("router", *(f"experts.{i}.{leaf}" for i in range(EXPERTS) for leaf in ("gate_proj", "up_proj"))),
    COLUMNS,
)
UPS = [
    Subgraph(
        "up-down", *at(f"experts.{i}.up_proj"), at(f"experts.{i}.down_proj"), torch.arange(WIDE), torch.arange(WIDE)
    )
    for i in range(EXPERTS)
]


@dataclass
class Bench:
    """A block on the bench, with what was seen of the inputs of its linears."""

    model: StreamedModel
    statistics: dict[str, InputStatistics] = field(default_factory=dict[str, InputStatistics])
    notes: list[SmoothingNote] = field(default_factory=list[SmoothingNote])
    norm, ov, moe, ups = NORM, OV, MOE, UPS
    flex, ssz, awq = FLEX, SSZ, AWQ
    at = staticmethod(at)

    @staticmethod
    def inputs(tokens: int = 200, width: int = HIDDEN, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, width, generator=generator)
        x[:, 3] *= 40
        x[:, 5] *= 8
        return x

    @staticmethod
    def weight(work: UnitWork, name: str) -> Tensor:
        assert work.weights is not None
        return work.weights[f"{UNIT}.{name}.weight"].load()

    def scale_of(self, before: UnitWork, after: UnitWork, target: str) -> Tensor:
        return (self.weight(after, target) / self.weight(before, target)).median(0).values

    def smoother(self, *graphs: Subgraph, **config: Any) -> SearchingSmoother:
        (checked,) = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [config]}}).spec().process
        smoother = create_processor(checked, "process[0]")
        assert isinstance(smoother, SearchingSmoother)
        smoother.adopt(Structure({UNIT: Findings(list(graphs))}), self.model)
        return smoother

    def see(self, x: Tensor, *names: str) -> None:
        """All of these have the same input."""
        seen = InputStatistics(frozenset({Need.CHANNELS, Need.TOKENS}))
        seen.update(x)
        self.statistics |= dict.fromkeys(at(*names), seen)

    def work(self) -> UnitWork:
        unit = next(unit for unit in self.model.units if unit.name == UNIT)
        work = UnitWork(UNIT, {}, dict(self.statistics), torch.bfloat16, torch.device("cpu"), lambda *_: None)
        work.weights = UnitWeights(self.model, unit)
        work.note = self.notes.append
        return work

    def smoothed(self, *graphs: Subgraph, **config: Any) -> UnitWork:
        work = self.work()
        self.smoother(*graphs, **config).process(work)
        return work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    with torch.no_grad():
        net = Net()
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    save_file(net.state_dict(), folder / "model.safetensors")
    with parameters_on_meta():
        net = Net()
    return StreamedModel(net, Checkpoint(folder), folder, {})


@pytest.fixture
def bench(model: StreamedModel) -> Bench:
    return Bench(model)


@pytest.fixture(params=[FLEX, SSZ, AWQ], ids=lambda config: config["type"])
def every_smoother(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The recipe of each smoother that searches, one after the other."""
    return request.param

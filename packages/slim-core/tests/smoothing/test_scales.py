"""Scales that move: the formula, and edits that leave what a block computes as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import UnexpectedError
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import Addition
from slim_core.model.weights import Edit, UnitWeights, WeightView
from slim_core.quantization.weights import InMemory
from slim_core.smoothing.scales import FLOOR, Smoothing, column_maxima, edits_of, power_scale

POSITIVE = st.floats(2.0**-10, 2.0**10, width=32)


@given(POSITIVE, POSITIVE, st.floats(0.0, 1.0))
def test_formula(act: float, weight: float, alpha: float) -> None:
    scale = float(power_scale(torch.tensor([act]), torch.tensor([weight]), alpha, 1 - alpha))
    assert scale == pytest.approx(max(act**alpha / weight ** (1 - alpha), FLOOR), rel=1e-5)


@given(POSITIVE, POSITIVE, POSITIVE, POSITIVE, st.floats(0.1, 0.9))
def test_smoothed_ranges(a: float, b: float, c: float, d: float, alpha: float) -> None:
    """A' = (A B)^(1 - alpha) and B' = (A B)^alpha."""
    act, weight = torch.tensor([a, c]).double(), torch.tensor([b, d]).double()
    scale = power_scale(act, weight, alpha, 1 - alpha).double()
    assert torch.allclose(act / scale, (act * weight) ** (1 - alpha), rtol=1e-5)
    assert torch.allclose(weight * scale, (act * weight) ** alpha, rtol=1e-5)


def test_dead_channels_are_left_alone() -> None:
    act, weight = torch.tensor([0.0, 2.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert power_scale(act, weight, 0.5, 0.5).tolist() == [1.0, 1.0, 1.0, 2.0]


def test_scales_are_bounded() -> None:
    act, weight = torch.tensor([1e30, 1e-30]), torch.tensor([1e-30, 1e30])
    assert power_scale(act, weight, 0.9, 0.1).tolist() == [2.0**20, pytest.approx(FLOOR)]
    assert float(power_scale(act, weight, 0.9, 0.1, floor=0.5)[1]) == 0.5


def test_column_maxima_are_of_absolute_values_over_all_readers() -> None:
    one, other = torch.tensor([[-4.0, 1.0], [-2.0, 0.5]]), torch.tensor([[3.0, -5.0]])
    assert column_maxima([InMemory(one), InMemory(other)]).tolist() == [4.0, 5.0]
    assert torch.equal(column_maxima([InMemory(-one)]), column_maxima([InMemory(one)]))


class Norm(nn.Module):
    """An RMS norm whose gain is ``weight`` or ``1 + weight``, with a bias if asked."""

    def __init__(self, width: int, plus_one: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3 + (not plus_one))
        self.bias = nn.Parameter(torch.randn(width)) if bias else None
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (self.weight + float(self.plus_one))
        return x if self.bias is None else x + self.bias


class Block(nn.Module):
    def __init__(self, plus_one: bool = False, norm_bias: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.norm = Norm(8, plus_one, norm_bias)
        self.gate, self.up = nn.Linear(8, 12, bias=bias), nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Net(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(**options)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


NORM = Subgraph("norm-linear", "layers.0.norm", ("layers.0.gate", "layers.0.up"), torch.arange(8))
UP = Subgraph("up-down", "layers.0.up", ("layers.0.down",), torch.arange(12), torch.arange(12))


def streamed(folder: Path, dtype: torch.dtype, **options: bool) -> tuple[StreamedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    state = {name: value.detach().to(dtype).contiguous() for name, value in Net(**options).state_dict().items()}
    save_file(state, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net(**options).to(dtype)
    return StreamedModel(net, Checkpoint(folder), folder, {}), state


def values(weights: UnitWeights, names: list[str]) -> dict[str, Tensor]:
    return {name: weights[name].load().float() for name in names}


def compute(state: dict[str, Tensor], x: Tensor, **options: bool) -> Tensor:
    options["bias"] = "layers.0.gate.bias" in state
    options["norm_bias"] = "layers.0.norm.bias" in state
    net = Net(**options).double()
    down = state.get("layers.0.down.bias")
    full = {name: value.double() for name, value in state.items()}
    if options["bias"] and down is None:
        full["layers.0.down.bias"] = torch.zeros(8).double()
    net.load_state_dict(full)
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_edits_change_nothing(
    tmp_path: Path, dtype: torch.dtype, plus_one: bool, norm_bias: bool, shifted: bool, bias: bool
) -> None:
    model, state = streamed(tmp_path, dtype, plus_one=plus_one, norm_bias=norm_bias, bias=bias)
    added = [Addition(f"layers.0.{name}.bias", torch.float32, (12,)) for name in ("gate", "up")]
    added.append(Addition("layers.0.norm.bias", torch.float32, (8,)))
    model = model.with_additions(added)
    unit = next(unit for unit in model.units if unit.block == 0)
    assert all(info.has_bias for info in unit.linears if not info.name.endswith("down"))
    weights = UnitWeights(model, unit)
    x = torch.randn(5, 8).double()
    before = compute(state, x, plus_one=plus_one)
    graph = Subgraph(NORM.type, NORM.source, NORM.targets, NORM.columns, None, plus_one)
    shift = torch.randn(8) if shifted else None
    _, edits = edits_of(Smoothing(UP, torch.rand(12) + 0.1), weights)
    weights.apply(edits)
    done, edits = edits_of(Smoothing(graph, torch.rand(8) * 3 + 0.1, shift), weights)
    weights.apply(edits)
    names = [*state, *(name for name, view in weights.edited() if name not in state)]
    after = compute(values(weights, names), x, plus_one=plus_one)
    scale = float((before - x).abs().max())
    if shifted:  # engines keep it in the dtype of the model, so what they lose is made up for
        bias = weights["layers.0.norm.bias"].load()
        assert torch.equal(bias, bias.to(dtype).float())
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * scale)
    assert weights["layers.0.norm.weight"].dtype == dtype
    stored = weights["layers.0.norm.weight"].stored_form()
    assert torch.equal(stored.float(), weights["layers.0.norm.weight"].load())
    assert torch.isfinite(done.scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_two_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model, state = streamed(tmp_path, dtype)
    weights = UnitWeights(model, next(unit for unit in model.units if unit.block == 0))
    scale = 2.0 ** torch.arange(-4, 4)
    done, edits = edits_of(Smoothing(NORM, scale), weights)
    weights.apply(edits)
    assert torch.equal(done.scale, scale)
    gate = weights["layers.0.gate.weight"].stored_form()
    assert torch.equal(gate, state["layers.0.gate.weight"] * scale.to(dtype))


def test_a_norm_weight_of_zero_is_left_alone(tmp_path: Path) -> None:
    model, state = streamed(tmp_path, torch.float32)
    unit = next(unit for unit in model.units if unit.block == 0)
    weights = UnitWeights(model, unit)
    gain = state["layers.0.norm.weight"].clone()
    gain[3] = 0
    weights.apply([Edit("layers.0.norm.weight", value=gain)])
    done, edits = edits_of(Smoothing(NORM, torch.full((8,), 2.0)), weights)
    weights.apply(edits)
    assert done.scale.tolist() == [2, 2, 2, 1, 2, 2, 2, 2]
    assert float(weights["layers.0.norm.weight"].load()[3]) == 0


class TestSharedChannels:
    GRAPH = Subgraph("ov", "v", ("o",), torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]), torch.arange(4))

    def test_spread_and_gather(self) -> None:
        assert self.GRAPH.scales == 4
        assert self.GRAPH.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
        x = torch.arange(8.0)
        assert self.GRAPH.gather(x, "amax").tolist() == [2, 3, 6, 7]
        assert self.GRAPH.gather(x, "mean").tolist() == [1, 2, 5, 6]


class TestUnitWeights:
    def weights(self, folder: Path, **options: Any) -> UnitWeights:
        model, _ = streamed(folder, torch.bfloat16)
        return UnitWeights(model, next(unit for unit in model.units if unit.block == 0), **options)

    def test_edits_compose_and_are_rounded_once(self, tmp_path: Path) -> None:
        weights = self.weights(tmp_path)
        exact = weights["layers.0.up.weight"].load().double()
        rows, columns, more = torch.rand(12) + 0.5, torch.rand(8) + 0.5, torch.rand(8) + 0.5
        weights.apply([Edit("layers.0.up.weight", rows=rows), Edit("layers.0.up.weight", columns=columns)])
        weights.apply([Edit("layers.0.up.weight", columns=more)])
        want = exact * rows.double()[:, None] * (columns.double() * more.double())
        view = weights["layers.0.up.weight"]
        assert torch.allclose(view.load().double(), want, rtol=1e-6)
        assert torch.allclose(view.rows(3, 5).double(), want[3:5], rtol=1e-6)
        assert torch.equal(view.stored_form(), view.load().bfloat16())
        assert [name for name, _ in weights.edited()] == ["layers.0.up.weight"]

    @pytest.mark.parametrize(
        "bad",
        [
            Edit("layers.0.up.weight", rows=torch.ones(8)),
            Edit("layers.0.up.weight", columns=torch.ones(12)),
            Edit("layers.0.norm.weight", value=torch.ones(9)),
            Edit("layers.0.nothing", value=torch.ones(1)),
        ],
    )
    def test_all_or_nothing(self, tmp_path: Path, bad: Edit) -> None:
        weights = self.weights(tmp_path)
        with pytest.raises(UnexpectedError):
            weights.apply([Edit("layers.0.gate.weight", columns=torch.full((8,), 2.0)), bad])
        assert list(weights.edited()) == []

    @pytest.mark.parametrize("failing", range(4))
    def test_a_failure_while_the_module_is_changed_undoes_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
    ) -> None:
        model, state = streamed(tmp_path, torch.bfloat16, bias=False)
        added = [Addition(f"layers.0.{name}.bias", torch.float32, (size,)) for name, size in (("norm", 8), ("up", 12))]
        model = model.with_additions(added)
        unit = next(unit for unit in model.units if unit.block == 0)
        model.load(unit.parameters, torch.device("cpu"))
        weights = UnitWeights(model, unit, live=True)
        edits = [
            Edit("layers.0.norm.bias", value=torch.ones(8)),
            Edit("layers.0.gate.weight", columns=torch.full((8,), 3.0)),
            Edit("layers.0.up.bias", value=torch.ones(12)),
            Edit("layers.0.up.weight", columns=torch.full((8,), 3.0)),
        ]
        real, count = WeightView.stored_form, iter(range(100))

        def stored_form(view: WeightView) -> Tensor:
            if next(count) == failing:
                raise MemoryError
            return real(view)

        monkeypatch.setattr(WeightView, "stored_form", stored_form)
        with pytest.raises(MemoryError):
            weights.apply(edits)
        assert list(weights.edited()) == []
        live = {name: value for name, value in model.module.named_parameters() if not value.is_meta}
        assert live.keys() == state.keys()
        assert all(torch.equal(live[name], state[name]) for name in state)
        weights.apply(edits)
        assert {name for name, _ in weights.edited()} == {edit.parameter for edit in edits}
        assert torch.equal(model.module.get_parameter("layers.0.norm.bias"), torch.ones(8).bfloat16())
        model.unload([*unit.parameters, *unit.added])

    def test_a_live_module_follows(self, tmp_path: Path) -> None:
        model, state = streamed(tmp_path, torch.float32)
        unit = next(unit for unit in model.units if unit.block == 0)
        model.load(unit.parameters, torch.device("cpu"))
        x = torch.randn(4, 8)
        with torch.no_grad():
            before = model.module(x)
        weights = UnitWeights(model, unit, live=True)
        for graph in (UP, NORM):
            _, edits = edits_of(Smoothing(graph, torch.rand(graph.scales) + 0.5), weights)
            weights.apply(edits)
        assert not torch.equal(model.module.layers[0].norm.weight, state["layers.0.norm.weight"])  # pyright: ignore
        with torch.no_grad():
            assert torch.allclose(model.module(x), before, atol=1e-5)
        model.unload(unit.parameters)
        assert model.module.layers[0].norm.weight.is_meta  # pyright: ignore

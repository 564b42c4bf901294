"""``float_sparse`` on single linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.checkpoint.source import LazyTensor, TensorMeta
from slim_core.errors import InvalidModelError, SchemaValidateError
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearWork, UnitWork, create_processor
from slim_core.processors.float_sparse import FloatSparse, FloatSparseConfig
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import QuantizedLinear, SparseFloat
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import recipe_from_dict
from slim_core.sparsity import admm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Memory:
    """A tensor source over some matrices."""

    def __init__(self, matrices: dict[str, Tensor]) -> None:
        self.matrices = matrices

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.matrices[name][start:stop]


def processor(**options: Any) -> FloatSparse:
    return FloatSparse(FloatSparseConfig.model_validate({"type": "float_sparse", **options}), "process[0]")


def seen(x: Tensor | None) -> InputStatistics:
    statistics = InputStatistics(frozenset({Need.HESSIAN}))
    if x is not None:
        statistics.update(x)
    return statistics


def run(
    one: FloatSparse,
    weights: dict[str, Tensor],
    statistics: dict[str, InputStatistics],
    bias: Tensor | None = None,
) -> dict[str, tuple[QuantizedLinear, float]]:
    source = Memory({f"{name}.weight": matrix for name, matrix in weights.items()})
    (rule,) = one.rules()
    works: dict[str, LinearWork] = {}
    for name, matrix in weights.items():
        meta = TensorMeta(f"{name}.weight", matrix.dtype, tuple(matrix.shape))
        info = LinearInfo(name, name, matrix.shape[1], matrix.shape[0], has_bias=bias is not None, in_block=True)
        assignment = Assignment(rule.form, "process[0]", "", rule.needs)
        works[name] = LinearWork(info, LazyTensor(source, meta), bias, assignment)  # pyright: ignore
    done: dict[str, tuple[QuantizedLinear, float]] = {}

    def finish(work: LinearWork, layer: QuantizedLinear, sqnr_db: float) -> None:
        done[work.info.name] = layer, sqnr_db

    one.process(UnitWork("layers.0", works, statistics, torch.bfloat16, torch.device("cpu"), finish))
    return done


def weight(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def activations(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 100, 24, generator=g) @ torch.randn(24, 24, generator=g)


def zeros(layer: QuantizedLinear) -> int:
    return int((layer.weight == 0).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear(dtype: torch.dtype) -> None:
    bias, matrix = torch.randn(40).to(dtype), weight(dtype)
    before = matrix.clone()
    layer, sqnr_db = run(processor(), {"a": matrix}, {"a": seen(activations())}, bias)["a"]
    assert isinstance(layer, SparseFloat)
    assert layer.kind is LayerKind.W16A16S
    assert layer.weight.dtype == dtype
    assert layer.bias is bias
    assert round(0.3 * 960) <= zeros(layer) <= round(0.3 * 960) + 3  # short mantissas may add a few
    noise = (layer.weight.double() - matrix.double()).square().sum()
    assert sqnr_db == pytest.approx(float(10 * torch.log10(matrix.double().square().sum() / noise)), abs=1e-3)
    assert torch.equal(matrix, before)


def test_better_than_magnitude_also_with_short_mantissas() -> None:
    x, matrix = activations(), weight()
    error: list[float] = []
    for statistics in (seen(x), seen(None)):
        layer, _ = run(processor(sparse_ratio=0.5), {"a": matrix}, {"a": statistics})["a"]
        error.append(float((x @ (layer.weight - matrix).T).norm()))
    assert error[0] < 0.6 * error[1]


def test_the_ends() -> None:
    layer, _ = run(processor(sparse_ratio=1.0), {"a": weight()}, {})["a"]
    assert zeros(layer) == 960
    layer, _ = run(processor(sparse_ratio=0.0), {"a": weight()}, {"a": seen(activations())})["a"]
    large = weight().abs() >= 2.0**-8
    assert bool(((layer.weight - weight()).abs() <= weight().abs() / 8)[large].all())
    assert processor(sparse_ratio=1.0).rules()[0].needs == frozenset()
    assert processor(sparse_ratio=0.0).rules()[0].needs == {Need.HESSIAN}


def test_twice_is_once() -> None:
    statistics = {"a": seen(activations())}
    once, _ = run(processor(), {"a": weight()}, statistics)["a"]
    again, sqnr_db = run(processor(), {"a": once.weight}, statistics)["a"]
    assert torch.equal(again.weight, once.weight)
    assert sqnr_db == float("inf")


def test_linears_with_the_same_input_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    factor = admm._cholesky  # pyright: ignore[reportPrivateUsage]

    def counted(matrix: Tensor, name: str) -> Tensor:
        calls.append(name)
        return factor(matrix, name)

    monkeypatch.setattr(admm, "_cholesky", counted)
    shared, other = seen(activations()), seen(activations(1))
    total = shared.hessian.total
    assert total is not None
    before = total.clone()
    weights = {name: weight(seed=i) for i, name in enumerate(("q", "k", "v", "o"))}
    done = run(processor(), weights, {"q": shared, "k": shared, "v": shared, "o": other})
    assert calls == ["q", "o"]
    assert torch.equal(total, before)
    alone = run(processor(), {"v": weights["v"]}, {"v": seen(activations())})
    assert torch.equal(done["v"][0].weight, alone["v"][0].weight)


@pytest.mark.parametrize("statistics", [None, torch.zeros(1, 5, 24), torch.zeros(1, 0, 24)])
def test_what_no_token_reached_is_pruned_by_magnitude(
    statistics: Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {name: weight(seed=i) for i, name in enumerate(("experts.0.up", "experts.1.up", "q"))}
    given = {} if statistics is None else {name: seen(statistics) for name in weights}
    done = run(processor(), weights, given | {"q": seen(activations())})
    for name in ("experts.0.up", "experts.1.up"):
        matrix, found = weights[name], done[name][0].weight
        cut = float(matrix.abs().flatten().sort().values[round(0.3 * 960) - 1])
        assert torch.equal(found == 0, (matrix.abs() <= cut) | (found == 0) & (matrix.abs() < 2.0**-14))
        kept = (found != 0) & (matrix.abs() >= 2.0**-8)
        assert bool(((found - matrix).abs() <= matrix.abs() / 8)[kept].all())
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("layers.0: no calibration sample reached these linears")
    assert message.endswith("by magnitude alone: experts.0.up, experts.1.up")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity(bad: float) -> None:
    matrix = weight()
    matrix[7, 3] = bad
    with pytest.raises(InvalidModelError, match=r"^a\.weight: the weight holds NaN or infinity in row 7"):
        run(processor(), {"a": matrix}, {"a": seen(activations())})
    x = activations()
    x[1, 4, 9] = bad
    with pytest.raises(InvalidModelError, match=r"^a: its activations hold NaN or infinity"):
        run(processor(), {"a": weight()}, {"a": seen(x)})


def test_numbers_that_the_format_was_not_made_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    large = (weight() * 1e6).bfloat16()
    layer, _ = run(processor(), {"a": large}, {"a": seen(activations())})["a"]
    assert bool(torch.isfinite(layer.weight).all())
    (message,) = [record.getMessage() for record in caplog.records]
    count = int((layer.weight.abs() > 65504).sum())
    assert message == f"a: {count} weights are above 65504; engines for this format compute in float16"
    caplog.clear()
    run(processor(), {"a": weight() * 1e-4}, {"a": seen(activations())})
    (message,) = [record.getMessage() for record in caplog.records]
    assert "of the 672 weights that pruning kept are below 2^-14" in message


@pytest.mark.parametrize("ratio", [-0.1, 1.1, True, "much", float("nan"), None])
def test_ratios_that_are_refused(ratio: object) -> None:
    process = [{"type": "float_sparse", "sparse_ratio": ratio}]
    with pytest.raises(SchemaValidateError, match=r"spec\.process\[0\]\.sparse_ratio"):
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": process}}).spec()


def test_defaults_and_an_empty_include() -> None:
    recipe = {"apiversion": "modelslim_v1", "spec": {"process": [{"type": "float_sparse", "include": []}]}}
    (config,) = recipe_from_dict(recipe).spec().process
    made = create_processor(config, "process[0]")
    assert isinstance(made, FloatSparse)
    assert made.config.sparse_ratio == 0.3
    (rule,) = made.rules()
    assert rule.filter.matches("any.linear")
    assert rule.form.kind is LayerKind.W16A16S
    assert rule.needs == {Need.HESSIAN}

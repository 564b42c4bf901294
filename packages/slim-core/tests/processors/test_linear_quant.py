"""``linear_quant`` on single linears."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from slim_core.checkpoint.source import LazyTensor, TensorMeta
from slim_core.errors import InvalidModelError, SpecError
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearWork, UnitWork, create_processor
from slim_core.processors.linear_quant import LinearQuant, LinearQuantConfig
from slim_core.quantization.layers import QuantizedLinear, StaticInt8
from slim_core.quantization.statistics import InputStatistics, Need, TensorRange, observe_range
from slim_core.recipe import recipe_from_dict


class Memory:
    """A tensor source over one matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def rows(self, _name: str, start: int, stop: int) -> torch.Tensor:
        return self.matrix[start:stop]


def processor(act: dict[str, Any] | None = None) -> LinearQuant:
    qconfig = {"act": act, "weight": {}} if act is not None else {"weight": {}}
    return LinearQuant(LinearQuantConfig.model_validate({"type": "linear_quant", "qconfig": qconfig}), "process[0]")


def finished(
    one: LinearQuant,
    seen: TensorRange,
    dtype: torch.dtype | None = torch.bfloat16,
    bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> QuantizedLinear:
    matrix = torch.randn(3, 4) if weight is None else weight
    lazy = LazyTensor(Memory(matrix), TensorMeta("a.weight", matrix.dtype, tuple(matrix.shape)))  # pyright: ignore
    (rule,) = one.rules()
    info = LinearInfo("a", "a", 4, 3, has_bias=bias is not None, in_block=True)
    work = LinearWork(info, lazy, bias, Assignment(rule.form, "process[0]", "", rule.needs))
    done: list[QuantizedLinear] = []
    unit = UnitWork(
        "u",
        {"a": work},
        {"a": InputStatistics(range=seen)},
        dtype,
        torch.device("cpu"),
        lambda _w, layer, _db: done.append(layer),
    )
    one.process(unit)
    return done[0]


def static(symmetric: bool = False, **ext: Any) -> LinearQuant:
    return processor({"scope": "per_tensor", "symmetric": symmetric, "ext": ext})


RANGE = observe_range(torch.tensor([[-1.2, 3.0]]))


def test_worked_range() -> None:
    layer = finished(static(), RANGE, dtype=None)
    assert isinstance(layer, StaticInt8)
    assert float(layer.input_scale) == pytest.approx(4.2 / 255, rel=1e-6)
    assert float(layer.input_offset) == -55


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_scale_fits_the_dtype_of_the_engine(dtype: torch.dtype, symmetric: bool) -> None:
    layer = finished(static(symmetric), RANGE, dtype=dtype)
    assert isinstance(layer, StaticInt8)
    scale = np.float32(float(layer.input_scale))
    exact = 3 / 127 if symmetric else 4.2 / 255
    assert scale == pytest.approx(exact, rel=2**-8)
    assert torch.equal(layer.input_scale.to(dtype).float(), layer.input_scale)
    assert float(layer.input_offset) == (0 if symmetric else round(float(np.float32(1.2) / scale)) - 128)


@pytest.mark.parametrize(("low", "high", "offset"), [(0.5, 2.0, -128), (-2.0, -0.5, 127), (0.0, 0.0, -128)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_one_sided_ranges(low: float, high: float, offset: int, dtype: torch.dtype | None) -> None:
    layer = finished(static(), observe_range(torch.tensor([[low, high]])), dtype=dtype)
    assert isinstance(layer, StaticInt8)
    rounded = dtype is not None and low < 0  # a scale rounded up leaves the last code unused
    assert abs(float(layer.input_offset) - offset) <= int(rounded)
    assert float(layer.input_scale) > 0


def test_mean_of_samples() -> None:
    seen = observe_range(torch.tensor([[[-1.0, 2.0]], [[-3.0, 4.0]]]))
    layer = finished(static(aggregation_type="mean"), seen, dtype=None)
    assert isinstance(layer, StaticInt8)
    assert float(layer.input_scale) == pytest.approx(5 / 255)


def test_nothing_observed() -> None:
    with pytest.raises(SpecError, match=r"^a: no calibration sample reached"):
        finished(static(), TensorRange())


def test_nan_in_the_weight() -> None:
    with pytest.raises(InvalidModelError, match=r"^a\.weight: the weight holds NaN"):
        finished(processor(), TensorRange(), weight=torch.tensor([[1.0, float("nan")]]))


def test_a_bias_that_does_not_fit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    zeros = observe_range(torch.zeros(1, 4))
    bias = torch.tensor([5.0, 0.0, -5.0])
    finished(static(), RANGE, bias=bias)
    assert not caplog.records
    layer = finished(static(), zeros, bias=bias, weight=torch.full((3, 4), 1e-4))
    assert isinstance(layer, StaticInt8)
    assert layer.quant_bias.tolist()[0] == 2**31 - 1
    assert "a: the bias of 2 channels does not fit into quant_bias" in caplog.text


def test_members_of_a_group_know_their_place() -> None:
    member = {"type": "linear_quant", "qconfig": {"act": {}, "weight": {}}, "include": ["*.a"]}
    group = {"type": "group", "configs": [member, member | {"qconfig": {"weight": {"ext": {"step": 3}}}}]}
    (config,) = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [group]}}).spec().process
    one, two = create_processor(config, "process[0]").leaves()
    (first,), (second,) = one.rules(), two.rules()
    assert (first.position, second.position) == ("process[0].configs[0]", "process[0].configs[1]")
    assert one.notes() == []
    (note,) = two.notes()
    assert note.startswith("process[0].configs[1]: ")
    assert note.endswith("ext.step has no effect with method minmax and scope per_channel")
    info = LinearInfo("x.a", "x.a", 4, 3, has_bias=False, in_block=True)

    def wanted(position: str) -> Any:
        return one.requests([info], {"x.a": Assignment(first.form, position, "", first.needs)})

    assert wanted(first.position) == {"x.a": frozenset({Need.RANGE})}
    assert wanted("process[0].configs[10]") == {}
    assert second.needs == frozenset()

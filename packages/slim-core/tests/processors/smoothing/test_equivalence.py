"""What smoothing leaves is the same model, with statistics as of a fresh forward."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.processors.base import Processor, UnitWork
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import ProcessorConfig
from slim_core.smoothing.scales import FLOOR, power_scale

Made = Any  # of conftest.py
Make = Callable[..., Made]
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
SHIFT = ITER | {"symmetric": False}
SMOOTH: dict[str, Any] = {"type": "smooth_quant"}
INPUT, POST = "input_layernorm", "post_attention_layernorm"


GQA = [{"kv_heads": kv_heads} for kv_heads in (4, 2, 1)]


class TestEquivalence:
    @pytest.mark.parametrize("process", [ITER, SHIFT, SMOOTH, SMOOTH | {"symmetric": False}], ids=str)
    @pytest.mark.parametrize("options", GQA, ids=str)
    def test_the_model_computes_the_same(
        self, make: Make, tmp_path: Path, process: dict[str, Any], options: dict[str, Any]
    ) -> None:
        made = make(tmp_path / "model", **options)
        written = made.smoothed(tmp_path / "out", process)
        assert made.error_of(written) <= 1e-5
        assert set(written) - set(made.state) == (
            {f"layers.{i}.{norm}.bias" for i in range(2) for norm in (INPUT, POST)}
            | {f"layers.{i}.mlp.{name}_proj.bias" for i in range(2) for name in ("gate", "up")}
            if process.get("symmetric") is False
            else set()
        )

    def test_experts_and_router_are_scaled_together(self, make: Make, tmp_path: Path) -> None:
        made = make(tmp_path / "model", moe=True)
        written = made.smoothed(tmp_path / "out", ITER)
        assert made.error_of(written) <= 1e-5
        for name in ("router", "experts.0.gate_proj", "experts.1.up_proj", "experts.2.gate_proj"):
            assert not torch.equal(written[f"layers.0.mlp.{name}.weight"], made.state[f"layers.0.mlp.{name}.weight"])

    def test_a_norm_is_not_shifted_if_a_reader_has_no_place_for_a_bias(self, make: Make, tmp_path: Path) -> None:
        made = make(tmp_path / "model", moe=True)
        plan = made.planned(SHIFT)
        written, _ = made.carried_out(plan, tmp_path / "out", made.inputs)
        (told,) = [text for text in plan.warnings if "not shifted" in text]
        assert told.startswith("spec.process[0]: 2 norms are not shifted")
        assert told.endswith("e.g. layers.0.mlp.router behind layers.0.post_attention_layernorm")
        assert f"layers.0.{INPUT}.bias" in written
        assert f"layers.0.{POST}.bias" not in written
        assert not torch.equal(written[f"layers.0.{POST}.weight"], made.state[f"layers.0.{POST}.weight"])
        assert made.error_of(written) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("process", [ITER, SHIFT], ids=str)
    def test_in_sixteen_bits_only_weights_are_rounded(
        self, make: Make, tmp_path: Path, dtype: torch.dtype, process: dict[str, Any]
    ) -> None:
        made = make(tmp_path / "model", dtype)
        written = made.smoothed(tmp_path / "out", process)
        assert all(written[name].dtype == value.dtype for name, value in made.state.items())
        assert made.error_of(written) <= 2e-2
        for name in (name for name in written if name.endswith("norm.bias")):
            assert torch.equal(written[name], written[name].to(dtype).float())  # engines keep it in the model's dtype

    def test_powers_of_two_are_exact(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def power(act: Tensor, weight: Tensor, alpha: float, beta: float, floor: float = FLOOR) -> Tensor:
            return power_scale(act, weight, alpha, beta, floor).log2().round().exp2()

        monkeypatch.setattr("slim_core.processors.iter_smooth.power_scale", power)
        # The mean over heads that share a value would be no power of two; float16 would underflow.
        made = make(tmp_path / "model", torch.bfloat16, kv_heads=4)
        written = made.smoothed(tmp_path / "out", ITER)
        assert any(not torch.equal(written[name], value) for name, value in made.state.items())
        assert made.error_of(written) <= 1e-13


class Spy(Processor):
    """Notes what is known of the inputs of linears once the smoothers are done."""

    def __init__(self) -> None:
        super().__init__(ProcessorConfig(type="spy"), "process[9]")
        self.seen: dict[str, InputStatistics] = {}

    def process(self, work: UnitWork) -> None:
        self.seen |= deepcopy(work.statistics)


EXACT = frozenset({Need.RANGE, Need.CHANNELS, Need.HESSIAN, Need.TOKENS})


@pytest.mark.parametrize("process", [ITER, SHIFT, SMOOTH], ids=str)
def test_transformed_statistics_are_those_of_a_fresh_forward(
    made: Made, tmp_path: Path, process: dict[str, Any]
) -> None:
    plan = made.planned(process)
    spy = Spy()
    plan.processors.append(spy)
    names = [name for name in plan.requests if name.startswith("layers.")]
    plan.requests = dict.fromkeys(names, EXACT)
    written, result = made.carried_out(plan, tmp_path / "out", made.inputs)
    assert result.block_forwards == 2 * len(made.inputs)
    fresh = made.inputs_of(written)
    assert len(names) >= 10
    for name in names:
        seen, x = spy.seen[name], fresh[name].reshape(-1, fresh[name].shape[-1]).double()
        size, channels = float(x.abs().max()), seen.channels
        assert seen.tokens == channels.tokens == len(x)
        assert seen.range.minimum == pytest.approx(float(x.min()), abs=2e-5 * size)
        assert seen.range.maximum == pytest.approx(float(x.max()), abs=2e-5 * size)
        for got, want in (
            (channels.minimum, x.amin(0)),
            (channels.maximum, x.amax(0)),
            (channels.total, x.sum(0)),
            (channels.square, x.square().sum(0)),
            (seen.hessian.total, x.T @ x),
        ):
            assert got is not None
            assert torch.allclose(got.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))
        kept = seen.kept.tokens().double()  # all of them, in another order
        assert kept.shape == x.shape
        nearest = torch.cdist(kept, x).min(1)
        assert float(nearest.values.max()) <= 1e-4 * size
        assert len(set(nearest.indices.tolist())) == len(x)

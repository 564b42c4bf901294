"""Scales and shifts by their formulas, measured on what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from slim_core.smoothing.scales import FLOOR, power_scale

Made = Any  # of conftest.py
Make = Callable[..., Made]
State = dict[str, Tensor]
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
SHIFT = ITER | {"symmetric": False}
INPUT, POST = "input_layernorm", "post_attention_layernorm"
WIDE, HEADS, DIM = 24, 4, 6


def closed_form(act: Tensor, weight: Tensor, alpha: float, floor: float = FLOOR) -> Tensor:
    return (act.double() ** alpha / weight.double() ** (1 - alpha)).clamp(min=floor)


def ratio(after: Tensor, before: Tensor) -> Tensor:
    return after.double() / before.double()


class TestScales:
    def observed(self, made: Made) -> dict[str, Tensor]:
        """The largest input of every channel of every linear, from plain forwards."""
        return {name: x.abs().amax((0, 1)) for name, x in made.inputs_of(made.state).items()}

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
    def test_norms_are_divided_by_the_formula(self, made: Made, tmp_path: Path, alpha: float) -> None:
        written = made.smoothed(tmp_path / "out", ITER | {"alpha": alpha})
        seen = self.observed(made)
        readers = [f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
        # The rows of up_proj were divided before its columns were measured.
        weight = torch.stack(
            [made.state[readers[0]].abs().amax(0), (made.state[readers[1]] * self.up_rows(made, alpha)).abs().amax(0)]
        ).amax(0)
        want = closed_form(seen["layers.0.mlp.gate_proj"], weight, alpha)
        got = ratio(made.state[f"layers.0.{POST}.weight"], written[f"layers.0.{POST}.weight"])
        assert torch.allclose(got, want, rtol=1e-5)
        assert torch.allclose(ratio(written[readers[0]], made.state[readers[0]]), want.expand(WIDE, -1), rtol=1e-5)

    def up_rows(self, made: Made, alpha: float) -> Tensor:
        down = made.state["layers.0.mlp.down_proj.weight"].abs().amax(0)
        return (1 / closed_form(self.observed(made)["layers.0.mlp.down_proj"], down, alpha)).float().unsqueeze(1)

    @pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
    def test_ranges_of_the_smoothed_model(self, made: Made, tmp_path: Path, alpha: float) -> None:
        """A' = (A B)^(1 - alpha) and B' = (A B)^alpha, measured on what was written."""
        written = made.smoothed(tmp_path / "out", ITER | {"alpha": alpha})
        before, after = (
            self.observed(made)["layers.1.mlp.down_proj"],
            made.inputs_of(written)["layers.1.mlp.down_proj"],
        )
        name = "layers.1.mlp.down_proj.weight"
        product = before.double() * made.state[name].abs().amax(0).double()
        assert torch.allclose(after.abs().amax((0, 1)).double(), product ** (1 - alpha), rtol=1e-4)
        assert torch.allclose(written[name].abs().amax(0).double(), product**alpha, rtol=1e-4)

    def test_values_share_the_mean_scale_of_their_query_heads(self, make: Make, tmp_path: Path) -> None:
        for kv_heads in (4, 2, 1):
            made = make(tmp_path / f"model{kv_heads}", kv_heads=kv_heads)
            written = made.smoothed(tmp_path / f"out{kv_heads}", ITER | {"enable_subgraph_type": ["ov"]})
            name = "layers.0.self_attn.o_proj"
            each = closed_form(self.observed(made)[name], made.state[f"{name}.weight"].abs().amax(0), 0.7)
            want = each.view(kv_heads, HEADS // kv_heads, DIM).mean(1)
            got = ratio(written[f"{name}.weight"], made.state[f"{name}.weight"])
            assert torch.allclose(
                got, want.repeat_interleave(HEADS // kv_heads, 0).reshape(1, -1).expand_as(got), rtol=1e-5
            )
            rows = ratio(made.state["layers.0.self_attn.v_proj.weight"], written["layers.0.self_attn.v_proj.weight"])
            assert torch.allclose(rows, want.reshape(-1, 1).expand_as(rows), rtol=1e-5)
            biases = ratio(made.state["layers.0.self_attn.v_proj.bias"], written["layers.0.self_attn.v_proj.bias"])
            assert torch.allclose(biases, want.reshape(-1), rtol=1e-5)

    def test_the_sign_of_a_column_does_not_matter(self, make: Make, made: Made, tmp_path: Path) -> None:
        name = "layers.0.mlp.down_proj.weight"

        def negate(state: State) -> None:
            state[name][:, 5] = -state[name][:, 5].abs()

        def plus(state: State) -> None:
            state[name][:, 5] = state[name][:, 5].abs()

        only = ITER | {"include": ["layers.0.mlp.up_proj"]}
        for label, change in (("minus", negate), ("plus", plus)):
            make(tmp_path / label, change=change).smoothed(tmp_path / f"out-{label}", only)
        rows = [
            load_file(next((tmp_path / f"out-{label}").glob("*.safetensors")))["layers.0.mlp.up_proj.weight"]
            for label in ("minus", "plus")
        ]
        assert torch.equal(*rows)

    @given(st.permutations(range(6)), st.integers(0, 2**31), st.floats(0, 1))
    def test_channels_may_come_in_any_order(self, order: list[int], seed: int, alpha: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        act, weight = (torch.rand(6, generator=generator) * 10 for _ in range(2))
        scale = power_scale(act, weight, alpha, 1 - alpha)
        assert torch.equal(power_scale(act[order], weight[order], alpha, 1 - alpha), scale[order])

    @given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1))
    def test_the_scale_grows_with_alpha_iff_the_product_is_above_one(
        self, act: float, weight: float, one: float, other: float
    ) -> None:
        low, high = sorted((one, other))
        scales = [
            float(power_scale(torch.tensor([act]), torch.tensor([weight]), alpha, 1 - alpha)) for alpha in (low, high)
        ]
        if act * weight >= 1:
            assert scales[1] >= scales[0] * (1 - 1e-6)
        else:
            assert scales[1] <= scales[0] * (1 + 1e-6)

    @given(st.floats(2.0**-6, 2.0**6), st.floats(0, 1))
    def test_larger_activations_have_a_larger_scale(self, size: float, alpha: float) -> None:
        act, weight = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25])
        assert torch.allclose(
            power_scale(act * size, weight, alpha, 1 - alpha),
            power_scale(act, weight, alpha, 1 - alpha) * size**alpha,
            rtol=1e-5,
        )


WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}


class TestShift:
    def test_the_inputs_behind_a_norm_are_centred(self, made: Made, tmp_path: Path) -> None:
        written = made.smoothed(tmp_path / "out", SHIFT)
        seen = made.inputs_of(written)
        for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj"):
            low, high = seen[name].amin((0, 1)), seen[name].amax((0, 1))
            assert torch.allclose(low, -high, rtol=0, atol=1e-4 * float(high.max()))
        others = seen["layers.0.mlp.down_proj"]
        assert not torch.allclose(others.amin((0, 1)), -others.amax((0, 1)), atol=1e-2)

    def test_the_scale_is_made_from_half_the_range(self, made: Made, tmp_path: Path) -> None:
        only = SHIFT | {"include": [f"layers.0.{INPUT}"]}
        written = made.smoothed(tmp_path / "out", only)
        x = made.inputs_of(made.state)["layers.0.self_attn.q_proj"]
        weight = torch.cat([made.state[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]).abs().amax(0)
        low, high = x.amin((0, 1)), x.amax((0, 1))
        got = ratio(made.state[f"layers.0.{INPUT}.weight"], written[f"layers.0.{INPUT}.weight"])
        assert torch.allclose(got, closed_form((high - low) / 2, weight, 0.7), rtol=1e-5)
        bias = written[f"layers.0.{INPUT}.bias"].double() * got
        assert torch.allclose(bias, -(low + high).double() / 2, rtol=1e-4, atol=1e-5)
        for name in "qkv":
            whole = f"layers.0.self_attn.{name}_proj"
            gain = made.state[f"{whole}.weight"].double() @ (low + high).double() / 2
            want = made.state[f"{whole}.bias"].double() + gain
            assert torch.allclose(written[f"{whole}.bias"].double(), want, rtol=1e-4, atol=1e-5)

    def test_a_second_shift_finds_nothing_to_centre(self, made: Made, tmp_path: Path) -> None:
        """A norm that has a bias keeps it, divided once."""
        twice = made.smoothed(tmp_path / "out", SHIFT, SHIFT | {"alpha": 0.3})
        assert made.error_of(twice) <= 1e-5

    def test_other_subgraphs_are_smoothed_without(self, made: Made, tmp_path: Path) -> None:
        only = {"enable_subgraph_type": ["ov", "up-down"]}
        one, other = (made.smoothed(tmp_path / str(i), one | only) for i, one in enumerate((ITER, SHIFT)))
        assert one.keys() == other.keys() == made.state.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_linears_that_lose_their_bias_are_told(self, made: Made) -> None:
        dynamic = {"act": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}}
        static = {"act": {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}}
        rules = {
            scheme: {"type": "linear_quant", "qconfig": {**act, "weight": WEIGHT}}
            for scheme, act in (("dynamic", dynamic), ("static", static))
        }
        (told,) = [text for text in made.planned(SHIFT, rules["dynamic"]).warnings if "symmetric: false" in text]
        assert "gives a bias to 4 W8A8_DYNAMIC linears whose class has none, e.g. layers.0.mlp.gate_proj" in told
        assert "Quantize them to static W8A8" in told  # q, k and v have a bias of their own
        for process in ((SHIFT, rules["static"]), (ITER, rules["dynamic"])):
            assert not [text for text in made.planned(*process).warnings if "symmetric: false" in text]
        part = rules["static"] | {"exclude": ["*.up_proj"]}
        (told,) = [text for text in made.planned(SHIFT, part).warnings if "symmetric: false" in text]
        assert "2 FLOAT linears" in told

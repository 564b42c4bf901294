"""What a search tries is what the layer of the recipe computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.quantization.building import build_layer
from slim_core.quantization.kinds import layer_form
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.quantization.weights import InMemory
from slim_core.recipe import LinearQConfig
from slim_core.smoothing.trials import act_quantizer, weight_quantizer

WIDTH = 128
CPU = torch.device("cpu")
TOKEN: dict[str, Any] = {"scope": "per_token"}
TOKEN_4: dict[str, Any] = {"scope": "per_token", "dtype": "int4"}
SSZ_4: dict[str, Any] = {"dtype": "int4", "method": "ssz"}
GROUPS: dict[str, Any] = {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 32}}
FP8: dict[str, Any] = {"dtype": "fp8_e4m3"}
MX8: dict[str, Any] = {"dtype": "mxfp8", "scope": "per_block"}
MX4: dict[str, Any] = {"dtype": "mxfp4", "scope": "per_block"}
DUAL: dict[str, Any] = {
    "dtype": "mxfp4",
    "scope": "dual_scale",
    "method": "dualscale",
    "ext": {"dual_block_size": 64},
}
RECIPES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "static": ({}, {}),
    "static symmetric": ({"symmetric": True}, {}),
    "mixed": ({"scope": "pd_mix"}, {}),
    "dynamic": (TOKEN, {}),
    "dynamic ssz": (TOKEN, {"method": "ssz"}),
    "w4a8": (TOKEN, SSZ_4),
    "w4a8 few steps": (TOKEN, SSZ_4 | {"ext": {"step": 2}}),
    "w4a8 weighted": (TOKEN, SSZ_4 | {"ext": {"weighted": True}}),
    "w4a8 groups": (TOKEN, GROUPS),
    "w4a8 groups ssz": (TOKEN, GROUPS | {"method": "ssz"}),
    "w4a4": (TOKEN_4, {"dtype": "int4"}),
    "w4a4 asymmetric": (TOKEN_4, {"dtype": "int4", "symmetric": False}),
    "w8a16": (None, {}),
    "w4a16 asymmetric groups": (None, GROUPS | {"symmetric": False}),
    "w8a8s": ({}, {"method": "sparse"}),
    "fp8": (FP8 | {"scope": "per_token"}, FP8),
    "mxfp8": (MX8, MX8 | {"method": "mse_round"}),
    "w4a8 mxfp": (MX8, MX4 | {"method": "ceil_x"}),
    "mxfp4": (MX4, MX4 | {"method": "fouroversix"}),
    "dual scale": (DUAL, DUAL),
}


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, WIDTH, generator=generator) + 0.3
    return x * (1 + 20 * (torch.rand(WIDTH, generator=generator) < 0.1))


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, WIDTH, generator=generator) * 0.05


@pytest.mark.parametrize("name", RECIPES)
def test_products_are_those_of_the_layer(name: str) -> None:
    act, weight = RECIPES[name]
    config = LinearQConfig.model_validate({"act": act, "weight": weight})
    form = layer_form(config)
    x, w = inputs(), weights()
    seen = InputStatistics(frozenset({Need.CHANNELS, Need.HISTOGRAM}))
    seen.update(x)
    scales = torch.stack([torch.ones(WIDTH), x.abs().amax(0).sqrt(), torch.linspace(0.2, 5, WIDTH)])
    acts = act_quantizer(config.act, form, seen.channels, torch.bfloat16)(x / scales.unsqueeze(1), scales)
    trial = weight_quantizer(config.weight, form, seen.channels, "layer", CPU)
    tried = torch.bmm(acts, trial(w * scales.unsqueeze(1), scales).mT)
    for scale, found in zip(scales, tried, strict=True):
        scaled = seen.rescaled(scale)
        quantized = quantize_weight(
            InMemory(w * scale), config.weight, form, tensor="layer", linear="layer", seen=scaled
        )
        layer = build_layer(form, quantized, config.act, seen=scaled, bias=None, name="layer", dtype=torch.bfloat16)
        wanted = layer.simulate(x / scale).float()
        # quant_bias of a static layer is rounded to a whole number of deq_scale.
        tolerance = 0.51 * float(getattr(layer, "deq_scale", torch.zeros(1)).max()) if name == "static" else 0.0
        assert float((found - wanted).abs().max()) <= tolerance + 1e-5 * float(wanted.abs().max())
        assert float((found - x @ w.T).norm() / (x @ w.T).norm()) < 0.6


def test_a_histogram_is_tried_by_the_extremes() -> None:
    config = LinearQConfig.model_validate({"act": {"method": "histogram"}, "weight": {}})
    plain = LinearQConfig.model_validate({"act": {}, "weight": {}})
    seen = InputStatistics(frozenset({Need.CHANNELS}))
    seen.update(x := inputs())
    scale = torch.ones(1, WIDTH)
    form = layer_form(plain)
    one, other = (act_quantizer(c.act, form, seen.channels, None)(x.unsqueeze(0), scale) for c in (config, plain))
    assert torch.equal(one, other)

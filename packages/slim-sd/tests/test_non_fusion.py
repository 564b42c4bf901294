"""Smoothing of a Wan transformer, whose inputs are scaled while it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.devices import resolve_devices
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.plan import make_plan
from slim_core.runners.run import run_plan
from slim_core.runners.simulated import simulated
from slim_core.savers.mindie_folder import MindieFolder
from slim_sd.wan.names import original_name

CPU = torch.device("cpu")
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "freq_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "cross_attn_norm": True,
}
GROUPS = (
    *(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_q",), ("attn2.to_k", "attn2.to_v")),
    *(("attn1.to_out.0",), ("attn2.to_out.0",), ("ffn.net.0.proj",), ("ffn.net.2",)),
)
LINEARS = [f"blocks.{i}.{name}" for i in range(2) for group in GROUPS for name in group]
PROCESS: list[dict[str, Any]] = [
    {"type": "iter_smooth", "alpha": 0.6},
    {
        "type": "linear_quant",
        "qconfig": {
            "act": {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"},
            "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
        },
        "exclude": ["*ffn.2"],
    },
]


def transformer() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIG).eval()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights, which make a few channels of every input far larger than the others."""
    generator, values = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, value in transformer().state_dict().items():
        drawn = torch.randn(value.shape, generator=generator) * 0.1
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm2.weight")):
            drawn += 1
        if name.startswith("blocks") and name.endswith("scale_shift_table"):
            drawn[:, [1, 4], 5] += 30
        if name.endswith("text_embedder.linear_2.weight"):
            drawn[9] *= 40
        values[name] = drawn
    return values


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "hidden_states": torch.randn(1, 4, 2, 6, 6, generator=generator),
            "timestep": torch.tensor([step]),
            "encoder_hidden_states": torch.randn(1, 7, 24, generator=generator),
            "return_dict": False,
        }
        for step in (900, 300)
    ]


@pytest.fixture
def model(state: dict[str, Tensor], tmp_path: Path) -> StreamedModel:
    """In the original layout."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({original_name(name): value for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with parameters_on_meta():
        module = transformer()
    groups = (*GROUPS, ("attn2.add_k_proj",))  # which only some Wan transformers have
    return StreamedModel(module, Checkpoint(folder), folder, {}, ("blocks",), original_name, scaled_inputs=groups)


def quantized(
    model: StreamedModel, calls: list[dict[str, Any]], out: Path, *process: dict[str, Any]
) -> dict[str, Tensor]:
    spec = {"process": list(process), "save": [{"type": "mindie_format_saver"}]}
    parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}).spec()
    plan = make_plan(model, parsed, resolve_devices("cpu", explicit=True), example=lambda: calls[0])
    if len(process) > 1:
        assert "iter_smooth: 12 non-fusion smoothed" in [one.summary() for one in plan.processors]
    run_plan(plan, out, fingerprint="", progress=SilentProgress(), calibration=lambda: calls)
    (file,) = out.glob("*.safetensors")
    assert file.name == "quant_model_weight_w8a8_dynamic.safetensors"
    return load_file(file)


def naive(written: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """What MindIE-SD puts in the place of a linear, by its original name."""
    factor = written.get(f"{name}.div.mul_scale")
    prefix = name if factor is None else f"{name}.linear"
    weight, scale = written[f"{prefix}.weight"].double(), written[f"{prefix}.weight_scale"].double().T
    bias = written[f"{prefix}.bias"].double()

    def forward(x: Tensor) -> Tensor:
        y = x if factor is None else x * factor
        step = y.abs().amax(-1, keepdim=True) / 127  # in float32, or codes between two numbers fall the other way
        return ((y / step).round().double() @ weight.T * step * scale + bias).to(x.dtype)

    return forward


def outputs(state: dict[str, Tensor], calls: list[dict[str, Any]], written: dict[str, Tensor] | None = None) -> Tensor:
    """Of the float model, in which the engine has replaced what is quantized."""
    module = transformer()
    module.load_state_dict(state)
    for name in LINEARS if written is not None else ():
        assert written is not None
        original = original_name(f"{name}.weight").removesuffix(".weight")
        if written.get(f"{original}.linear.weight", written.get(f"{original}.weight")).dtype == torch.int8:
            module.get_submodule(name).forward = naive(written, original)
    with torch.no_grad():
        return torch.cat([module(**call)[0].double() for call in calls])


def test_wan_for_mindie_sd(
    model: StreamedModel, state: dict[str, Tensor], calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    written = quantized(model, calls, tmp_path / "smoothed", *PROCESS)
    scaled = {name.removesuffix(".div.mul_scale") for name in written if name.endswith("mul_scale")}
    leaves = [f"{attention}_attn.{one}" for attention in ("self", "cross") for one in "qkvo"]
    assert scaled == {f"blocks.{i}.{name}" for i in range(2) for name in (*leaves, "ffn.0")}
    for i in range(2):
        group = [written[f"blocks.{i}.self_attn.{one}.div.mul_scale"] for one in "qkv"]
        assert all(torch.equal(one, group[0]) for one in group)
        assert float(group[0][5] / group[0].median()) < 0.3  # the channel of the outliers
    floats = {original_name(name): value for name, value in state.items()}
    untouched = [name for name in floats if name in written]  # the engine has them from the float model
    assert len(untouched) > 30
    assert all(torch.equal(written[name], floats[name]) for name in untouched)
    assert "blocks.0.norm3.weight" in untouched
    assert "blocks.0.ffn.2.weight" in untouched

    want, got = outputs(state, calls), outputs(state, calls, written)
    plain = outputs(state, calls, quantized(model, calls, tmp_path / "plain", *PROCESS[1:]))
    error, without = (float((one - want).norm() / want.norm()) for one in (got, plain))
    assert 0 < error <= 0.7 * without

    folder = MindieFolder(tmp_path / "smoothed")
    layers = {info.name: folder.layer(info.prefix) for unit in model.units for info in unit.linears}
    replaced = {name: layer for name, layer in layers.items() if layer is not None}
    assert {name for name, _ in folder.layers()} == scaled
    assert len(replaced) == len(scaled)
    made: list[Tensor] = []
    with torch.no_grad(), BlockForwards(model, calls, CPU) as forwards:
        for unit in model.running:
            forwards.reach(unit)
            model.load(unit.parameters, CPU)
            inside = {name: layer for name, layer in replaced.items() if name.startswith(f"{unit.name}.")}
            with simulated(model.module, inside, CPU):
                if unit is model.running[-1]:
                    forwards.run_to_end()
                else:
                    forwards.run(hand_on=True)
        made = [forwards.finish(sample)[0].double() for sample in range(len(calls))]
    # Roundings of the last bit make a few codes fall the other way; without the scales it would be no smaller than 1.
    assert float((torch.cat(made) - got).norm() / (got - want).norm()) <= 0.2

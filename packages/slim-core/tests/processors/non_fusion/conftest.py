"""A small diffusion transformer with outlier channels, in a folder, and what smoothers make of it.

Its norms have no weights, but for the one in front of the cross attention; what they make is modulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from slim_core.checkpoint.reader import Checkpoint
from slim_core.devices import resolve_devices
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.run import RunResult, run_plan

HIDDEN, WIDE, HEADS, BLOCKS = 64, 128, 4, 2
OUTLIERS = (3, 17)

GROUPS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_q",),
    ("attn2.to_k", "attn2.to_v"),
    ("attn1.to_out.0",),
    ("attn2.to_out.0",),
    ("ffn.net.0.proj",),
    ("ffn.net.2",),
    ("attn2.add_k",),  # some models have it
)
LINEARS = tuple(name for group in GROUPS[:-1] for name in group)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        states = self.to_q(x), self.to_k(context), self.to_v(context)
        mixed = functional.scaled_dot_product_attention(*map(heads, states))
        return self.to_out[0](torch.tanh(mixed.transpose(1, 2).flatten(-2)))  # no value rows to fold into


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x), approximate="tanh")


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(), nn.Dropout(0.0), nn.Linear(WIDE, HIDDEN)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ffn = Attention(), Attention(), Feed()
        self.norm1 = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.norm3 = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(6, HIDDEN))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attn1(y, y) * gate1
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ffn(self.norm3(x) * (1 + scale2) + shift2) * gate2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        hidden = self.patch(hidden)
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.head(hidden)


State = dict[str, Tensor]
Scheme = dict[str, Any]


def linear_quant(act: str = "per_token", weight: str = "int8", **filters: Any) -> Scheme:
    """The recipe of a ``linear_quant``."""
    scope = {"int8": "per_channel", "mxfp8": "per_block", "mxfp4": "per_block"}[weight]
    return {
        "type": "linear_quant",
        "qconfig": {
            "act": {"scope": act, "dtype": weight, "symmetric": act != "per_tensor", "method": "minmax"},
            "weight": {"scope": scope, "dtype": weight, "symmetric": True, "method": "minmax"},
        },
        **filters,
    }


@dataclass
class Made:
    """A model in a folder, and the samples it is calibrated with."""

    folder: Path
    state: State
    inputs: list[dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=lambda: {"scaled_inputs": GROUPS})

    def open(self) -> StreamedModel:
        with parameters_on_meta():
            net = Net().to(self.state["head.weight"].dtype)
        return StreamedModel(net, Checkpoint(self.folder), self.folder, {}, **self.options)

    def planned(self, *process: Scheme, saver: str = "mindie_format_saver", **more: Any) -> Plan:
        spec = {"process": list(process), "save": [{"type": saver}], **more}
        parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}).spec()
        return make_plan(self.open(), parsed, resolve_devices("cpu", explicit=True), example=lambda: self.inputs[0])

    def carried_out(self, plan: Plan, out: Path, **options: Any) -> tuple[State, RunResult]:
        """What a run writes."""
        options = {"fingerprint": "", "progress": SilentProgress(), "calibration": lambda: self.inputs} | options
        result = run_plan(plan, out, **options)
        tensors: State = {}
        for file in sorted(out.glob("*.safetensors")):
            tensors |= load_file(file)
        return tensors, result

    def written(self, out: Path, *process: Scheme, **options: Any) -> State:
        return self.carried_out(self.planned(*process), out, **options)[0]

    def net(self, forwards: Mapping[str, Callable[[Tensor], Tensor]], dtype: torch.dtype = torch.float64) -> Net:
        """The original model in which some linears, by name, compute something else."""
        net = Net().to(dtype)
        net.load_state_dict({name: value.to(dtype) for name, value in self.state.items()})
        for name, forward in forwards.items():
            net.get_submodule(name).forward = forward
        return net.eval()

    def outputs(self, forwards: Mapping[str, Callable[[Tensor], Tensor]], dtype: torch.dtype = torch.float64) -> Tensor:
        """What such a model computes of all samples."""
        net = self.net(forwards, dtype)
        with torch.no_grad():
            return torch.cat([net(**{key: value.to(dtype) for key, value in one.items()}) for one in self.inputs])

    def inputs_of(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The inputs of all linears of the original model over all samples ``(tokens, channels)``."""
        net, seen = self.net({}, dtype), dict[str, list[Tensor]]()
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
        with torch.no_grad():
            for one in self.inputs:
                net(**{key: value.to(dtype) for key, value in one.items()})
        return {name: torch.cat([part.flatten(0, -2) for part in parts]) for name, parts in seen.items()}


def make_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    """A random model with a few outlier channels wherever linears read."""
    folder.mkdir(exist_ok=True, parents=True)
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for name, parameter in Net().state_dict().items():
        value = torch.randn(parameter.shape, generator=generator) * 0.1
        if name.endswith("norm2.weight"):
            value += 1
        if name.endswith("scale_shift_table"):
            value[[1, 4]] *= 3
            for channel in OUTLIERS:
                value[[1, 4], channel] += 30
        if name.endswith("ffn.net.0.proj.weight"):
            value[list(OUTLIERS)] *= 10
        state[name] = value.to(dtype).contiguous()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    inputs: list[dict[str, Tensor]] = []
    for _ in range(3):
        hidden = torch.randn(1, 40, HIDDEN, generator=generator)
        context = torch.randn(1, 30, HIDDEN, generator=generator)
        context[..., list(OUTLIERS)] *= 25
        inputs.append({"hidden": hidden.to(dtype), "context": context.to(dtype)})
    made = Made(folder, state, inputs)
    made.options |= options
    return made


@pytest.fixture(scope="session")
def make() -> Callable[..., Made]:
    """``make(folder, dtype, **options)``: a model of one's own; options are those of its :class:`StreamedModel`."""
    return make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_model(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def quant() -> Callable[..., Scheme]:
    return linear_quant

"""A small model with outlier channels, in a folder, and what smoothers make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

HIDDEN, WIDE, HEADS, KV_HEADS, DIM, EXPERTS = 16, 24, 4, 2, 6, 3


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (self.weight.float() * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Attention(nn.Module):
    head_dim = DIM

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * DIM)
        self.k_proj = nn.Linear(HIDDEN, kv_heads * DIM)
        self.v_proj = nn.Linear(HIDDEN, kv_heads * DIM)
        self.o_proj = nn.Linear(HEADS * DIM, HIDDEN, bias=False)
        self.kv_heads = kv_heads

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, DIM)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k, v = (
            part(x).view(shape).transpose(1, 2).repeat_interleave(HEADS // self.kv_heads, 1)
            for part in (self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    def __init__(self, wide: int = WIDE) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, wide, bias=False), nn.Linear(HIDDEN, wide, bias=False)
        self.down_proj = nn.Linear(wide, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Not a linear, though it multiplies by a matrix: as most routers it does more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS - 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight).argmax(-1)


class Experts(nn.Module):
    """Every token goes to one expert; none to the last, which is called all the same if ``calls_idle``."""

    def __init__(self, calls_idle: bool) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList(MLP(12) for _ in range(EXPERTS))
        self.calls_idle = calls_idle

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        chosen = self.router(rows)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if self.calls_idle or bool(mine.any()):
                result[mine] = expert(rows[mine])
        return result.view(x.shape)


class Block(nn.Module):
    def __init__(self, kv_heads: int, moe: bool, calls_idle: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)
        self.self_attn = Attention(kv_heads)
        self.mlp = Experts(calls_idle) if moe else MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Net(nn.Module):
    def __init__(self, kv_heads: int = KV_HEADS, moe: bool = False, calls_idle: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(kv_heads, moe, calls_idle) for _ in range(2))
        self.head = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


State = dict[str, Tensor]


@dataclass
class Made:
    """A model in a folder, and the samples it is calibrated with."""

    folder: Path
    state: State
    inputs: list[dict[str, Tensor]]
    options: dict[str, Any]

    def open(self) -> StreamedModel:
        with parameters_on_meta():
            net = Net(**self.options).to(self.state["head.weight"].dtype)
        return StreamedModel(net, Checkpoint(self.folder), self.folder, {})

    def planned(self, *process: dict[str, Any]) -> Plan:
        parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": list(process)}}).spec()
        example = self.inputs[0]
        return make_plan(self.open(), parsed, resolve_devices("cpu", explicit=True), example=lambda: example)

    def carried_out(
        self, plan: Plan, out: Path, inputs: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[State, RunResult]:
        """What a run writes, calibrated with its own inputs unless there are others."""
        calibration = self.inputs if inputs is None else inputs
        result = run_plan(plan, out, fingerprint="", progress=SilentProgress(), calibration=lambda: calibration)
        tensors: State = {}
        for file in sorted(out.glob("*.safetensors")):
            tensors |= load_file(file)
        return tensors, result

    def smoothed(self, out: Path, *process: dict[str, Any]) -> State:
        return self.carried_out(self.planned(*process), out)[0]

    def with_tensors(self, state: State, dtype: torch.dtype) -> nn.Module:
        """The model with these tensors; biases of norms and linears are applied where there are."""
        net = Net(**self.options).to(dtype)
        for name, stored in state.items():
            path, _, leaf = name.rpartition(".")
            module, value = net.get_submodule(path), stored.to(dtype)
            if leaf == "bias" and isinstance(module, RMSNorm):
                module.register_forward_hook(lambda _m, _a, y, bias=value: y + bias)
            else:
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        return net

    def outputs(self, state: State) -> Tensor:
        """What a model with these tensors computes, in float64."""
        net = self.with_tensors(state, torch.float64)
        with torch.no_grad():
            return torch.cat([net(one["hidden"].double()) for one in self.inputs], 1)

    def error_of(self, state: State) -> float:
        """How far the output of a model with these tensors is off, relative to the largest value."""
        want, got = self.outputs(self.state), self.outputs(state)
        return float((got - want).abs().max() / want.abs().max())

    def inputs_of(self, state: State) -> dict[str, Tensor]:
        """The inputs of all linears over all samples ``(batch, tokens, channels)``, from a model with these tensors."""
        net = self.with_tensors(state, torch.float32)
        seen: dict[str, list[Tensor]] = {}
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
        with torch.no_grad():
            for one in self.inputs:
                net(one["hidden"].float())
        return {name: torch.cat(parts, -2) for name, parts in seen.items()}


def make_model(
    folder: Path, dtype: torch.dtype = torch.float32, change: Callable[[State], None] = lambda _: None, **options: Any
) -> Made:
    """A random model whose norms are no ones, with a few outlier channels."""
    folder.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    net = Net(**options)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            if "norm" in name:
                parameter[3] *= 20
    state = {name: value.detach().to(dtype).contiguous() for name, value in net.state_dict().items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)
    inputs = [{"hidden": torch.randn(1, 7, HIDDEN, generator=generator).to(dtype)} for _ in range(4)]
    return Made(folder, state, inputs, options)


@pytest.fixture(scope="session")
def make() -> Callable[..., Made]:
    """``make(folder, dtype, change, **options)``: a model of one's own."""
    return make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_model(tmp_path_factory.mktemp("made"))

"""Experts taken apart compute what the stacked ones compute, whatever the family and however they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    revert_weight_conversion,
)

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.sliced import SlicedSource
from slim_core.model.linears import is_linear
from slim_core.model.streamed import StreamedModel
from slim_llm.models.experts import experts_apart, take_experts_apart
from slim_llm.models.loading import open_model

ModelFolder = Callable[..., Path]
Plain = Callable[[Path], Any]
Opened = Callable[[Path], tuple[StreamedModel, Any]]
# How transformers writes each family, which is how the hub has it: prefix and linears of one expert, or a stack.
SINGLE = {
    "qwen2_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_next": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v2": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "glm4_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "longcat": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "nemotron_h": ("mixer.experts", ("up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "minimax_m2": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "phimoe": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
}
STACKED = {
    "gpt_oss": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "llama4": ("feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
    "jetmoe": ("mlp.input_linear", ("",)),
}
FAMILIES = SINGLE | STACKED


def calls_of(model: nn.Module, names: list[str]) -> dict[str, list[tuple[Tensor, ...]]]:
    """Is filled with what these modules are called with."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _module, args, name=name: seen[name].append(args))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_compute_what_they_did_and_route_every_token_the_same(
    plain: Plain, opened: Opened, model_folder: ModelFolder, family: str
) -> None:
    folder = model_folder(family, torch.float32)
    before, (model, after) = plain(folder), opened(folder)
    names = [name for name, _ in experts_apart(after)]
    assert names
    given = [calls_of(module, names) for module in (before, after)]
    ids = torch.randint(0, 3069, (2, 33), generator=torch.Generator().manual_seed(1))
    want, found = (module(input_ids=ids, use_cache=False).logits for module in (before, after))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for name in names:
        for one, other in zip(given[0][name], given[1][name], strict=True):
            for a, b in zip(map(torch.as_tensor, one), map(torch.as_tensor, other), strict=True):
                if a.is_floating_point():
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                else:  # which expert every token goes to
                    assert torch.equal(a, b)
    assert model.block_lists == ("model.layers",)


def routed(experts: int, dtype: torch.dtype, tokens: int = 19, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, two experts for each token out of all but the second one, and their weights."""
    generator = torch.Generator().manual_seed(7)
    choice = torch.tensor([e for e in range(experts) if e != 1])
    index = torch.stack([choice[torch.randperm(len(choice), generator=generator)[:2]] for _ in range(tokens)])
    return (
        torch.randn(tokens, width, generator=generator).to(dtype),
        index,
        torch.rand(tokens, 2, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama4", "jetmoe")])
@torch.no_grad()
def test_only_experts_that_were_hit_are_called_once_each(
    plain: Plain, opened: Opened, model_folder: ModelFolder, family: str, dtype: torch.dtype
) -> None:
    folder = model_folder(family, torch.float32)
    before, (_, after) = plain(folder).to(dtype), opened(folder)
    after.to(dtype)
    name, apart = next(experts_apart(after))
    seen: dict[str, list[Tensor]] = {}
    module = after.get_submodule(name)
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear):
            child.register_forward_pre_hook(lambda _m, args, path=path: seen.setdefault(path, []).append(args[0]))
    states, index, weights = routed(apart.count + (2 if family == "longcat" else 0), dtype)
    want, found = before.get_submodule(name)(states, index, weights), module(states, index, weights)
    tolerance = 1e-12 if dtype == torch.float64 else 2**-6
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    hit = sorted(set(index.flatten().tolist()) & set(range(apart.count)))
    linears = [linear for stack in apart.stacks for linear in stack.linears]
    assert sorted(seen) == sorted(f"{expert}.{linear}" for expert in hit for linear in linears)
    assert 1 not in hit
    for path, inputs in seen.items():
        expert, _, linear = path.partition(".")
        (x,) = inputs
        given = torch.cat([states[index[:, choice] == int(expert)] for choice in range(2)])
        assert len(x) == len(given)
        if linear in apart.stacks[0].linears:
            assert torch.equal(x, given)
    for stack in apart.stacks[:1]:  # those that read the same are given the same tensor, so that they share statistics
        for expert in hit:
            assert len({id(seen[f"{expert}.{linear}"][0]) for linear in stack.linears}) == 1


@torch.no_grad()
def test_llama4_runs_its_experts_on_the_tokens_routed_to_them(
    plain: Plain, opened: Opened, model_folder: ModelFolder
) -> None:
    """There the experts are given all tokens, most of them zero."""
    folder = model_folder("llama4", torch.float32)
    before, (_, after) = plain(folder), opened(folder)
    name, apart = next(experts_apart(after))
    module = after.get_submodule(name)
    rows: dict[str, list[int]] = {}
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear):
            child.register_forward_pre_hook(
                lambda _module, args, path=path: rows.setdefault(path, []).append(args[0].shape[-2])
            )
    before.double(), after.double()
    states = torch.randn(apart.count, 11, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    counts = [4, 0, 11, 1]
    for expert, count in enumerate(counts):
        states[expert, count:] = 0
    wanted = before.get_submodule(name)(states.view(-1, 32))
    torch.testing.assert_close(module(states.view(-1, 32)), wanted, rtol=1e-12, atol=1e-12)
    want = {f"{e}.{linear}": [n] for e, n in enumerate(counts) if n for linear in FAMILIES["llama4"][1]}
    assert rows == want


def test_gradients_reach_the_linears(opened: Opened, model_folder: ModelFolder) -> None:
    for family in ("qwen3_moe", "llama4", "gpt_oss"):
        _, module = opened(model_folder(family, torch.float32))
        name, apart = next(experts_apart(module))
        experts = module.get_submodule(name).requires_grad_(True)
        states, index, weights = routed(apart.count, torch.float32)
        given = (states.repeat(apart.count, 1),) if family == "llama4" else (states, index, weights)
        experts(*given).square().sum().backward()
        reached = {path for path, parameter in experts.named_parameters() if parameter.grad is not None}
        missed = {path for path, _ in experts.named_parameters()} - reached
        assert reached
        assert all(path.startswith("1.") for path in missed)  # the expert that no token was routed to


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_checkpoint_and_the_engines(model_folder: ModelFolder, family: str) -> None:
    model = open_model(model_folder(family))
    path, linears = FAMILIES[family]
    block = next(unit for unit in model.units if any(f".{path}." in info.prefix for info in unit.linears))
    count = 8 if family == "deepseek_v3" else 4
    found = [info for info in block.linears if f".{path}." in info.prefix]
    front = "backbone" if family == "nemotron_h" else "model"
    number = block.name.rpartition(".")[2]
    assert [info.prefix for info in found] == [
        ".".join(filter(None, (f"{front}.layers.{number}.{path}", str(e), linear)))
        for e in range(count)
        for linear in linears
    ]
    assert all(info.has_bias == (family == "gpt_oss") and info.in_block for info in found)
    assert {info.name.split(".")[-1] for info in found} == {info.prefix.split(".")[-1] for info in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_written_once(model_folder: ModelFolder, family: str) -> None:
    folder = model_folder(family)
    model = open_model(folder)
    written = [origin for unit in model.units for name, origin in unit.tensors.items() if name == origin]
    assert sorted(written) == sorted(model.source)
    raw, stacks = Checkpoint(folder), isinstance(model.source, SlicedSource)
    assert stacks == (family in STACKED)
    assert sum(model.source.meta(name).numel for name in written) == sum(raw.meta(name).numel for name in raw)
    biases = [name for name in raw if "correction_bias" in name]
    assert bool(biases) == (family in ("deepseek_v3", "glm4_moe", "minimax_m2", "longcat", "nemotron_h"))
    owned = {stored for unit in model.units for stored in unit.parameters.values()}
    assert set(biases) <= owned


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_no_linears(model_folder: ModelFolder, family: str) -> None:
    model = open_model(model_folder(family))
    linears = [info.name for unit in model.units for info in unit.linears]
    words = ("router", "gate", "shared_expert_gate", "classifier", "layer", "wg")
    assert not [name for name in linears if name.rpartition(".")[2] in words]
    marked = [
        name for name, module in model.module.named_modules() if isinstance(module, nn.Linear) and not is_linear(module)
    ]
    assert bool(marked) == (family in ("qwen2_moe", "qwen3_next", "longcat", "jetmoe", "llama4", "phimoe"))


def test_routers_beside_experts_that_are_not_stacked() -> None:
    """As in models that bring code of their own."""
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.gate = nn.Linear(8, 4)
    model.mlp.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 6)}) for _ in range(4))
    model.mlp.shared_expert_gate = nn.Linear(8, 1)
    model.mlp.shared_expert = nn.ModuleDict({"gate_proj": nn.Linear(8, 6)})
    model.other = nn.ModuleDict({"gate": nn.Linear(8, 4)})
    x = torch.randn(3, 8)
    want = model.mlp.gate(x)
    take_experts_apart(model, lambda *_: None)
    assert torch.equal(model.mlp.gate(x), want)
    routers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_linear(module)
    ]
    assert routers == ["mlp.gate", "mlp.shared_expert_gate"]


def test_routers_whatever_their_experts_are() -> None:
    """As in DBRX, whose experts are two-dimensional, and in Gemma 3n, which routes between copies of a state."""
    model = nn.Module()
    model.ffn = nn.Module()
    model.ffn.router = nn.Module()
    model.ffn.router.layer = nn.Linear(8, 4)
    model.ffn.experts = nn.Module()
    model.ffn.experts.w1 = nn.Parameter(torch.zeros(4 * 6, 8))
    model.altup = nn.ModuleDict({"modality_router": nn.Linear(8, 4), "coefs": nn.Linear(4, 4)})
    take_experts_apart(model, lambda *_: None)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    assert linears == ["altup.coefs"]


def test_what_transformers_writes_is_what_the_hub_has(plain: Plain, model_folder: ModelFolder) -> None:
    for family in FAMILIES:
        raw = Checkpoint(model_folder(family))
        path, linears = FAMILIES[family]
        stacks = [name for name in raw if len(raw.meta(name).shape) == 3 and "conv1d" not in name]
        assert bool(stacks) == (family in STACKED)
        if family in SINGLE:
            single = sorted({name.rsplit(".", 2)[1] for name in raw if f".{path}." in name})
            assert single == sorted(linears)
            module = plain(model_folder(family))
            assert set(revert_weight_conversion(module, module.state_dict())) == set(raw)

"""Experts taken apart compute what the stacked ones compute, whatever the family and however they are stored."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.sliced import SlicedSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.linears import is_linear
from slim_core.model.units import LinearInfo, StreamedModel
from slim_llm.models import conversions
from slim_llm.models.experts import experts_apart, find_experts, take_experts_apart
from slim_llm.models.loading import open_model

CPU = torch.device("cpu")
ModelFolder = Callable[..., Path]
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


def in_memory(model: nn.Module) -> Any:
    """The model with tensors that are no views of a file: how they are aligned there decides how sums are rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
    return model.eval()


def plain(folder: Path) -> Any:
    """The model as transformers has it, with the forward that indexes the stacks."""
    return in_memory(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager"))


def opened(folder: Path) -> tuple[StreamedModel, Any]:
    """The model as Slim opens it, all of it loaded."""
    model = open_model(folder)
    model.load([name for unit in model.units for name in unit.parameters], CPU)
    assert not [name for name, parameter in model.module.named_parameters() if parameter.is_meta]
    return model, in_memory(model.module)


def calls_of(model: nn.Module, names: list[str]) -> dict[str, list[tuple[Tensor, ...]]]:
    """Is filled with what these modules are called with."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _module, args, name=name: seen[name].append(args))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_compute_what_they_did_and_route_every_token_the_same(model_folder: ModelFolder, family: str) -> None:
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
    assert model.blocks_name == "model.layers"


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
    model_folder: ModelFolder, family: str, dtype: torch.dtype
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
def test_llama4_runs_its_experts_on_the_tokens_routed_to_them(model_folder: ModelFolder) -> None:
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


def test_gradients_reach_the_linears(model_folder: ModelFolder) -> None:
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
    take_experts_apart(model, no_spelling)
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
    take_experts_apart(model, no_spelling)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    assert linears == ["altup.coefs"]


class SharedExperts(nn.Module):
    """Every token goes through all of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.randn(count, 6, 8))
        self.up_proj = nn.Parameter(torch.randn(count, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(count, 8, 6))

    def forward(self, x: Tensor, gammas: Tensor) -> Tensor:
        x = x.expand(len(gammas), -1, -1)
        gate = torch.bmm(x, self.gate_proj.transpose(1, 2))
        up = torch.bmm(x, self.up_proj.transpose(-1, 1))
        return torch.bmm(gate * up * gammas, self.down_proj.transpose(2, 1)).sum(0)


@pytest.mark.parametrize("count", [1, 3])
def test_experts_that_all_tokens_go_through(count: int) -> None:
    experts = SharedExperts(count)
    tensors = {name: tensor.clone() for name, tensor in experts.named_parameters()}
    x, gammas = torch.randn(5, 8), torch.randn(count, 1, 1)
    with torch.no_grad():
        want = experts(x, gammas)
    model = nn.ModuleDict({"shared_experts": experts})
    take_experts_apart(model, no_spelling)
    names = [f"{e}.{linear}" for e in range(count) for linear in ("gate_proj", "up_proj", "down_proj")]
    assert [name for name, module in experts.named_modules() if is_linear(module)] == names
    for name in names:
        expert, linear = name.split(".")
        experts.get_submodule(name).weight = nn.Parameter(tensors[linear][int(expert)])
    with torch.no_grad():
        torch.testing.assert_close(experts(x, gammas), want)


def test_uses_of_a_turned_stack_that_are_not_known() -> None:
    experts = SharedExperts(2)
    take_experts_apart(nn.ModuleDict({"shared_experts": experts}), no_spelling)
    turned = experts.gate_proj.transpose(1, 2)
    assert turned.shape == (2, 8, 6)
    assert turned.transpose(1, 2).shape == (2, 6, 8)
    with pytest.raises(UnsupportedError, match=r"transpose\(0, 1\)"):
        experts.gate_proj.transpose(0, 1)
    with pytest.raises(UnsupportedError, match="one matrix of the transposed stack"):
        turned[0]
    with pytest.raises(UnsupportedError, match="uses 'gate_proj' in a way that is not known here"):
        torch.bmm(torch.zeros(3, 4, 8), turned)


def stacked_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors under the names that transformers has in memory, experts stacked."""
    return {name: tensor.clone() for name, tensor in plain(folder).state_dict().items()}


def rewritten(source: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def experts_of(model: StreamedModel) -> Iterator[LinearInfo]:
    for unit in model.units:
        yield from (info for info in unit.linears if "expert" in info.name and "shared" not in info.name)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h"])
@torch.no_grad()
def test_all_layouts_are_the_same_model(model_folder: ModelFolder, tmp_path: Path, family: str) -> None:
    """Single tensors, stacks as transformers has them, and their transpose."""
    folder = model_folder(family, torch.float32)
    tensors = stacked_tensors(folder)
    turned = {name: t.mT if t.dim() == 3 and "experts" in name else t for name, t in tensors.items()}
    folders = [rewritten(folder, tmp_path / "stacked", tensors), rewritten(folder, tmp_path / "turned", turned)]
    if family in STACKED:
        single = {name: source.load(name).clone() for source in (open_model(folder).source,) for name in source}
        folders.append(rewritten(folder, tmp_path / "single", single))
    else:
        folders.append(folder)
    ids = torch.randint(0, 3069, (1, 21), generator=torch.Generator().manual_seed(1))
    want = plain(folder)(input_ids=ids, use_cache=False).logits
    reference = open_model(folder)
    for layout in folders:
        model = open_model(layout)
        assert isinstance(model.source, SlicedSource) == (
            layout.name in ("stacked", "turned") or (layout == folder and family in STACKED)
        )
        for info, other in zip(experts_of(reference), experts_of(model), strict=True):
            assert info.name == other.name
            for part in ("weight", "bias") if info.has_bias else ("weight",):
                one, two = f"{info.prefix}.{part}", f"{other.prefix}.{part}"
                assert torch.equal(reference.source.load(one), model.source.load(two))
                assert torch.equal(model.source.rows(two, 1, 5), reference.source.load(one)[1:5])
        _, module = opened(layout)
        torch.testing.assert_close(module(input_ids=ids, use_cache=False).logits, want, rtol=1e-5, atol=1e-5)


def alternating(gate_up: Tensor) -> Tensor:
    """Rows of gate and up in turn."""
    return torch.stack(gate_up.chunk(2, 1), 2).flatten(1, 2)


OTHER_LAYOUTS: dict[str, tuple[list[Any], Callable[[Tensor, Tensor], dict[str, Tensor]]]] = {
    "gate and up in stacks of their own": (
        [
            WeightRenaming(r"\.moe\.down_proj\.weight", ".mlp.experts.down_proj"),
            WeightConverter(
                ["moe.gate_proj.weight", "moe.up_proj.weight"], "mlp.experts.gate_up_proj", [Concatenate(dim=1)]
            ),
        ],
        lambda gate_up, down: {
            "moe.gate_proj.weight": gate_up[:, :24],
            "moe.up_proj.weight": gate_up[:, 24:],
            "moe.down_proj.weight": down,
        },
    ),
    "gate and up in turn": (
        [
            WeightConverter("mlp.experts.w13", "mlp.experts.gate_up_proj", [Interleave(dim=1)]),
            WeightRenaming("mlp.experts.w2", "mlp.experts.down_proj"),
        ],
        lambda gate_up, down: {"mlp.experts.w13": alternating(gate_up), "mlp.experts.w2": down},
    ),
    "transposed, as the conversion says": (
        [
            WeightConverter("mlp.experts.a", "mlp.experts.gate_up_proj", [Transpose(1, 2)]),
            WeightConverter("mlp.experts.b", "mlp.experts.down_proj", [Transpose(1, 2)]),
        ],
        lambda gate_up, down: {"mlp.experts.a": gate_up.mT, "mlp.experts.b": down.mT},
    ),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_layouts_that_only_a_conversion_tells(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    folder = model_folder("qwen3_moe", torch.float32)
    rules, change = OTHER_LAYOUTS[layout]
    tensors = stacked_tensors(folder)
    for number in (0, 2):
        path = f"model.layers.{number}."
        pair = [tensors.pop(f"{path}mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")]
        tensors |= {path + name: tensor for name, tensor in change(*pair).items()}
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda _module: rules)
    found = open_model(rewritten(folder, tmp_path / "model", tensors))
    monkeypatch.undo()
    reference = open_model(folder)
    infos = list(experts_of(reference))
    assert [info.prefix for info in infos] == [info.prefix for info in experts_of(found)]
    for info in infos:
        name = f"{info.prefix}.weight"
        assert torch.equal(found.source.load(name), reference.source.load(name))


def test_conversions_of_experts_that_are_not_known(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("qwen3_moe", torch.float32)
    rules = [WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [PermuteForRope()])]
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda _module: rules)
    stacked = rewritten(folder, tmp_path / "model", stacked_tensors(folder))
    with pytest.raises(UnsupportedError, match=r"transformers computes 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"):
        open_model(stacked)


def test_float8_experts_and_layers_that_the_model_does_not_have(model_folder: ModelFolder, tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: blocks of float8, and another layer for multi-token prediction, which is kept."""
    folder = model_folder("deepseek_v3")
    raw = Checkpoint(folder)
    tensors: dict[str, Tensor] = {}
    for name in raw:
        tensors[name] = raw.load(name).clone()
        if re.search(r"experts\.\d+\.\w+\.weight$", name):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    rewritten(folder, tmp_path / "model", tensors | extra)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    model = open_model(tmp_path / "model")
    assert [info.prefix for info in experts_of(model)] == [info.prefix for info in experts_of(open_model(folder))]
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert torch.equal(model.source.load(name), (tensors[name].float() * 0.5).bfloat16())
    assert set(model.units[-1].tensors) == {name for name in extra if not name.endswith("_scale_inv")}


def test_square_matrices_are_told_apart_by_their_partner(model_folder: ModelFolder, tmp_path: Path) -> None:
    """With a hidden size of the inner size or of twice that, one matrix of each pair is square."""
    for inner in (32, 16):
        (tmp_path / str(inner)).mkdir()
        config = json.loads((model_folder("qwen3_moe") / "config.json").read_text()) | {"moe_intermediate_size": inner}
        (tmp_path / str(inner) / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_config(
            AutoModelForCausalLM.from_pretrained(model_folder("qwen3_moe")).config.__class__.from_dict(config)
        )
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        turned = {name: t.mT if t.dim() == 3 else t for name, t in tensors.items()}
        for name, stored in (("stacked", tensors), ("turned", turned)):
            folder = rewritten(tmp_path / str(inner), tmp_path / f"{inner}-{name}", stored)
            source = open_model(folder).source
            fused = tensors["model.layers.0.mlp.experts.gate_up_proj"]
            assert torch.equal(source.load("model.layers.0.mlp.experts.2.gate_proj.weight"), fused[2, :inner])
            assert torch.equal(source.load("model.layers.0.mlp.experts.2.up_proj.weight"), fused[2, inner:])
            down = tensors["model.layers.0.mlp.experts.down_proj"]
            assert torch.equal(source.load("model.layers.0.mlp.experts.3.down_proj.weight"), down[3])


def test_what_transformers_writes_is_what_the_hub_has(model_folder: ModelFolder) -> None:
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


MOE = "model.layers.0.mlp.experts"


DEFECTS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Tensor]], Any], str]] = {
    "one tensor missing": (
        lambda single, _: single.pop(f"{MOE}.2.up_proj.weight"),
        r"1 expert tensors are not in the checkpoint, among them 'model\.layers\.0\.mlp\.experts\.2\.up_proj\.weight'",
    ),
    "an expert missing in the middle": (
        lambda single, _: [single.pop(f"{MOE}.1.{linear}.weight") for linear in ("gate_proj", "up_proj", "down_proj")],
        r"3 expert tensors are not in the checkpoint, among them 'model\.layers\.0\.mlp\.experts\.1\.",
    ),
    "all down projections missing": (
        lambda single, _: [single.pop(f"{MOE}.{e}.down_proj.weight") for e in range(4)],
        r"4 expert tensors are not in the checkpoint, among them 'model\.layers\.0\.mlp\.experts\.0\.down_proj\.w",
    ),
    "too few experts": (
        lambda single, _: [single.pop(f"{MOE}.3.{linear}.weight") for linear in ("gate_proj", "up_proj", "down_proj")],
        r"config\.json asks for 4 experts in model\.layers\.0\.mlp\.experts, the checkpoint has 3",
    ),
    "too many experts": (
        lambda single, _: single.update(
            {f"{MOE}.4.{linear}.weight": single[f"{MOE}.3.{linear}.weight"].clone() for linear in ("gate_proj",)}
        ),
        r"config\.json asks for 4 experts in model\.layers\.0\.mlp\.experts, the checkpoint has 5",
    ),
    "a layer stacked, another not": (
        lambda single, stacked: [
            [single.pop(name) for name in list(single) if name.startswith(f"{MOE}.")],
            single.update({name: tensor for name, tensor in stacked.items() if name.startswith(MOE)}),
        ],
        r"stores experts both one by one \('model\.layers\.2\..*'\) and stacked \('model\.layers\.0\.mlp\.experts\.g",
    ),
    "both ways at once": (
        lambda single, stacked: single.update(stacked),
        r"stores experts both one by one \('model\.layers\.0.*gate_proj\.weight'\) and stacked",
    ),
    "an expert of another size": (
        lambda single, _: single.update({f"{MOE}.0.up_proj.weight": torch.ones(23, 32)}),
        r"tensor 'model\.layers\.0\.mlp\.experts\.0\.up_proj\.weight' has shape \[23, 32\], config.json asks for \[24",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_single_experts(model_folder: ModelFolder, tmp_path: Path, defect: str) -> None:
    folder = model_folder("qwen3_moe", torch.float32)
    change, message = DEFECTS[defect]
    raw = Checkpoint(folder)
    tensors = {name: raw.load(name).clone() for name in raw}
    change(tensors, stacked_tensors(folder))
    with pytest.raises(InvalidModelError, match=message) as caught:
        open_model(rewritten(folder, tmp_path / "model", tensors))
    assert str(tmp_path) in str(caught.value)
    assert caught.value.remedy


STACK_DEFECTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]] = {
    "missing": (
        lambda t: t.pop(f"{MOE}.down_proj"),
        InvalidModelError,
        r"'model\.layers\.0\.mlp\.experts\.down_proj' is not in the checkpoint",
    ),
    "count": (
        lambda t: t.update({f"{MOE}.gate_up_proj": t[f"{MOE}.gate_up_proj"][:3]}),
        InvalidModelError,
        r"asks for 4 experts in model\.layers\.0\.mlp\.experts, 'model\.layers\.0\.mlp\.experts\.gate_up_proj' has 3",
    ),
    "shape": (
        lambda t: t.update({f"{MOE}.down_proj": t[f"{MOE}.down_proj"][:, :31]}),
        InvalidModelError,
        r"matrices of shape .*'model\.layers\.0\.mlp\.experts\.down_proj' \[31, 24\].*config\.json asks for \[48, 32\]"
        r", \[32, 24\], or all of them transposed",
    ),
    "one of two turned": (
        lambda t: t.update({f"{MOE}.down_proj": t[f"{MOE}.down_proj"].mT}),
        InvalidModelError,
        r"'model\.layers\.0\.mlp\.experts\.down_proj' \[24, 32\]",
    ),
    "dimensions": (
        lambda t: t.update({f"{MOE}.down_proj": t[f"{MOE}.down_proj"][:, 0]}),
        InvalidModelError,
        r"tensor 'model\.layers\.0\.mlp\.experts\.down_proj' has shape \[4, 24\], config\.json asks for \[4, 32, 24\]",
    ),
    "packed": (
        lambda t: t.update({f"{MOE}.down_proj_blocks": torch.ones(4, 32, 1, 12).byte()}),
        UnsupportedError,
        r"stored as blocks of packed numbers \('model\.layers\.0\.mlp\.experts\.down_proj_blocks'\)",
    ),
}


@pytest.mark.parametrize("defect", STACK_DEFECTS)
def test_defects_of_stacks(model_folder: ModelFolder, tmp_path: Path, defect: str) -> None:
    folder = model_folder("qwen3_moe", torch.float32)
    change, error, message = STACK_DEFECTS[defect]
    tensors = stacked_tensors(folder)
    change(tensors)
    with pytest.raises(error, match=message) as caught:
        open_model(rewritten(folder, tmp_path / "model", tensors))
    assert str(tmp_path) in str(caught.value)


def test_biases_of_another_size(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = model_folder("gpt_oss", torch.float32)
    tensors = stacked_tensors(folder)
    tensors[f"{MOE}.down_proj_bias"] = torch.ones(4, 31)
    with pytest.raises(InvalidModelError, match=r"down_proj_bias' has shape \[4, 31\], config.json asks for \[4, 32\]"):
        open_model(rewritten(folder, tmp_path / "model", tensors))


def no_spelling(parameter: str, count: int) -> None:
    return None


class OtherExperts(nn.Module):
    """Experts whose parameters are named and shaped as given."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


@pytest.mark.parametrize(
    ("shapes", "parameter"),
    [
        ({"wi": (4, 8, 6), "wo": (4, 6, 8)}, "wi"),
        ({"gate_up_proj": (4, 12, 8), "down_proj": (4, 8, 5)}, "down_proj"),
        ({"gate_up_proj": (4, 12, 8), "down_proj": (3, 8, 6)}, "down_proj"),
        ({"up_proj": (4, 6, 8), "down_proj": (4, 8, 5)}, "down_proj"),
        ({"gate_up_proj": (4, 12, 8), "down_proj": (4, 8, 6), "down_proj_bias": (4, 6)}, "down_proj_bias"),
        ({"weight": (4, 12, 8)}, "weight"),
    ],
)
def test_experts_of_unknown_structure_are_refused(shapes: dict[str, tuple[int, ...]], parameter: str) -> None:
    model = nn.Module()
    model.experts = OtherExperts(**shapes)
    with pytest.raises(
        UnsupportedError, match=rf"OtherExperts stacks its experts .*see parameter '{parameter}'"
    ) as seen:
        take_experts_apart(model, no_spelling)
    assert seen.value.where == "experts"


def test_a_class_that_says_otherwise_than_its_shapes_is_refused() -> None:
    experts = OtherExperts(gate_up_proj=(4, 12, 8), down_proj=(4, 8, 6))
    assert find_experts("m.experts", experts, no_spelling) is not None
    experts.is_transposed = True
    with pytest.raises(UnsupportedError, match="OtherExperts"):
        find_experts("m.experts", experts, no_spelling)


def test_other_parameters_with_three_dimensions_stay() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8, 8))

    model = nn.Module()
    model.gates = Gates()
    model.conv = nn.Conv1d(4, 4, 2)
    take_experts_apart(model, no_spelling)
    assert [name for name, _ in model.named_parameters()] == ["gates.weight", "conv.weight", "conv.bias"]


class Odd(nn.Module):
    """Experts whose forward does ``use`` with the stack."""

    def __init__(self, use: Callable[[Any, Tensor], Any], bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, 12, 8))
        self.down_proj = nn.Parameter(torch.empty(2, 8, 6))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(2, 12))
        self.use = use

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Any:
        return self.use(self, hidden_states)


@pytest.mark.parametrize(
    ("use", "bias"),
    [
        (lambda m, x: x @ m.gate_up_proj[0], False),  # a product with the transpose
        (lambda m, x: m.gate_up_proj[0] * 2, False),
        (lambda m, x: m.gate_up_proj.sum(), False),
        (lambda m, x: torch.einsum("th,eoh->eto", x, m.gate_up_proj), False),
        (lambda m, x: torch.bmm(x[None], m.gate_up_proj), False),
        (lambda m, x: m.gate_up_proj[0].t(), False),
        (lambda m, x: nn.functional.linear(x, m.gate_up_proj[0], torch.ones(12)), False),
        (lambda m, x: nn.functional.linear(m.gate_up_proj[0], x), False),
        (lambda m, x: x[:, :1] * m.gate_up_proj_bias[0], True),
    ],
)
def test_a_forward_that_does_something_else_with_the_stack_is_refused(
    use: Callable[[Any, Tensor], Any], bias: bool
) -> None:
    model = nn.Module()
    model.experts = Odd(use, bias)
    take_experts_apart(model, no_spelling)
    with pytest.raises(UnsupportedError, match=r"Odd uses 'gate_up_proj' in a way that is not known"):
        model.experts(torch.ones(3, 8), torch.zeros(3, 1), torch.ones(3, 1))


def test_biases_may_be_given_to_the_product() -> None:
    def use(module: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, module.gate_up_proj[1], module.gate_up_proj_bias[1])

    model = nn.Module()
    model.experts = Odd(use, bias=True)
    take_experts_apart(model, no_spelling)
    model.experts.to_empty(device="cpu")
    for parameter in model.experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    expert = model.experts.get_submodule("1")
    want = torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1)
    assert torch.equal(model.experts(x, torch.zeros(3, 1), torch.ones(3, 1)), want)
    assert model.experts(x[:0], None, None).shape == (0, 12)


def test_conversions_of_other_parameters_are_refused(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values would be wrong if they were read as they are stored."""
    rules = [WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [PermuteForRope()])]
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda _module: rules)
    with pytest.raises(UnsupportedError, match=r"transformers computes 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        open_model(model_folder("llama"))

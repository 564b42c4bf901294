"""Experts are the same linears however the checkpoint stores them, and what does not fit together is refused."""

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
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.sliced import SlicedSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo
from slim_llm.models import conversions
from slim_llm.models.loading import open_model

ModelFolder = Callable[..., Path]
STACKED = ("gpt_oss", "llama4")  # whose checkpoints are; those of all other families here hold single experts


def stacked_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors under the names that transformers has in memory, experts stacked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rewritten(source: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def experts_of(model: StreamedModel) -> Iterator[LinearInfo]:
    for unit in model.units:
        yield from (info for info in unit.linears if "expert" in info.name and "shared" not in info.name)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h"])
@torch.no_grad()
def test_all_layouts_are_the_same_model(
    plain: Callable[[Path], Any], opened: Callable[[Path], Any], model_folder: ModelFolder, tmp_path: Path, family: str
) -> None:
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
    own = [info.prefix for info in experts_of(open_model(folder))]
    assert [info.prefix for info in experts_of(model) if info.runs] == own
    drafting = [prefix.replace("layers.2.", "layers.3.") for prefix in own if "layers.2." in prefix]
    assert [info.prefix for info in experts_of(model) if not info.runs] == drafting
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


def test_conversions_of_other_parameters_are_refused(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values would be wrong if they were read as they are stored."""
    rules = [WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [Transpose(0, 1)])]
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda _module: rules)
    with pytest.raises(UnsupportedError, match=r"transformers computes 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        open_model(model_folder("llama"))


@torch.no_grad()
def test_parameters_that_are_stored_fused_or_with_pairs_side_by_side(
    plain: Callable[[Path], Any], model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read as the model has them, stay float, and what is stored is what is written."""
    folder = model_folder("llama", torch.float32)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stacked_tensors(folder).items():
        if name.endswith("gate_proj.weight"):
            tensors[name.replace("gate_proj", "w13")] = tensor
        elif name.endswith("q_proj.weight"):  # 4 heads; each of its pairs, which lie half a head apart, in a row
            heads = tensor.view(4, 2, -1, tensor.shape[1])
            tensors[name] = torch.stack([heads[:, 0], heads[:, 1]], 2).reshape(tensor.shape)
        elif not name.endswith("up_proj.weight"):
            tensors[name] = tensor
    for name, tensor in stacked_tensors(folder).items():
        if name.endswith("up_proj.weight"):
            fused = name.replace("up_proj", "w13")
            tensors[fused] = torch.cat([tensors[fused], tensor])
    rules = [
        WeightConverter("mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
        WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [PermuteForRope()]),
    ]
    ids = torch.arange(3, 24)[None]
    want = plain(folder)(input_ids=ids, use_cache=False).logits
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda _module: rules)
    if "lm_head.weight" in tensors and torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        del tensors["lm_head.weight"]
    model = open_model(rewritten(folder, tmp_path / "model", tensors))
    names = [name for unit in model.units for name in unit.parameters]
    model.load(names, torch.device("cpu"))
    assert torch.equal(model.module(input_ids=ids, use_cache=False).logits, want)
    written = [name for unit in model.units for name in unit.tensors]
    assert sorted(set(written) - {"lm_head.weight"}) == sorted(set(tensors) - {"lm_head.weight"})
    assert len(written) == len(set(written))
    linears = {info.name.rpartition(".")[2] for unit in model.units for info in unit.linears if info.in_block}
    assert linears == {"k_proj", "v_proj", "o_proj", "down_proj"}

"""Every defect of a folder is found, and said with the name of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.evaluation.verify import verify_folder

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.1.self_attn.o_proj"  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj"
DESCRIPTION = "quant_model_description.json"
INDEX = "quant_model_weights.safetensors.index.json"
SHARD = "quant_model_weights-00001-of-00002.safetensors"


def label(name: str, kind: Any) -> Callable[[Any], None]:
    return lambda draft: draft.types.update({name: kind})


def set_global(key: str, value: Any) -> Callable[[Any], None]:
    return lambda draft: draft.globals.update({key: value})


def set_config(key: str, value: Any) -> Callable[[Any], None]:
    return lambda draft: draft.config.update({key: value})


def drop_layer(draft: Any) -> None:
    for name in [name for name in draft.tensors if name.startswith("model.layers.1.")]:
        draft.drop(name)


def other_experts(draft: Any) -> None:
    for expert, kind in enumerate(("W8A8_DYNAMIC", "W8A16")):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            draft.add_linear(f"model.layers.0.mlp.experts.{expert}.{leaf}", kind, torch.randn(8, 8))


BEFORE_WRITING: dict[str, tuple[Callable[[Any], object], str]] = {
    "missing version": (lambda d: d.globals.pop("version"), f"{DESCRIPTION}: the key 'version' is missing"),
    "group size no number": (set_global("group_size", "0"), "'group_size' is '0', expected a int"),
    "group size a boolean": (set_global("group_size", True), "'group_size' is True"),
    "metadata no object": (set_global("metadata", []), "'metadata' is [], expected a dict"),
    "wrong ranking": (set_global("model_quant_type", "W8A8_DYNAMIC"), "is 'W8A8_DYNAMIC', expected 'W8A8'"),
    "cache type without cache": (set_global("kv_cache_type", "C8"), "kv_cache_type is 'C8', expected None without C8"),
    "type no string": (label("model.norm.weight", 3), "model.norm.weight: its type in the description is 3"),
    "unknown type": (lambda d: d.relabel(DOWN, "W9A9"), f"{DOWN}: has the type 'W9A9'"),
    "key without tensor": (lambda d: d.tensors.pop("model.norm.weight"), "model.norm.weight: is described as FLOAT"),
    "tensor without key": (lambda d: d.types.pop(f"{Q}.quant_bias"), f"{Q}.quant_bias: is in {SHARD} but has no entry"),
    "part missing": (lambda d: d.drop(f"{Q}.deq_scale"), f"{Q}.deq_scale: is missing; a W8A8 layer has it"),
    "part too many": (
        lambda d: (
            d.tensors.update({f"{DOWN}.deq_scale": torch.ones(16)}),
            label(f"{DOWN}.deq_scale", "W8A8_DYNAMIC")(d),
        ),
        f"{DOWN}.deq_scale: does not belong to a W8A8_DYNAMIC layer",
    ),
    "two types in a module": (
        label(f"{DOWN}.weight_scale", "W8A16"),
        f"{DOWN}.weight_scale: has the type W8A16, expected W8A8_DYNAMIC",
    ),
    "bias labelled": (label(f"{Q}.bias", "W8A8"), f"{Q}.bias: has the type W8A8, expected FLOAT"),
    "orphan scale": (
        lambda d: (
            d.drop(f"{DOWN}.weight"),
            label(f"{DOWN}.weight_scale", "FLOAT")(d),
            d.drop(f"{DOWN}.weight_offset"),
        ),
        f"{DOWN}.weight_scale: is a quantization parameter of a module whose weight is FLOAT",
    ),
    "codes called float": (label(f"{DOWN}.weight", "FLOAT"), f"{DOWN}.weight: is FLOAT but stored as int8"),
    "weight dtype": (
        lambda d: d.retype(f"{DOWN}.weight", torch.int16),
        f"{DOWN}.weight: is int16 [16, 32], expected int8 [16, 32]",
    ),
    "scale dtype": (
        lambda d: d.retype(f"{DOWN}.weight_scale", torch.bfloat16),
        "is bfloat16 [16, 1], expected float32 [16, 1]",
    ),
    "scale shape": (
        lambda d: d.tensors.update({f"{DOWN}.weight_scale": torch.ones(16)}),
        f"{DOWN}.weight_scale: is float32 [16], expected float32 [16, 1]",
    ),
    "quant_bias dtype": (
        lambda d: d.retype(f"{Q}.quant_bias", torch.int64),
        f"{Q}.quant_bias: is int64 [16], expected int32 [16]",
    ),
    "bias dtype": (
        lambda d: d.retype(f"{Q}.bias", torch.bfloat16),
        f"{Q}.bias: is bfloat16 [16], expected float32 [16]",
    ),
    "deq_scale for another dtype": (set_config("dtype", "float16"), "expected int64 [16] in a float16 model"),
    "fused types": (
        lambda d: d.relabel("model.layers.0.mlp.up_proj", "FLOAT"),
        "model.layers.0.mlp: engines fuse these linears",
    ),
    "fused scales": (
        lambda d: d.set("model.layers.0.self_attn.k_proj.input_scale", 0, 0.0625),
        "self_attn.k_proj.input_scale: is 0.0625, expected 0.03125 as in model.layers.0.self_attn.q_proj",
    ),
    "fused offsets": (
        lambda d: d.set("model.layers.0.mlp.up_proj.input_offset", 0, 3),
        "mlp.up_proj.input_offset: is 3.0, expected -7.0",
    ),
    "experts of two types": (other_experts, "model.layers.0.mlp.experts: all experts of a layer need one type"),
    "scale zero": (lambda d: d.set(f"{DOWN}.weight_scale", 3, 0.0), f"{DOWN}.weight_scale: is 0.0 in row 3"),
    "scale negative": (lambda d: d.set(f"{Q}.deq_scale", 2, -1.0), f"{Q}.deq_scale: is -1.0 in row 2"),
    "scale infinite": (lambda d: d.set(f"{Q}.input_scale", 0, float("inf")), f"{Q}.input_scale: is inf"),
    "scale not a number": (lambda d: d.set(f"{O}.weight_scale", 1, float("nan")), f"{O}.weight_scale: is nan in row 1"),
    "scale that bf16 cannot hold": (
        lambda d: d.set(f"{Q}.input_scale", 0, 0.0312),
        "expected a value that bfloat16 can hold",
    ),
    "offset too large": (
        lambda d: d.set(f"{Q}.input_offset", 0, 200),
        f"{Q}.input_offset: is 200.0, expected an integer",
    ),
    "offset not integral": (
        lambda d: d.set(f"{Q}.input_offset", 0, 0.5),
        f"{Q}.input_offset: is 0.5, expected an integer",
    ),
    "offset not a number": (lambda d: d.set(f"{Q}.input_offset", 0, float("nan")), f"{Q}.input_offset: is nan"),
    "offset ignored by engines": (lambda d: d.set(f"{DOWN}.weight_offset", 0, 1), f"{DOWN}.weight_offset: is not zero"),
    "weight offset not integral": (
        lambda d: d.set(f"{O}.weight_offset", 0, 0.5),
        "values that are not integers in -128..127",
    ),
    "quant_bias off by two": (
        lambda d: d.tensors.update({f"{Q}.quant_bias": d.tensors[f"{Q}.quant_bias"] + 2}),
        f"{Q}.quant_bias: is",
    ),
    "row not written": (lambda d: d.set(f"{DOWN}.weight", 6, 0), f"{DOWN}.weight: row 6 has only zeros"),
    "float not finite": (
        lambda d: d.set("model.norm.weight", 0, float("nan")),
        "model.norm.weight: holds NaN or infinity",
    ),
    "bias not finite": (lambda d: d.set(f"{Q}.bias", 0, float("inf")), f"{Q}.bias: holds NaN or infinity"),
    "untied head": (
        lambda d: d.set("lm_head.weight", (0, 0), 9.0),
        "lm_head.weight: differs from model.embed_tokens.weight",
    ),
    "quantization_config": (set_config("quantization_config", {}), "config.json: has quantization_config"),
    "nested quantization_config": (
        set_config("text_config", {"quantization_config": {}}),
        "config.json: has text_config.quantization_config",
    ),
    "layer missing": (drop_layer, "model.layers.1: has no tensor; config.json announces 2 layers"),
    "rotation file missing": (
        set_global("optional", {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}),
        "optional.quarot points to 'optional/quarot.safetensors'",
    ),
    "rotation outside": (
        set_global("optional", {"quarot": {"rotation_map": {"global_rotation": "../x.safetensors"}}}),
        "optional.quarot points to '../x.safetensors'",
    ),
    "rotation not named": (set_global("optional", {"quarot": {}}), "optional.quarot has no rotation_map"),
}


@pytest.mark.parametrize("fault", BEFORE_WRITING)
def test_fault_in_what_is_stored(fault: str, draft: Any, tmp_path: Path) -> None:
    change, message = BEFORE_WRITING[fault]
    change(draft)
    found = verify_folder(draft.write(tmp_path / "out"))
    assert any(message in problem for problem in found.problems), found.text()
    assert message in found.text()


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content) or content))

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)

    return edit


def foreign(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")


def twice(folder: Path) -> None:
    second = folder / "quant_model_weights-00002-of-00002.safetensors"
    save_file(load_file(second) | {"model.embed_tokens.weight": torch.ones(2)}, second)


def cut(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as stream:
        stream.truncate((folder / SHARD).stat().st_size - 8)


def both_layouts(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "quant_model_weights.safetensors")


def bad_rotation(folder: Path) -> None:
    (folder / "optional").mkdir()
    save_file({"global_rotation": 2 * torch.eye(8)}, folder / "optional" / "q.safetensors")
    quarot = {"rotation_map": {"global_rotation": "optional/q.safetensors"}}
    edit_json(DESCRIPTION, lambda d: d.update(optional={"quarot": quarot}))(folder)


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


AFTER_WRITING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda f: (f / DESCRIPTION).unlink(), f"{DESCRIPTION}: the file is missing"),
    "description broken": (write(DESCRIPTION, "{"), f"{DESCRIPTION}: cannot be read as JSON"),
    "description a list": (write(DESCRIPTION, "[]"), f"{DESCRIPTION}: holds a JSON list, expected an object"),
    "key twice": (write(DESCRIPTION, '{"version": "1.0.0", "version": "1.0.0"}'), "the key 'version' occurs twice"),
    "no index": (lambda f: (f / INDEX).unlink(), f"{INDEX}: the file is missing"),
    "index keys": (edit_json(INDEX, lambda d: d.update(more=1)), "has the keys ['metadata', 'more', 'weight_map']"),
    "total size": (edit_json(INDEX, lambda d: d["metadata"].update(total_size=1)), "total_size is 1, expected"),
    "index map no object": (edit_json(INDEX, lambda d: d.update(weight_map=[])), "weight_map is not an object"),
    "index omits": (
        edit_json(INDEX, lambda d: d["weight_map"].pop("model.norm.weight") and None),
        "model.norm.weight: is in quant_model_weights-00002-of-00002.safetensors but not listed",
    ),
    "index invents": (edit_json(INDEX, lambda d: d["weight_map"].update(x=SHARD)), f"x: is listed in {INDEX}"),
    "index misplaces": (
        edit_json(INDEX, lambda d: d["weight_map"].update({"model.norm.weight": SHARD})),
        f"model.norm.weight: {INDEX} places it in {SHARD}, expected quant_model_weights-00002",
    ),
    "foreign weights": (foreign, "model.safetensors: a foreign weight file"),
    "stale index": (write("model.safetensors.index.json", "{}"), "model.safetensors.index.json: must not be here"),
    "tensor twice": (twice, "model.embed_tokens.weight: is stored twice"),
    "shard missing": (lambda f: (f / SHARD).unlink(), "shards 1..2: number 1 is missing"),
    "shard totals": (
        lambda f: (f / SHARD).rename(f / SHARD.replace("of-00002", "of-00003")),
        "shards name different totals: 2, 3",
    ),
    "shard cut off": (cut, f"{SHARD}: the file is truncated"),
    "both layouts": (both_layouts, "quant_model_weights.safetensors: lies beside numbered shards"),
    "no weights": (no_weights, "there are no quant_model_weights*.safetensors files"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: the file is missing"),
    "readable by all": (
        lambda f: (f / "config.json").chmod(0o644),
        "config.json: has mode 0644, expected at most 0640",
    ),
    "rotation not orthogonal": (bad_rotation, "optional/q.safetensors: global_rotation is not orthogonal"),
}


@pytest.mark.parametrize("fault", AFTER_WRITING)
def test_fault_in_the_files(fault: str, draft: Any, tmp_path: Path) -> None:
    change, message = AFTER_WRITING[fault]
    folder = draft.write(tmp_path / "out")
    change(folder)
    found = verify_folder(folder)
    assert any(message in problem for problem in found.problems), found.text()


def test_unreadable_values_are_said_to_be_unchecked(draft: Any, tmp_path: Path) -> None:
    folder = draft.write(tmp_path / "out")
    cut(folder)
    found = verify_folder(folder)
    assert found.checked == 0
    assert any("values were not checked" in warning for warning in found.warnings)

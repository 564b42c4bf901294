"""Every defect of a folder is found, and said with the name of what is wrong; a clean folder has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.errors import InvalidModelError, SchemaValidateError
from slim_core.evaluation.verify import rows as verify_rows
from slim_core.evaluation.verify import verify_folder

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.1.self_attn.o_proj"  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj"
LAYER = "model.layers.0"
NORM = f"{LAYER}.input_layernorm"
DESCRIPTION = "quant_model_description.json"
INDEX = "quant_model_weights.safetensors.index.json"
SHARD = "quant_model_weights-00001-of-00002.safetensors"


def test_a_clean_folder_has_no_problem(draft: Any, tmp_path: Path) -> None:
    found = verify_folder(draft.write(tmp_path / "out"))
    assert found.ok
    assert not found.problems
    assert not found.warnings
    assert found.checked == len(draft.tensors)
    assert not found.compared
    assert "ok" in found.text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_clean_folder_agrees_with_its_original(
    new_draft: Callable[[torch.dtype], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    draft = new_draft(dtype)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.warnings
    assert found.compared
    assert "compared with the original" in found.text()


def test_one_file_without_index(draft: Any, tmp_path: Path) -> None:
    draft.shards = 1
    folder = draft.write(tmp_path / "out")
    (folder / INDEX).unlink()
    (folder / "quant_model_weights-00001-of-00001.safetensors").rename(folder / "quant_model_weights.safetensors")
    assert not verify_folder(folder).problems


def set_tensor(name: str, index: Any, value: float) -> Callable[[Any], None]:
    def change(draft: Any) -> None:
        draft.tensors[name] = draft.tensors[name].clone()
        draft.tensors[name][index] = value

    return change


def retype(name: str, dtype: torch.dtype) -> Callable[[Any], None]:
    return lambda draft: draft.tensors.update({name: draft.tensors[name].to(dtype)})


def label(name: str, kind: Any) -> Callable[[Any], None]:
    return lambda draft: draft.types.update({name: kind})


def set_global(key: str, value: Any) -> Callable[[Any], None]:
    return lambda draft: draft.globals.update({key: value})


def set_config(key: str, value: Any) -> Callable[[Any], None]:
    return lambda draft: draft.config.update({key: value})


def as_kind(prefix: str, kind: str) -> Callable[[Any], None]:
    return lambda draft: draft.types.update(
        {name: kind for name in draft.types if name.startswith(f"{prefix}.") and not name.endswith(".bias")}
    )


def drop_layer(draft: Any) -> None:
    for name in [name for name in draft.tensors if name.startswith("model.layers.1.")]:
        draft.drop(name)


def other_experts(draft: Any) -> None:
    for expert, kind in enumerate(("W8A8_DYNAMIC", "W8A16")):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            draft.add_linear(f"model.layers.0.mlp.experts.{expert}.{leaf}", kind, torch.randn(8, 8))


BEFORE_WRITING: dict[str, tuple[Callable[[Any], None], str]] = {
    "missing version": (lambda d: d.globals.pop("version"), f"{DESCRIPTION}: the key 'version' is missing"),
    "group size no number": (set_global("group_size", "0"), "'group_size' is '0', expected a int"),
    "group size a boolean": (set_global("group_size", True), "'group_size' is True"),
    "metadata no object": (set_global("metadata", []), "'metadata' is [], expected a dict"),
    "wrong ranking": (set_global("model_quant_type", "W8A8_DYNAMIC"), "is 'W8A8_DYNAMIC', expected 'W8A8'"),
    "cache type without cache": (set_global("kv_cache_type", "C8"), "kv_cache_type is 'C8', expected None without C8"),
    "type no string": (label("model.norm.weight", 3), "model.norm.weight: its type in the description is 3"),
    "unknown type": (as_kind(DOWN, "W9A9"), f"{DOWN}: has the type 'W9A9'"),
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
        retype(f"{DOWN}.weight", torch.int16),
        f"{DOWN}.weight: is int16 [16, 32], expected int8 [16, 32]",
    ),
    "scale dtype": (retype(f"{DOWN}.weight_scale", torch.bfloat16), "is bfloat16 [16, 1], expected float32 [16, 1]"),
    "scale shape": (
        lambda d: d.tensors.update({f"{DOWN}.weight_scale": torch.ones(16)}),
        f"{DOWN}.weight_scale: is float32 [16], expected float32 [16, 1]",
    ),
    "quant_bias dtype": (retype(f"{Q}.quant_bias", torch.int64), f"{Q}.quant_bias: is int64 [16], expected int32 [16]"),
    "bias dtype": (retype(f"{Q}.bias", torch.bfloat16), f"{Q}.bias: is bfloat16 [16], expected float32 [16]"),
    "deq_scale for another dtype": (set_config("dtype", "float16"), "expected int64 [16] in a float16 model"),
    "fused types": (as_kind("model.layers.0.mlp.up_proj", "FLOAT"), "model.layers.0.mlp: engines fuse these linears"),
    "fused scales": (
        set_tensor("model.layers.0.self_attn.k_proj.input_scale", 0, 0.0625),
        "self_attn.k_proj.input_scale: is 0.0625, expected 0.03125 as in model.layers.0.self_attn.q_proj",
    ),
    "fused offsets": (
        set_tensor("model.layers.0.mlp.up_proj.input_offset", 0, 3),
        "mlp.up_proj.input_offset: is 3.0, expected -7.0",
    ),
    "experts of two types": (other_experts, "model.layers.0.mlp.experts: all experts of a layer need one type"),
    "scale zero": (set_tensor(f"{DOWN}.weight_scale", 3, 0.0), f"{DOWN}.weight_scale: is 0.0 in row 3"),
    "scale negative": (set_tensor(f"{Q}.deq_scale", 2, -1.0), f"{Q}.deq_scale: is -1.0 in row 2"),
    "scale infinite": (set_tensor(f"{Q}.input_scale", 0, float("inf")), f"{Q}.input_scale: is inf"),
    "scale not a number": (set_tensor(f"{O}.weight_scale", 1, float("nan")), f"{O}.weight_scale: is nan in row 1"),
    "scale that bf16 cannot hold": (
        set_tensor(f"{Q}.input_scale", 0, 0.0312),
        "expected a value that bfloat16 can hold",
    ),
    "offset too large": (set_tensor(f"{Q}.input_offset", 0, 200), f"{Q}.input_offset: is 200.0, expected an integer"),
    "offset not integral": (set_tensor(f"{Q}.input_offset", 0, 0.5), f"{Q}.input_offset: is 0.5, expected an integer"),
    "offset not a number": (set_tensor(f"{Q}.input_offset", 0, float("nan")), f"{Q}.input_offset: is nan"),
    "offset ignored by engines": (set_tensor(f"{DOWN}.weight_offset", 0, 1), f"{DOWN}.weight_offset: is not zero"),
    "weight offset not integral": (
        set_tensor(f"{O}.weight_offset", 0, 0.5),
        "values that are not integers in -128..127",
    ),
    "quant_bias off by two": (
        lambda d: d.tensors.update({f"{Q}.quant_bias": d.tensors[f"{Q}.quant_bias"] + 2}),
        f"{Q}.quant_bias: is",
    ),
    "row not written": (set_tensor(f"{DOWN}.weight", 6, 0), f"{DOWN}.weight: row 6 has only zeros"),
    "float not finite": (set_tensor("model.norm.weight", 0, float("nan")), "model.norm.weight: holds NaN or infinity"),
    "bias not finite": (set_tensor(f"{Q}.bias", 0, float("inf")), f"{Q}.bias: holds NaN or infinity"),
    "untied head": (
        set_tensor("lm_head.weight", (0, 0), 9.0),
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


AFTER_WRITING: dict[str, tuple[Callable[[Path], None], str]] = {
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


def shift_codes(draft: Any) -> None:
    draft.tensors[f"{DOWN}.weight"] = draft.tensors[f"{DOWN}.weight"].roll(1, 0)


AGAINST_ORIGINAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor lost": (lambda d: d.drop("model.norm.weight"), "model.norm.weight: is in the original but missing here"),
    "float changed": (set_tensor("model.norm.weight", 0, 0.125), "model.norm.weight: differs from the original"),
    "float converted": (
        retype("model.norm.weight", torch.float32),
        "model.norm.weight: is float32 [16], the original bfloat16 [16]",
    ),
    "one code": (set_tensor(f"{DOWN}.weight", (4, 5), 99), "row 4 is off by"),
    "rows swapped": (shift_codes, f"{DOWN}.weight: its relative error against the original is"),
    "scale doubled": (
        lambda d: d.tensors.update({f"{DOWN}.weight_scale": 2 * d.tensors[f"{DOWN}.weight_scale"]}),
        f"{DOWN}.weight: its relative error against the original is 100",
    ),
    "bias changed": (
        lambda d: d.original.update({f"{Q}.bias": d.original[f"{Q}.bias"] + 1}),
        f"{Q}.bias: differs from the bias of the original",
    ),
    "bias from nowhere": (lambda d: d.original.pop(f"{Q}.bias"), f"{Q}.bias: the original linear has no bias"),
    "weight from nowhere": (
        lambda d: d.original.pop(f"{DOWN}.weight"),
        f"{DOWN}.weight: is quantized, but the original has no such weight",
    ),
    "another shape": (
        lambda d: d.original.update({f"{DOWN}.weight": d.original[f"{DOWN}.weight"].T.contiguous()}),
        f"{DOWN}.weight: has shape [16, 32], the original [32, 16]",
    ),
}


@pytest.mark.parametrize("fault", AGAINST_ORIGINAL)
def test_fault_against_the_original(fault: str, draft: Any, tmp_path: Path) -> None:
    change, message = AGAINST_ORIGINAL[fault]
    change(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert any(message in problem for problem in found.problems), found.text()


def test_a_head_that_the_original_has_for_itself_too(draft: Any, tmp_path: Path) -> None:
    """Some classes never tie, whatever the configuration says."""
    draft.tensors["lm_head.weight"] = draft.original["lm_head.weight"] = draft.tensors["lm_head.weight"] + 1
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.ok, found.text()
    assert any("lm_head.weight: differs from model.embed_tokens.weight" in text for text in found.warnings)


def test_experts_without_weights_of_their_own_may_lie_in_a_stack(draft: Any, tmp_path: Path) -> None:
    """LongCat stacks rows for its identity experts, of gate and up alone; nothing quantizes them."""
    for expert in range(3):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}"
            if expert < 2:
                draft.add_linear(name, "W8A8_DYNAMIC", torch.randn(8, 8))
            elif leaf != "down_proj":
                draft.add_float(f"{name}.weight", torch.randn(8, 8).bfloat16())
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.ok, found.text()


def test_another_model(new_draft: Callable[[torch.dtype], Any], draft: Any, tmp_path: Path) -> None:
    other = new_draft(torch.bfloat16)
    other.original = {name: tensor + 1 for name, tensor in other.original.items()}
    found = verify_folder(draft.write(tmp_path / "out"), other.write_original(tmp_path / "model"))
    assert any("4 of 5 float tensors differ" in warning for warning in found.warnings)


def test_missing_tokenizer(draft: Any, tmp_path: Path) -> None:
    folder, original = draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert any("tokenizer.json" in problem for problem in verify_folder(folder, original).problems)


def test_without_a_recipe_an_unusual_code_is_a_warning(draft: Any, tmp_path: Path) -> None:
    draft.recipe = None
    code = int(draft.tensors[f"{DOWN}.weight"][4, 5])
    set_tensor(f"{DOWN}.weight", (4, 5), code + 1 if code < 127 else 126)(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert any("row 4 is off by" in warning for warning in found.warnings)


def recipe_with(processor: str) -> str:
    return f"spec: {{process: [{processor}, {{type: linear_quant, qconfig: {{weight: {{method: minmax}}}}}}]}}"


@pytest.mark.parametrize("processor", ["iter_smooth", "kv_smooth", "awq"])
def test_layers_of_smoothed_models_are_not_compared(draft: Any, tmp_path: Path, processor: str) -> None:
    draft.recipe = recipe_with(f"{{type: {processor}}}")
    set_tensor(f"{NORM}.weight", 0, 0.125)(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.compared
    assert any(
        f"within decoder layers were not compared: the recipe changes them first ({processor})" in warning
        for warning in found.warnings
    )


def test_what_smoothing_does_not_touch_is_compared(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with("{type: iter_smooth}")
    set_tensor("model.norm.weight", 0, 0.125)(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.problems == ["model.norm.weight: differs from the original, expected the same bits"]


def test_rotated_models_are_not_compared(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with("{type: quarot}, {type: iter_smooth}")
    set_tensor("model.norm.weight", 0, 0.125)(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.compared
    assert any("changes float weights first (iter_smooth, quarot)" in warning for warning in found.warnings)


def shifted(draft: Any, *linears: str, value: float = 0.5) -> None:
    """A norm that was given a bias, and linears that were given one to make up for it."""
    draft.tensors[f"{NORM}.bias"] = torch.full((16,), value)
    draft.types[f"{NORM}.bias"] = "FLOAT"
    for linear in linears:
        draft.tensors[f"{linear}.bias"] = torch.full((len(draft.tensors[f"{linear}.weight"]),), value)
        draft.types[f"{linear}.bias"] = "FLOAT"
        if f"{linear}.quant_bias" in draft.tensors:
            extra = draft.tensors[f"{linear}.bias"].double() / draft.tensors[f"{linear}.deq_scale"].double()
            exact = -draft.tensors[f"{linear}.input_offset"].double() * draft.tensors[f"{linear}.weight"].double().sum(
                1
            )
            draft.tensors[f"{linear}.quant_bias"] = (exact + extra).round().to(torch.int32)


SHIFT = "{type: iter_smooth, symmetric: false}"


def test_a_shift_may_leave_biases(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with(SHIFT)
    shifted(draft, f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj")
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert len(found.warnings) == 1  # that layers were not compared


def test_a_shifted_bias_is_finite(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with(SHIFT)
    shifted(draft)
    set_tensor(f"{NORM}.bias", 3, float("nan"))(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.problems == [f"{NORM}.bias: holds NaN or infinity"]


def test_biases_that_the_engine_drops(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with(SHIFT)
    shifted(draft, f"{LAYER}.self_attn.k_proj", DOWN, O)
    original = draft.write_original(tmp_path / "model")
    found = verify_folder(draft.write(tmp_path / "out"), original)
    assert not found.problems
    dropped = {warning.partition(":")[0] for warning in found.warnings if "drops it" in warning}
    assert dropped == {f"{DOWN}.bias", f"{O}.bias"}
    shifted(draft, DOWN, O, value=0.0)
    found = verify_folder(draft.write(tmp_path / "zeros"), original)
    assert not [warning for warning in found.warnings if "drops it" in warning]


def test_biases_that_no_shift_explains(draft: Any, tmp_path: Path) -> None:
    shifted(draft)
    original = draft.write_original(tmp_path / "model")
    found = verify_folder(draft.write(tmp_path / "out"), original)
    assert f"{NORM}.bias: is not in the original" in found.warnings
    draft.recipe = None
    found = verify_folder(draft.write(tmp_path / "foreign"), original)
    (warning,) = [text for text in found.warnings if "not in the original" in text]
    assert warning == f"{NORM}.bias: is not in the original, like 1 biases; an asymmetric smoothing leaves such"


def test_rows_with_outliers_lose_much_without_being_wrong(draft: Any, tmp_path: Path) -> None:
    weight = torch.full((16, 512), 0.01) * torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = 10
    draft.add_linear(DOWN, "W8A8_DYNAMIC", weight)
    small = weight.clone()
    small[:, 0] = 0.2
    draft.add_linear("model.layers.0.mlp.down_proj", "W8A8_DYNAMIC", small)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert any("rows have outliers" in warning for warning in found.warnings)


def test_asymmetric_weights_are_compared_and_warned_about(draft: Any, tmp_path: Path) -> None:
    weight = draft.original[f"{O}.weight"].float()
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    offset = (-low / scale).round() - 128
    draft.tensors[f"{O}.weight"] = (weight / scale + offset).round().clamp(-128, 127).to(torch.int8)
    draft.tensors[f"{O}.weight_scale"], draft.tensors[f"{O}.weight_offset"] = scale, offset
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert any("quantize symmetrically" in warning for warning in found.warnings)


def test_fp8_originals_are_decoded(draft: Any, tmp_path: Path) -> None:
    codes = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    factor = torch.tensor([[0.5]])
    exact = (codes.float() * factor).to(torch.bfloat16)
    draft.add_linear(DOWN, "W8A8_DYNAMIC", exact)
    draft.original[f"{DOWN}.weight"], draft.original[f"{DOWN}.weight_scale_inv"] = codes, factor
    out = draft.write(tmp_path / "out")
    draft.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = verify_folder(out, draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.warnings


def test_what_engines_load(draft: Any, tmp_path: Path) -> None:
    folder = draft.write(tmp_path / "out")
    found = verify_folder(folder)
    table = {(entry.engine, entry.kind, entry.place): (entry.count, entry.loadable) for entry in found.loadable}
    assert table["vllm-ascend", "W8A8", "linear"] == (10, True)
    assert table["vllm-ascend-310p", "W8A16", "linear"] == (2, False)
    assert "NO CLASS" in found.text()
    assert any("has no class for W8A16" in text for text in verify_folder(folder, engine="vllm-ascend-310p").problems)
    assert not verify_folder(folder, engine="vllm-ascend").problems


def test_static_experts_are_warned_about(draft: Any, tmp_path: Path) -> None:
    draft.add_linear("model.layers.0.mlp.experts.0.down_proj", "W8A16", torch.randn(8, 8))
    found = verify_folder(draft.write(tmp_path / "out"))
    assert not found.problems
    assert any("has no class for W8A16 experts" in warning for warning in found.warnings)


def test_known_types_without_rules_are_warned_about(draft: Any, tmp_path: Path) -> None:
    as_kind(DOWN, "W8A8SC")(draft)
    found = verify_folder(draft.write(tmp_path / "out"))
    assert not found.problems
    assert any("what has the type W8A8SC is not checked further" in warning for warning in found.warnings)


def test_unreadable_values_are_said_to_be_unchecked(draft: Any, tmp_path: Path) -> None:
    folder = draft.write(tmp_path / "out")
    cut(folder)
    found = verify_folder(folder)
    assert found.checked == 0
    assert any("values were not checked" in warning for warning in found.warnings)


def test_long_lists_are_cut(draft: Any, tmp_path: Path) -> None:
    for name in list(draft.types):
        draft.types[f"{name}.lost.weight"] = "FLOAT"
    assert "more" in verify_folder(draft.write(tmp_path / "out")).text()


def test_wrong_arguments(draft: Any, tmp_path: Path) -> None:
    folder = draft.write(tmp_path / "out")
    with pytest.raises(InvalidModelError, match="is not a folder"):
        verify_folder(tmp_path / "nothing")
    with pytest.raises(InvalidModelError, match="cannot be read"):
        verify_folder(folder, tmp_path / "nothing")
    with pytest.raises(SchemaValidateError, match="unknown engine"):
        verify_folder(folder, engine="tensorrt")


def test_tensors_of_many_row_blocks(draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_rows, "_BLOCK_ELEMENTS", 48)
    monkeypatch.setattr(verify_rows, "_HELD_ELEMENTS", 96)
    original = draft.write_original(tmp_path / "model")
    clean = verify_folder(draft.write(tmp_path / "clean"), original)
    assert not clean.problems
    set_tensor(f"{DOWN}.weight", (13, 5), 99)(draft)
    set_tensor("model.embed_tokens.weight", (22, 3), 0.125)(draft)
    found = verify_folder(draft.write(tmp_path / "out"), original)
    for place in ("row 13 is off by", "model.embed_tokens.weight: differs from the", "lm_head.weight: differs"):
        assert any(place in problem for problem in found.problems), found.text()

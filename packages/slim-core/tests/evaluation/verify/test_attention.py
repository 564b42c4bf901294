"""Quantized attentions in a folder: a clean one has no problem, every defect is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.evaluation.verify import verify_folder

ATTENTION = "model.layers.{}.self_attn"
A = ATTENTION.format(0)
HEADS, KV_HEADS, DIM = 4, 4, 4
Change = Callable[[Any], Any]


def add(draft: Any, name: str, value: torch.Tensor, kind: str) -> None:
    draft.tensors[name], draft.types[name] = value, kind


def with_cache(draft: Any) -> None:
    for layer in range(2):
        for projection in ("k_proj", "v_proj"):
            prefix = f"{ATTENTION.format(layer)}.{projection}.kv_cache"
            add(draft, f"{prefix}_scale", torch.full((KV_HEADS * DIM,), 0.125), "C8")
            add(draft, f"{prefix}_offset", torch.zeros(KV_HEADS * DIM), "C8")
    draft.globals |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    draft.config |= {"num_attention_heads": HEADS, "hidden_size": 16}


def with_kernel(draft: Any, fp8: bool = False) -> None:
    for layer in range(2):
        for state in ("fa_q", "fa_k", "fa_v"):
            prefix = f"{ATTENTION.format(layer)}.{state}"
            add(draft, f"{prefix}.scale", torch.full((HEADS, 1), 0.125), "FAQuant")
            offset = torch.zeros(HEADS, 1, dtype=torch.float32 if fp8 else torch.int8)
            add(draft, f"{prefix}.offset", offset, "FAQuant")
        draft.globals[f"{ATTENTION.format(layer)}.quant_type"] = "FP8" if fp8 else "INT8"
    draft.globals["fa_quant_type"] = "FAKQuant"
    draft.config |= {"num_attention_heads": HEADS, "hidden_size": 16}


def set_tensor(name: str, value: Any) -> Change:
    return lambda draft: draft.tensors.update({name: value(draft.tensors[name]) if callable(value) else value})


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def drop_key(key: str) -> Change:
    return lambda draft: draft.globals.pop(key)


def set_key(key: str, value: Any) -> Change:
    return lambda draft: draft.globals.update({key: value})


def label(name: str, kind: str) -> Change:
    return lambda draft: draft.types.update({name: kind})


def latent(draft: Any) -> None:
    draft.add_float(f"{A}.kv_b_proj.weight", torch.zeros(4, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("make", [with_cache, with_kernel, lambda draft: with_kernel(draft, fp8=True)])
def test_a_clean_folder(draft: Any, tmp_path: Path, make: Change) -> None:
    make(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert found.checked == len(draft.tensors)
    assert found.compared
    others = [warning for warning in found.warnings if "has no class for" not in warning]
    assert not others


def test_both_kinds_and_dynamic_states(draft: Any, tmp_path: Path) -> None:
    with_cache(draft)
    draft.globals[f"{A}.quant_type"] = "QK_INT8_DYNAMIC_V_MXFP4_DYNAMIC"
    assert not verify_folder(draft.write(tmp_path / "out")).problems


CACHE: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda d: d.drop(f"{A}.v_proj.kv_cache_offset"),
        f"{A}.v_proj.kv_cache_offset: is missing; an attention of type C8 has it",
    ),
    "a type elsewhere": (
        lambda d: add(d, f"{A}.o_proj.kv_cache_scale", torch.ones(16), "C8"),
        f"{A}.o_proj.kv_cache_scale: has the type C8, which belongs to",
    ),
    "another type": (
        label(f"{A}.k_proj.kv_cache_scale", "FLOAT"),
        f"{A}.k_proj.kv_cache_scale: has the type FLOAT, expected C8",
    ),
    "size": (
        set_tensor(f"{A}.k_proj.kv_cache_scale", torch.ones(8)),
        f"{A}.k_proj.kv_cache_scale: is float32 [8], expected a float [16]",
    ),
    "two dimensions": (
        set_tensor(f"{A}.v_proj.kv_cache_scale", torch.ones(4, 4)),
        f"{A}.v_proj.kv_cache_scale: is float32 [4, 4], expected a float [16]",
    ),
    "no float": (
        set_tensor(f"{A}.k_proj.kv_cache_offset", torch.zeros(16, dtype=torch.int8)),
        f"{A}.k_proj.kv_cache_offset: is int8 [16], expected a float [16]",
    ),
    "zero": (
        set_tensor(f"{A}.k_proj.kv_cache_scale", first(0.0)),
        f"{A}.k_proj.kv_cache_scale: is 0 at least once, expected above 0",
    ),
    "NaN": (
        set_tensor(f"{A}.v_proj.kv_cache_scale", first(float("nan"))),
        f"{A}.v_proj.kv_cache_scale: holds NaN or infinity",
    ),
    "no integer": (
        set_tensor(f"{A}.v_proj.kv_cache_offset", first(0.5)),
        f"{A}.v_proj.kv_cache_offset: holds values that are no integers in -128..127",
    ),
    "no code": (set_tensor(f"{A}.v_proj.kv_cache_offset", first(128.0)), "no integers in -128..127"),
    "no global key": (drop_key("kv_cache_type"), "kv_cache_type is None, expected 'C8' with C8 tensors"),
    "latent": (latent, f"{A}: has the type C8, but caches a latent"),
}
KERNEL: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda d: d.drop(f"{A}.fa_k.scale"),
        f"{A}.fa_k.scale: is missing; an attention of type FAQuant INT8 has it",
    ),
    "too many": (
        set_key(f"{A}.quant_type", "QK_INT8"),
        f"{A}.fa_v.scale: has the type FAQuant QK_INT8, which belongs to",
    ),
    "no quant_type": (drop_key(f"{A}.quant_type"), f"{A}.quant_type: is missing; an attention of type FAQuant has it"),
    "strange quant_type": (
        set_key(f"{A}.quant_type", "INT9"),
        f"{A}.quant_type: is 'INT9', which cannot be understood",
    ),
    "other dtype": (
        set_key(f"{A}.quant_type", "FP8"),
        f"{A}.fa_q.offset: is int8 [4, 1], expected float32 [4, 1]",
    ),
    "shape": (set_tensor(f"{A}.fa_v.scale", torch.ones(4)), f"{A}.fa_v.scale: is float32 [4], expected float32 [4, 1]"),
    "heads": (
        set_tensor(f"{A}.fa_q.scale", torch.ones(2, 1)),
        f"{A}.fa_q.scale: is float32 [2, 1], expected float32 [4, 1]",
    ),
    "offset": (
        set_tensor(f"{A}.fa_q.offset", first(3)),
        f"{A}.fa_q.offset: is not zero; an attention of type FAQuant has no offset",
    ),
    "scale": (set_tensor(f"{A}.fa_q.scale", first(-1.0)), f"{A}.fa_q.scale: is -1 at least once, expected above 0"),
    "no global key": (drop_key("fa_quant_type"), "fa_quant_type: is None, expected 'FAKQuant' with static scales"),
    "other global key": (set_key("fa_quant_type", "FAQuant"), "fa_quant_type: is 'FAQuant', expected 'FAKQuant'"),
}


@pytest.mark.parametrize("case", CACHE)
def test_defects_of_a_cache(draft: Any, tmp_path: Path, case: str) -> None:
    change, message = CACHE[case]
    with_cache(draft)
    change(draft)
    found = verify_folder(draft.write(tmp_path / "out"))
    assert any(message in problem for problem in found.problems), found.problems


@pytest.mark.parametrize("case", KERNEL)
def test_defects_of_the_kernel(draft: Any, tmp_path: Path, case: str) -> None:
    change, message = KERNEL[case]
    with_kernel(draft)
    change(draft)
    found = verify_folder(draft.write(tmp_path / "out"))
    assert any(message in problem for problem in found.problems), found.problems


def test_a_global_key_without_attentions(draft: Any, tmp_path: Path) -> None:
    draft.globals["fa_quant_type"] = "FAKQuant"
    (problem,) = verify_folder(draft.write(tmp_path / "out")).problems
    assert problem == "fa_quant_type: is 'FAKQuant', expected none without static scales of attentions"


def test_sizes_of_fused_projections_come_from_the_configuration(draft: Any, tmp_path: Path) -> None:
    with_cache(draft)
    for layer in range(2):
        for projection in ("q_proj", "k_proj", "v_proj"):
            for part in [p for p in draft.tensors if p.startswith(f"{ATTENTION.format(layer)}.{projection}.")]:
                if "kv_cache" not in part:
                    draft.drop(part)
        draft.add_float(f"{ATTENTION.format(layer)}.qkv_proj.weight", torch.ones(48, 16, dtype=torch.bfloat16))
    assert not [p for p in verify_folder(draft.write(tmp_path / "clean")).problems if "kv_cache" in p]
    draft.config["num_key_value_heads"] = 2
    found = verify_folder(draft.write(tmp_path / "out"))
    assert any("k_proj.kv_cache_scale: is float32 [16], expected a float [8]" in p for p in found.problems)


def test_an_asymmetric_cache_is_worth_a_warning(draft: Any, tmp_path: Path) -> None:
    with_cache(draft)
    set_tensor(f"{A}.k_proj.kv_cache_offset", first(3.0))(draft)
    found = verify_folder(draft.write(tmp_path / "out"))
    assert not found.problems
    assert any("paged decode of vllm-ascend ignores it" in warning for warning in found.warnings)


def test_what_engines_load(draft: Any, tmp_path: Path) -> None:
    with_kernel(draft)
    found = verify_folder(draft.write(tmp_path / "out"))
    (entry,) = [entry for entry in found.loadable if entry.engine == "vllm-ascend" and entry.place == "attention"]
    assert (entry.kind, entry.count, entry.loadable) == ("FAKQuant", 2, False)
    assert not any(entry.engine == "mindie-sd" for entry in found.loadable)
    assert any("has no class for standard attention that is FAKQuant" in warning for warning in found.warnings)
    for layer in range(2):
        draft.add_float(f"{ATTENTION.format(layer)}.kv_b_proj.weight", torch.zeros(4, 4, dtype=torch.bfloat16))
        for state in ("fa_k", "fa_v"):
            prefix = f"{ATTENTION.format(layer)}.{state}"
            draft.tensors[f"{prefix}.scale"] = torch.ones(1, 1)
            draft.tensors[f"{prefix}.offset"] = torch.zeros(1, 1, dtype=torch.int8)
    found = verify_folder(draft.write(tmp_path / "latent"), engine="vllm-ascend")
    assert not found.problems
    assert [entry.loadable for entry in found.loadable if entry.place == "attention"] == [True]
    with_cache(draft)
    found = verify_folder(draft.write(tmp_path / "both"), engine="vllm-ascend-310p")
    assert any("vllm-ascend-310p has no class for latent attention that is C8" in problem for problem in found.problems)

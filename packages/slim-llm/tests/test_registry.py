from __future__ import annotations

import pytest

from slim_core.errors import SchemaValidateError
from slim_core.practices.registry import load_registry, pedigree_of
from slim_llm.resources import REGISTRY


@pytest.mark.parametrize(
    ("model_type", "pedigree"),
    [
        ("Qwen2-7B", "qwen2"),
        ("Qwen2.5-7B-Instruct", "qwen2_5"),
        ("DeepSeek-R1-Distill-Qwen-7B", "qwen2_5"),
        ("Qwen3-32B", "qwen3"),
        ("tiny-qwen3", "qwen3"),
        ("QwQ-32B", "qwq"),
        ("Llama-3.1-8B-Instruct", "llama"),
        ("DeepSeek-R1-Distill-Llama-8B", "llama"),
        ("Qwen1.5-110B", "qwen1_5"),
        ("Qwen1.5-MoE-A2.7B", "qwen2_moe"),
        ("Qwen3-30B", "qwen3_moe"),
        ("Qwen3-235B-A22B", "qwen3_moe"),
        ("DeepSeek-R1-0528", "deepseek_v3"),
        ("DeepSeek-V3.2-Exp", "deepseek_v3_2"),
        ("GLM-4.7-Flash", "glm4_moe_lite"),
        ("Qwen3.6-27B", "qwen3_5"),
        ("Qwen3-32b", None),
        ("", None),
    ],
)
def test_pedigrees(model_type, pedigree):
    assert pedigree_of(model_type, REGISTRY) == pedigree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [x]\nb:\n  - y\n  - x\n", ":4: 'x' is already listed on line 1"),
        ("a: [x, x]\n", ":1: 'x' is already listed on line 1"),
        ("a: x\n", ":1: must be a list of model types"),
        ("a: [1]\n", ":1: got 1; a model type must be a string"),
        ("a: [x]\na: [y]\n", ":2:1: duplicate key 'a'"),
    ],
)
def test_a_bad_registry_is_refused(tmp_path, text, message):
    path = tmp_path / "registry.yaml"
    path.write_text(text)
    with pytest.raises(SchemaValidateError) as caught:
        load_registry(path)
    assert message in str(caught.value)

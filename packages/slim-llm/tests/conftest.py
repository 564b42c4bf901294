"""Tiny random models of every family, and quantization runs over them; each is made once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
SMALL: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 3069,
    "eos_token_id": 3071,
    "pad_token_id": 3069,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "glm4": ("Glm4Config", {}),
    "olmo2": ("Olmo2Config", {}),
}
# Mixtures of experts. Twice the inner size is never the hidden size, so the matrices of a stack are not square.
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES |= {
    "qwen2_moe": ("Qwen2MoeConfig", FOUR | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", FOUR | {"mlp_only_layers": [1]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        FOUR
        | {"shared_expert_intermediate_size": 40, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}),
    "deepseek_v2": ("DeepseekV2Config", MLA | FOUR | {"n_routed_experts": 4, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", MLA | FOUR | {"n_routed_experts": 8, "num_experts_per_tok": 4}),
    "deepseek_v32": (
        "DeepseekV32Config",
        MLA | {"first_k_dense_replace": 3, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2},
    ),
    "mamba": (
        "MambaConfig",
        {"state_size": 4, "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        FOUR | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
    ),
    # A norm whose output is gated before anything reads it; a block that is called by several layers.
    "minimax": (
        "MiniMaxConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
        | {"layer_types": ["full_attention", "linear_attention"]},
    ),
    "zamba2": (
        "Zamba2Config",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1}
        | {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "mamba_d_state": 8, "head_dim": None},
    ),
    "olmo": ("OlmoConfig", {"clip_qkv": 50.0}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "llama4": ("Llama4TextConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 40}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "longcat": (
        "LongcatFlashConfig",
        MLA
        | {"num_layers": 2, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24, "n_routed_experts": 4}
        | {"zero_expert_num": 2, "moe_topk": 3, "num_hidden_layers": None},
    ),
    # So many experts that a few samples do not reach all of them.
    "qwen3_moe_16": ("Qwen3MoeConfig", FOUR | {"num_experts": 16, "mlp_only_layers": [1]}),
    "qwen3_moe_16_first": ("Qwen3MoeConfig", FOUR | {"num_experts": 16, "mlp_only_layers": [1, 2]}),
    "gpt_oss_16": ("GptOssConfig", {"num_local_experts": 16, "num_experts_per_tok": 2, "sliding_window": 8}),
    "llama4_16": ("Llama4TextConfig", {"num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}),
    "jetmoe": ("JetMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
    "nemotron_h": (
        "NemotronHConfig",
        FOUR
        | {"n_routed_experts": 4, "layers_block_type": ["mamba", "moe", "attention"], "moe_latent_size": None}
        | {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "num_hidden_layers": None}
        | {"moe_shared_expert_intermediate_size": 40},
    ),
}
TEXTS = (
    "A generator is a function that returns an iterator.",
    "The with statement wraps the execution of a block with methods defined by a context manager, which is convenient.",
    "Hello, world!",
    "量化把浮点数变成整数。",
    "def add(a, b):\n    return a + b\n",
)
# Short names of the recipes: activation and weight of one linear_quant.
WEIGHT: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
SCHEMES: dict[str, dict[str, Any]] = {
    "static": {
        "act": {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"},
        "weight": WEIGHT,
    },
    "static-symmetric": {
        "act": {"dtype": "int8", "scope": "per_tensor", "symmetric": True, "method": "minmax"},
        "weight": WEIGHT,
    },
    "dynamic": {
        "act": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"},
        "weight": WEIGHT,
    },
    "w8a16": {"weight": WEIGHT},
    "w8a16-asymmetric": {"weight": WEIGHT | {"symmetric": False}},
}


def build(family: str, dtype: torch.dtype, folder: Path) -> None:
    name, options = FAMILIES[family]
    settings = {key: value for key, value in {**SMALL, **options}.items() if value is not None}
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.normal_(1.0 if path.endswith("norm.weight") else 0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.2)
        for path, buffer in model.named_buffers():
            if path.endswith("score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)


def _beside(name: str) -> ModuleType:
    """A module in this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"slim_llm_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def naive() -> ModuleType:
    """The independent reader, ``naive.py`` in this folder."""
    return _beside("naive")


@pytest.fixture(scope="session")
def naive_attention() -> ModuleType:
    """The independent arithmetic of caches, ``naive_attention.py`` in this folder."""
    return _beside("naive_attention")


@pytest.fixture(scope="session")
def rank_cases() -> ModuleType:
    """Recipes for several ranks, ``rank_cases.py`` in this folder."""
    return _beside("rank_cases")


@pytest.fixture(scope="session")
def drafts() -> ModuleType:
    """Models with a drafting layer, ``drafts.py`` in this folder."""
    return _beside("drafts")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures: drawing takes longer than all the rest of a small run."""
    monkeypatch.setattr("slim_core.evaluation.report.write.draw_plots", lambda _data: {})


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], AbstractContextManager[None]]:
    """``with killed(LinearQuant, "model.layers.1"):``: a run that dies once that processor is through with the unit."""

    @contextmanager
    def dying(processor: Any, unit: str) -> Generator[None]:
        process = processor.process

        def failing(self: Any, work: Any) -> None:
            process(self, work)
            if work.name == unit:
                raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(processor, "process", failing)
            with pytest.raises(RuntimeError, match="killed"):
                yield

    return dying


ModelFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """``model_folder(family, dtype)``: a saved model with a tokenizer."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
        if (family, dtype) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{str(dtype).removeprefix('torch.')}")
            build(family, dtype, path)
            made[family, dtype] = path
        return made[family, dtype]

    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration set of all runs."""
    path = tmp_path_factory.mktemp("data") / "calib.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="session")
def token_ids() -> list[list[int]]:
    """The tokens of the calibration set."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="session")
def rules() -> dict[str, dict[str, Any]]:
    """The short names of the schemes, each with a processor that quantizes all linears so."""
    return {name: {"type": "linear_quant", "qconfig": qconfig} for name, qconfig in SCHEMES.items()}


Quantize = Callable[..., RunResult]


@pytest.fixture(scope="session")
def quantize(dataset: Path) -> Quantize:
    """``quantize(model, save_path, scheme, **options)``; options are those of spec, of the saver, or of the request."""

    def run(model: Path, save_path: Path, scheme: str = "static", **options: Any) -> RunResult:
        rule = {"type": "linear_quant", "qconfig": SCHEMES[scheme]}
        rule |= {key: options.pop(key) for key in ("include", "exclude") if key in options}
        saver = {"type": "ascendv1_saver"}
        saver |= {key: options.pop(key) for key in ("part_file_size",) if key in options}
        request = {"force": True}  # how things are written does not depend on who loads them
        request |= {key: options.pop(key) for key in ("resume", "overwrite", "debug", "force") if key in options}
        spec = {"process": [rule], "save": [saver], "dataset": str(dataset), **options}
        return LlmService().quantize(
            QuantRequest(model_path=model, save_path=save_path, model_type="tiny", device="cpu", **request),
            recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
            SilentProgress(),
        )

    return run


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder, quantize: Quantize) -> ModelFolder:
    """``output(family, scheme, dtype)``: the folder of a run with default settings. Only to be read."""
    made: dict[tuple[str, str, torch.dtype], Path] = {}

    def folder(family: str = "llama", scheme: str = "static", dtype: torch.dtype = torch.bfloat16) -> Path:
        key = (family, scheme, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp("runs") / f"{family}-{scheme}"
            quantize(model_folder(family, dtype), path, scheme)
            made[key] = path
        return made[key]

    return folder

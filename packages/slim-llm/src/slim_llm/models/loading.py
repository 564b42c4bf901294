"""Opening a transformers model for streaming: configuration, skeleton, checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from slim_core.checkpoint.fp8_blocks import Fp8BlockSource, fp8_block_shape
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError, SecurityError, UnsupportedError
from slim_core.model.adapter import find_adapter
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.units import StreamedModel

__all__ = ["is_causal_lm", "open_model", "open_skeleton", "open_tokenizer", "read_config"]


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        InvalidModelError: the file is missing or no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InvalidModelError(
            "the model folder does not exist or is not a folder",
            where=str(folder),
            remedy="point --model_path to the model folder",
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidModelError(
            "there is no config.json", where=str(folder), remedy="point --model_path to the model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidModelError(
            f"cannot be read as JSON: {error}", where=str(path), remedy="correct it or download it again"
        ) from error
    if not isinstance(config, dict):
        raise InvalidModelError("is not a JSON object", where=str(path), remedy="download it again")
    return config


def open_skeleton(
    folder: Path, config: dict[str, Any], *, trust_remote_code: bool, default_dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """The model class with its parameters on ``meta``, in the dtype that the configuration names, or else the default.

    Experts that the class stacks into one parameter are taken apart into linears.

    Raises:
        SecurityError: the model brings its own code and that is not trusted.
        UnsupportedError: transformers does not know this ``model_type``, or its experts have an unknown structure.
        InvalidModelError: the configuration does not make a model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from slim_llm.models.checkpoint_names import expert_spelling
    from slim_llm.models.experts import take_experts_apart

    refusals = (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError, RuntimeError, ZeroDivisionError)
    if config.get("auto_map") and not trust_remote_code and not is_causal_lm(config):
        raise SecurityError(
            "this model needs Python code that ships with it",
            where=str(folder / "config.json"),
            remedy="read that code, then pass --trust_remote_code True",
        )
    if not config.get("auto_map") and not is_causal_lm(config):
        raise UnsupportedError(
            f"this transformers does not know model_type {config.get('model_type')!r}",
            where=str(folder / "config.json"),
            remedy="upgrade transformers, or check the file",
        )
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if hasattr(parsed, "quantization_config"):
            delattr(parsed, "quantization_config")  # weights are decoded while they are read
        dtype = parsed.dtype or default_dtype
        with parameters_on_meta():
            module = AutoModelForCausalLM.from_config(parsed, trust_remote_code=trust_remote_code, dtype=dtype)
    except (*refusals, StrictDataclassError) as error:
        raise InvalidModelError(
            f"transformers cannot build the model: {type(error).__name__}: {error}",
            where=str(folder / "config.json"),
            remedy="correct the file, or download it again",
        ) from error
    take_experts_apart(module, expert_spelling(module))
    return module


def is_causal_lm(config: dict[str, Any]) -> bool:
    """Whether transformers has a causal language model for this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(config.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def open_model(folder: Path, *, trust_remote_code: bool = False) -> StreamedModel:
    """A causal language model ready to be streamed.

    Raises:
        SlimError: see :func:`open_skeleton`, :class:`Checkpoint` and :class:`StreamedModel`.
    """
    from slim_llm.models.attention import Attentions
    from slim_llm.models.checkpoint_names import locate

    config = read_config(folder)
    quantization = config.get("quantization_config")
    block = fp8_block_shape(config)
    if quantization and block is None:
        raise UnsupportedError(
            f"the source is already quantized ({_method(quantization)})",
            where=str(folder / "config.json"),
            remedy="start from the floating-point checkpoint or a block-quantised FP8 one",
        )
    if (folder / "quant_model_description.json").exists():
        raise UnsupportedError(
            "this folder holds a quantized ascendv1 checkpoint", where=str(folder), remedy="start from the original"
        )
    source: TensorSource = Checkpoint(folder)
    if block is not None:
        source = Fp8BlockSource(source, block)
    module = open_skeleton(folder, config, trust_remote_code=trust_remote_code, default_dtype=_main_dtype(source))
    adapter = find_adapter(str(config.get("model_type")))
    source, names = locate(module, source, str(folder))

    def tensor_name(name: str) -> str:
        return names.get(name) or adapter.tensor_name(name)

    attention = Attentions(module, tensor_name)
    return StreamedModel(module, source, folder, config, adapter.blocks, tensor_name, attention=attention)


def _main_dtype(source: TensorSource) -> torch.dtype | None:
    """The floating dtype that most of the checkpoint is stored in."""
    sizes: dict[torch.dtype, int] = {}
    for name in source:
        meta = source.meta(name)
        if meta.dtype.is_floating_point:
            sizes[meta.dtype] = sizes.get(meta.dtype, 0) + meta.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _method(quantization: Any) -> str:
    return (
        str(quantization.get("quant_method", "unknown method")) if isinstance(quantization, dict) else "unknown method"
    )


def open_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, from local files only.

    Raises:
        InvalidModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if not tokenizer("text")["input_ids"]:
            raise ValueError("it turns text into nothing, so its files are missing")
        return tokenizer
    except Exception as error:  # the Rust library raises nothing more special
        raise InvalidModelError(
            f"the tokenizer cannot be loaded: {type(error).__name__}: {error}",
            where=str(folder),
            remedy="copy the tokenizer files into the model folder",
        ) from error

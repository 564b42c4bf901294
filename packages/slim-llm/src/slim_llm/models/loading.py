"""Opening a transformers model for streaming: configuration, skeleton, checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slim_core.checkpoint.fp8_blocks import Fp8BlockSource, fp8_block_shape
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.adapter import find_adapter
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_llm.models.blocks import find_text_blocks
from slim_llm.models.host import say_host
from slim_llm.models.kept_float32 import keep_float32
from slim_llm.models.own_code import failure_of_own_code, uses_own_code

__all__ = ["CAUSAL_LM", "ModelKind", "open_model", "open_skeleton", "open_tokenizer", "read_config"]


@dataclass(frozen=True)
class ModelKind:
    """A kind of transformers model.

    Args:
        what: what people call it.
        auto_class: the class of transformers that builds it.
        names: the table of transformers from ``model_type`` to its classes.
        towers: dotted names of what runs as a whole ahead of the decoder blocks, given the model and their list's name.
    """

    what: str
    auto_class: str
    names: str
    towers: Callable[[torch.nn.Module, str], tuple[str, ...]] = lambda _module, _blocks: ()

    def knows(self, config: Mapping[str, Any]) -> bool:
        """Whether transformers has a class of this kind for a configuration."""
        from transformers.models.auto import modeling_auto

        return str(config.get("model_type")) in getattr(modeling_auto, self.names)


CAUSAL_LM = ModelKind("causal language model", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
# Where a model may be looked for that is not of the kind that was expected: tables, and who quantizes what is in them.
_SERVED = {
    CAUSAL_LM.names: "it is a language model, which recipes of modelslim_v1 quantize",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "it is a vision-language model, which recipes of "
    "multimodal_vlm_modelslim_v1 quantize",
}


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
    folder: Path,
    config: dict[str, Any],
    *,
    trust_remote_code: bool,
    default_dtype: torch.dtype | None = None,
    kind: ModelKind = CAUSAL_LM,
) -> torch.nn.Module:
    """The model class with its parameters on ``meta``, in the dtype that the configuration names, or else the default.

    Experts that the class stacks into one parameter are taken apart into linears.

    Raises:
        SecurityError: the model brings its own code and that is not trusted, or not in the folder.
        UnsupportedError: transformers does not know this ``model_type``, or its experts have an unknown structure.
        InvalidModelError: the configuration does not make a model, or the model's own code is missing or fails.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from slim_llm.models.conversions import expert_spelling
    from slim_llm.models.experts import take_experts_apart

    refusals = (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError, RuntimeError, ZeroDivisionError)
    known = kind.knows(config)
    own_code = uses_own_code(
        folder, config, auto_class=kind.auto_class, what=kind.what, trusted=trust_remote_code, known=known
    )
    if not known and not own_code:
        raise UnsupportedError(
            f"this transformers does not know model_type {config.get('model_type')!r} as a {kind.what}",
            where=str(folder / "config.json"),
            remedy=_served_elsewhere(config) or "upgrade transformers, or check the file",
        )
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if hasattr(parsed, "quantization_config"):
            delattr(parsed, "quantization_config")  # weights are decoded while they are read
        dtype = parsed.dtype or default_dtype
        with parameters_on_meta():
            module = getattr(transformers, kind.auto_class).from_config(
                parsed, trust_remote_code=trust_remote_code, dtype=dtype
            )
    except (Exception, SystemExit) as error:
        if own_code:
            raise failure_of_own_code(folder, error) from error
        if not isinstance(error, (*refusals, StrictDataclassError)):
            raise
        raise InvalidModelError(
            f"transformers cannot build the model: {type(error).__name__}: {error}",
            where=str(folder / "config.json"),
            remedy="correct the file, or download it again",
        ) from error
    keep_float32(module)
    take_experts_apart(module, expert_spelling(module))
    return module


def _served_elsewhere(config: Mapping[str, Any]) -> str | None:
    from transformers.models.auto import modeling_auto

    kind = str(config.get("model_type"))
    return next((told for names, told in _SERVED.items() if kind in getattr(modeling_auto, names)), None)


def open_model(folder: Path, *, trust_remote_code: bool = False, kind: ModelKind = CAUSAL_LM) -> StreamedModel:
    """A model ready to be streamed.

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
    if any(folder.glob("quant_model_description*.json")):
        raise UnsupportedError(
            "this folder holds a quantized checkpoint", where=str(folder), remedy="start from the original"
        )
    source: TensorSource = Checkpoint(folder)
    if block is not None:
        source = Fp8BlockSource(source, block)
    module = open_skeleton(
        folder, config, trust_remote_code=trust_remote_code, default_dtype=_main_dtype(source), kind=kind
    )
    adapter = find_adapter(str(config.get("model_type")))
    source, names, joined = locate(module, source, str(folder))

    def tensor_name(name: str) -> str:
        return names.get(name) or adapter.tensor_name(name)

    attention = Attentions(module, tensor_name)
    blocks = adapter.blocks or find_text_blocks(module)
    towers = kind.towers(module, blocks) if adapter.towers is None else adapter.towers
    if towers:
        say_host(module, [*towers, blocks])
    return StreamedModel(
        module,
        source,
        folder,
        config,
        (blocks,),
        tensor_name,
        attention=attention,
        joined=joined,
        subgraphs=adapter.subgraphs,
        unsmoothed=adapter.unsmoothed,
        towers=towers,
    )


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

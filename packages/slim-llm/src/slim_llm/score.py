"""Scoring of language models and of the files that were written for them."""

from __future__ import annotations

from typing import Any

import torch

from slim_core.checkpoint.joined import JoinedSource
from slim_core.devices import resolve_devices
from slim_core.errors import InvalidDatasetError, UnsupportedError
from slim_core.evaluation.perplexity import EvalResult, evaluate
from slim_core.model.biases import take_stored_biases
from slim_core.model.streamed import StreamedModel
from slim_core.progress import Progress
from slim_core.rotation.inputs import install, read_input_rotations
from slim_core.savers.mindie_folder import open_quantized
from slim_core.savers.quantized_folder import QuantizedFolder
from slim_core.service import EvalRequest
from slim_llm.models.attention import Attentions
from slim_llm.models.host import say_host
from slim_llm.models.loading import CAUSAL_LM, ModelKind, open_model, open_skeleton, open_tokenizer, read_config
from slim_llm.vocabulary import check_token_ids, max_positions

__all__ = ["open_written", "score", "text_windows"]


def score(request: EvalRequest, progress: Progress) -> EvalResult:
    """Perplexity of a model and, if ``request.quantized`` is given, of the files written for it."""
    devices = resolve_devices(request.device, explicit="device" in request.model_fields_set)
    trust = request.trust_remote_code
    model = open_model(request.model_path, trust_remote_code=trust)
    tokenizer = open_tokenizer(request.model_path, trust_remote_code=trust)
    inputs = text_windows(request, tokenizer, max_positions(model))
    check_token_ids(model, inputs)
    quantized = None
    if request.quantized is not None:
        folder = open_quantized(request.quantized)
        quantized = (open_written(model, folder, trust), folder)
    return evaluate(model, inputs, devices.only(), progress, quantized)


def open_written(
    original: StreamedModel, folder: QuantizedFolder, trust_remote_code: bool, kind: ModelKind = CAUSAL_LM
) -> StreamedModel:
    """The model over the files that were written for it."""
    config = read_config(folder.folder)
    module = open_skeleton(folder.folder, config, trust_remote_code=trust_remote_code, kind=kind)
    if original.towers:
        say_host(module, [*original.towers, *original.block_lists])
    skip = frozenset(f"{prefix}.{part}" for prefix, _ in folder.layers() for part in ("weight", "bias"))
    source = JoinedSource(folder.source, original.joined) if original.joined else folder.source
    take_stored_biases(module, source, original.tensor_name, skip)
    model = StreamedModel(
        *(module, source, folder.folder, config, original.block_lists, original.tensor_name, skip),
        attention=Attentions(module, original.tensor_name),
        joined=original.joined,
        towers=original.towers,
    )
    rotations = read_input_rotations(folder.source)
    names = {info.prefix: info.name for unit in original.units for info in unit.linears}
    if lost := sorted(rotations.keys() - names.keys()):
        raise UnsupportedError("the files rotate the input of a linear that this model does not have", where=lost[0])
    install(module, {names[prefix]: rotation for prefix, rotation in rotations.items()})
    return model


def text_windows(request: EvalRequest, tokenizer: Any, limit: int | None) -> list[dict[str, Any]]:
    """The text to score, cut into windows of equal length; what is left over at the end makes a shorter one."""
    if request.text is None:
        raise InvalidDatasetError("no text to score", where="--text", remedy="give a UTF-8 text file")
    try:
        text = request.text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDatasetError(f"cannot be read as UTF-8 text: {error}", where=str(request.text)) from error
    ids = tokenizer(text)["input_ids"]
    length = min(request.sequence_length, limit or request.sequence_length)
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    parts = [part for part in parts if len(part) > 1][: request.max_windows]
    if not parts:
        raise InvalidDatasetError("the text is empty", where=str(request.text))
    return [{"input_ids": torch.tensor([part]), "use_cache": False} for part in parts]

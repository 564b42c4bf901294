"""Opening a vision-language model for streaming: the towers that run ahead of its text decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from slim_core.errors import InvalidModelError, SlimError
from slim_core.logging import get_logger
from slim_core.model.streamed import StreamedModel
from slim_core.model.suspended import SuspendedForward
from slim_llm.models.loading import ModelKind, open_model
from slim_vlm.preparation import Preparation

__all__ = ["IMAGE_TEXT", "find_towers", "open_vlm"]

_logger = get_logger(__name__)
# Of other modalities than images; such towers stay as they are.
_ELSEWHERE = ("audio", "speech", "sound")


def find_towers(module: nn.Module, blocks: str) -> tuple[str, ...]:
    """Dotted names of the vision tower, the projector and whatever else stands beside the text decoder.

    Args:
        module: the model.
        blocks: dotted name of the list of decoder blocks.
    """
    text = blocks.rpartition(".")[0]  # the module that has the blocks is the text decoder
    own = [part for part in (_part(module, "get_input_embeddings"), _part(module, "get_output_embeddings")) if part]
    towers: list[str] = []
    place = ""
    for step in filter(None, text.split(".")):
        for name, child in module.get_submodule(place).named_children():
            path = f"{place}.{name}" if place else name
            if name != step and _is_tower(path, child, own):
                towers.append(path)
        place = f"{place}.{step}" if place else step
    return tuple(towers)


def _is_tower(path: str, module: nn.Module, own: list[nn.Module]) -> bool:
    # What happens to the input of a lone linear while it runs cannot be watched at the place where it is suspended.
    if isinstance(module, nn.Linear) or any(module is part for part in own):
        return False
    if any(word in path.lower() for word in _ELSEWHERE):
        return False
    return any(True for _ in module.parameters())


def _part(module: nn.Module, getter: str) -> nn.Module | None:
    found = getattr(module, getter, None)
    return cast("nn.Module | None", found()) if found is not None else None


IMAGE_TEXT = ModelKind(
    "vision-language model",
    "AutoModelForImageTextToText",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    find_towers,
)


def open_vlm(folder: Path, *, trust_remote_code: bool = False) -> StreamedModel:
    """A vision-language model ready to be streamed.

    A small picture is run up to the first block of the text. What it does not pass once, as a whole and by a call of
    the module is no tower, but stays in floating point like the embedding; the others stand in the order of calls.

    Raises:
        SlimError: as :func:`slim_llm.models.loading.open_model`.
    """
    model = open_model(folder, trust_remote_code=trust_remote_code, kind=IMAGE_TEXT)
    preparation = Preparation(model, trust_remote_code=trust_remote_code)
    try:
        given = preparation.example()
    except SlimError as error:  # whoever needs samples will hear of it; without data the order makes no difference
        _logger.debug("no picture can be prepared: %s", error)
        return model
    called = _calls(model, given)
    towers = tuple(tower for tower, count in called.items() if count == 1)
    for tower in model.towers:
        if tower not in towers:
            _logger.info("%s is not quantized: a picture passes it %d times", tower, called[tower])
    model = model if towers == model.towers else replace(model, towers=towers)
    model.tower_example = preparation
    return model


def _calls(model: StreamedModel, given: Mapping[str, Any]) -> Counter[str]:
    """How often a picture passes each tower, in the order of the first calls."""
    called: Counter[str] = Counter()
    handles = [
        model.module.get_submodule(tower).register_forward_pre_hook(lambda *_, name=tower: called.update([name]))
        for tower in model.towers
    ]
    names = [name for unit in model.units if unit.block is None and not unit.mirrors for name in unit.parameters]
    model.load(names, torch.device("cpu"))
    try:
        with torch.no_grad(), SuspendedForward(model.module, model.blocks, [given]) as forward:
            forward.start()
    except SlimError:
        raise
    except Exception as error:  # whatever a model's forward raises that is given what it does not expect
        raise InvalidModelError(
            f"the model's forward fails on a small picture: {type(error).__name__}: {error}",
            where=str(model.folder),
            remedy="the model, config.json and the processor's files must belong together",
        ) from error
    finally:
        model.unload(names)
        for handle in handles:
            handle.remove()
    return called

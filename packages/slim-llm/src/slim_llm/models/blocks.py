"""Which list of modules holds the decoder blocks of a transformers model."""

from __future__ import annotations

from typing import Any

from torch import nn

from slim_core.errors import InvalidModelError
from slim_core.model.skeleton import find_blocks, named_modules

__all__ = ["find_text_blocks"]


def find_text_blocks(module: Any) -> str:
    """Dotted name of the decoder blocks: not the larger list that the tower of another modality may have.

    They are looked for in the decoder that the model itself names, and in the rest of it where that has none.

    Raises:
        InvalidModelError: the model has no such list.
    """
    aside = _other_models(module)
    decoder = _decoder(module)
    if decoder is not None:
        inner = module.get_submodule(decoder)
        lists = {name: child for name, child in inner.named_children() if _is_list(child)}
        if lists:
            return f"{decoder}.{_largest(lists, _depth(module))}"
        within = [name.removeprefix(f"{decoder}.") for name in aside if name.startswith(f"{decoder}.")]
        try:
            return f"{decoder}.{find_blocks(inner, within)}"
        except InvalidModelError:
            pass  # then they are elsewhere
    try:
        return find_blocks(module, aside)
    except InvalidModelError:
        return find_blocks(module)


def _other_models(module: Any) -> list[str]:
    """Towers are often models of their own, built from another class of configuration than the text is."""
    from transformers import PreTrainedModel

    text = {type(module.config), type(module.config.get_text_config(decoder=True))}
    return [
        name
        for name, child in named_modules(module)
        if name and isinstance(child, PreTrainedModel) and type(child.config) not in text
    ]


def _decoder(module: Any) -> str | None:
    """Dotted name of the module that the model calls its decoder, if it is a part of it."""
    getter = getattr(module, "get_decoder", None)
    if getter is None:
        return None
    try:
        decoder = getter()
    except Exception:  # noqa: BLE001 - a model that has none may fail in any way, and is searched as a whole
        return None
    return next((name for name, child in named_modules(module) if name and child is decoder), None)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())


def _largest(lists: dict[str, nn.Module], depth: int | None) -> str:
    """The one with most parameters, of those as long as the model is deep if there are any."""
    deep = {name: found for name, found in lists.items() if len(list(found.children())) == depth}
    sizes = {name: sum(p.numel() for p in found.parameters()) for name, found in (deep or lists).items()}
    return max(sizes, key=lambda name: sizes[name])


def _depth(module: Any) -> int | None:
    return getattr(module.config.get_text_config(decoder=True), "num_hidden_layers", None)

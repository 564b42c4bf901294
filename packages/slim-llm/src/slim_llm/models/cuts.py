"""Tensors that transformers cuts into several parameters while it loads, such as a fused ``qkv`` of a vision tower, or
whose rows it puts in another order for its rotary embeddings.

Engines look for what is stored, so that is what is written; the parameters only read it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from slim_core.checkpoint.joined import Part
from slim_core.checkpoint.source import TensorMeta

__all__ = ["cuts_of"]


def cuts_of(rule: Any, stored: TensorMeta, target: str, state: Container[str], config: Any) -> dict[str, Part]:
    """The parts of a stored tensor that parameters are, by the name of the parameter; empty if the rule of transformers
    does something else.

    Args:
        rule: the converter that takes the tensor to its parameters; None: there is none.
        target: the first of these.
        state: names of all parameters.
        config: of the model.
    """
    if rule is None:
        return {}
    operations = list(rule.operations)
    names = _targets(rule, target)
    count = len(names)
    if len(rule.source_patterns) != 1 or not operations or not all(name in state for name in names):
        return {}
    if _is_chunk(operations[0]) and count > 1 and stored.shape and stored.shape[0] % count == 0:
        operations.pop(0)
    elif count > 1:
        return {}
    size = stored.shape[0] // count if stored.shape else 0
    parts: dict[str, Part] = {}
    for i, name in enumerate(names):
        heads, back = 0, False
        for operation in operations:
            if type(operation).__name__ != "PermuteForRope" or heads or len(stored.shape) > 2:
                return {}
            chosen = operation.permute_layer_names
            # What it compares is the pattern of what it is given.
            given = rule.target_patterns[i] if count > 1 else rule.source_patterns[0]
            if chosen is None or any(layer in given for layer in chosen):
                heads = getattr(getattr(config, operation.subconfig_key or "", config), "num_attention_heads", 1)
                back = bool(operation.inverse)
        parts[name] = Part(stored.name, range(i * size, (i + 1) * size) if count > 1 else None, heads, back)
    return parts


def _targets(rule: Any, target: str) -> list[str]:
    """The parameters that one tensor makes, given the first."""
    first, *others = rule.target_patterns
    if others and first not in target:
        return []
    return [target, *(target.replace(first, other, 1) for other in others)]


def _is_chunk(operation: Any) -> bool:
    return type(operation).__name__ == "Chunk" and operation.dim == 0 and operation.num_shards_attribute is None

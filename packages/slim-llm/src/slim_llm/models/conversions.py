"""The rules by which transformers turns the tensors of a checkpoint into the parameters of a model, as far as they are
understood here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Conversions", "change_of", "expert_spelling", "puts_side_by_side"]


class Conversions:
    """The rules by which transformers turns stored tensors into the parameters of a model."""

    def __init__(self, module: nn.Module) -> None:
        rules: list[Any] = get_model_conversion_mapping(cast("Any", module))
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self._prefix: str = getattr(module, "base_model_prefix", "")

    def target(self, stored: str, state: dict[str, Any]) -> tuple[str, str | None]:
        """The parameter that a stored tensor belongs to, and the pattern of the converter that takes it there."""
        target, pattern = rename_source_key(stored, self.renamings, self.converters, self._prefix, state)
        if target not in state and stored in state:
            return rename_source_key(stored, [], [], self._prefix, state)
        return target, pattern

    def rule(self, pattern: str | None) -> Any:
        """The converter with this pattern; None for None."""
        return None if pattern is None else self._by_pattern[pattern]


def expert_spelling(module: nn.Module) -> Callable[[str, int], Sequence[str] | None]:
    """How the checkpoints of this model spell the linears of single experts: ``w1`` and ``w3``, for instance."""
    converters = [rule for rule in Conversions(module).converters if all("*" in p for p in rule.source_patterns)]
    reverse = [(rule, rule.reverse_transform()) for rule in converters]

    def spelling(parameter: str, count: int) -> Sequence[str] | None:
        for rule, back in reverse:
            names = [pattern.replace("\\", "").split(".")[-2:] for pattern in rule.source_patterns]
            known = len(names) == count and all(name[1:] == ["weight"] for name in names)
            if known and back.rename_source_key(parameter)[1] is not None:
                return [name[0] for name in names]
        return None

    return spelling


def puts_side_by_side(rule: Any) -> bool:
    """Whether a converter does nothing but put several tensors together along the first dimension."""
    single = len(rule.target_patterns) == 1 and len(rule.operations) == 1
    stacks = [pattern for pattern in rule.source_patterns if "*" in pattern]
    operation = rule.operations[0]
    known = type(operation).__name__ == "Concatenate" and operation.dim == 0
    return single and known and (not stacks or len(rule.source_patterns) == 1)


def change_of(operation: Any) -> str:
    """What an operation of a converter does to experts, as far as it is known."""
    name, dim = type(operation).__name__, getattr(operation, "dim", None)
    match name:
        case "MergeModulelist" if dim == 0:
            return "stack"
        case "Concatenate" if dim == 1:
            return "fuse"
        case "Interleave" if dim == 1 and not operation.inverse:
            return "alternate"
        case "Transpose" if {operation.dim0, operation.dim1} == {1, 2}:
            return "maybe turn" if operation.check_dims else "turn"
        case _:
            return name

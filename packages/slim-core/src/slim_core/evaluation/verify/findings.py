"""What the checks of a folder share: where they note what they find, and what they know of the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from slim_core.checkpoint.header import StoredTensor
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.savers.loaders import ASCENDV1, MAIN_ENGINES

__all__ = ["ATTENTION", "CACHE", "FLOAT", "Contents", "Findings", "Layer", "Module", "as_object", "form"]

FLOAT = "FLOAT"
CACHE = "C8"
ATTENTION = "FAQuant"


def as_object(value: Any) -> dict[str, Any] | None:
    """A JSON or YAML object; None if the value is something else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def form(dtype: torch.dtype | None, shape: tuple[int, ...] | None = None) -> str:
    """Dtype and shape for a message, e.g. ``int8 [64, 32]``."""
    name = str(dtype).removeprefix("torch.")
    return name if shape is None else f"{name} {list(shape)}"


@dataclass
class Findings:
    """What was found so far. A problem makes the folder wrong; a warning is worth knowing; a note is just a figure."""

    problems: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def add(self, other: Findings) -> None:
        """Take over what was noted elsewhere."""
        self.problems += other.problems
        self.warnings += other.warnings
        self.notes += other.notes

    def problem(self, where: str, text: str) -> None:
        self.problems.append(f"{where}: {text}")

    def warn(self, where: str, text: str) -> None:
        self.warnings.append(f"{where}: {text}")

    def note(self, where: str, text: str) -> None:
        self.notes.append(f"{where}: {text}")


@dataclass(frozen=True)
class Module:
    """The tensors of one module: ``parts`` maps the last part of their names to their types in the description."""

    prefix: str
    parts: Mapping[str, str]

    @property
    def kind(self) -> str:
        """The type of the module: that of its weight, or of whatever it has that is not a float bias."""
        if "weight" in self.parts:
            return self.parts["weight"]
        return next((kind for suffix, kind in self.parts.items() if suffix != "bias"), FLOAT)


@dataclass(frozen=True)
class Layer:
    """A quantized linear whose tensors are all there in the right shapes.

    Args:
        form: what its tensors say of it; whether it is symmetric takes their values.
        out, width: output and input features.
        packed: whether its four-bit elements, if it has such, lie two to a byte; else each is a number of eight bits.
    """

    module: Module
    form: LayerForm
    out: int
    width: int
    packed: bool = True

    @property
    def prefix(self) -> str:
        return self.module.prefix

    @property
    def kind(self) -> LayerKind:
        return self.form.kind


@dataclass
class Contents:
    """A folder as its description, headers and configuration tell it.

    Args:
        types: tensor to type, global keys left out.
        globals: the keys of the description that name no tensor.
        placed: where every tensor of the weight files lies.
        config: the content of ``config.json``; empty if it is missing or broken.
        format, description, index: what the format is called, and how its two files around the weights are.
        refusals: why engines of this format refuse the files, each with where; they would load the layers.
    """

    folder: Path
    format: str = ASCENDV1
    description: str = ""
    index: str = ""
    types: dict[str, str] = field(default_factory=dict[str, str])
    globals: dict[str, Any] = field(default_factory=dict[str, Any])
    placed: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    refusals: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def main_engine(self) -> str:
        return MAIN_ENGINES[self.format]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the model, the first that ``config.json`` names; None if it names none."""
        for part in (self.config, self.config.get("text_config"), self.config.get("vision_config")):
            known = as_object(part) or {}
            name = known.get("dtype") or known.get("torch_dtype")
            found = getattr(torch, str(name).removeprefix("torch."), None)
            if isinstance(found, torch.dtype):
                return found
        return None

    def setting(self, key: str) -> Any:
        """A value of ``config.json``, also looked for in ``text_config``."""
        text = as_object(self.config.get("text_config")) or {}
        return self.config.get(key, text.get(key))

    def modules(self) -> Iterator[Module]:
        """All modules that own a described tensor, in the order of the description; the cache tensors of C8 aside."""
        parts: dict[str, dict[str, str]] = {}
        for name, kind in self.types.items():
            if kind == CACHE:
                continue
            prefix, _, suffix = name.rpartition(".")
            parts.setdefault(prefix, {})[suffix] = kind
        return (Module(prefix, found) for prefix, found in parts.items())

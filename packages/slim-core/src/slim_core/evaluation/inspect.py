"""``slim inspect``: what a folder holds, from its headers and its description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slim_core.checkpoint.header import DTYPE_NAMES, StoredTensor
from slim_core.checkpoint.reader import Checkpoint
from slim_core.model.inputs import MUL_SCALE
from slim_core.savers.base import INNER
from slim_core.savers.mindie_folder import is_quantized, open_quantized, quantized_parts
from slim_core.sizes import human_size

__all__ = ["Inspection", "Tally", "inspect_folder"]

_SHOWN = 12
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Tally:
    """Tensors of one sort. ``modules`` counts the modules whose weight is among them."""

    tensors: int
    modules: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Args:
        format: ``ascendv1``, ``mindie``, or ``float`` for a model that is not quantized.
        model_quant_type: the type of the whole model; None for a float model.
        files: every file of the folder and its size.
        shards: weight file to what it holds.
        types: type (dtype in a float model) to what has it.
        leaves: last part of a module's name and type, to what goes by them.
        float_linears: two-dimensional weights that are not quantized.
        global_keys: keys of the description that name no tensor.
    """

    path: Path
    format: str
    model_quant_type: str | None
    files: Mapping[str, int]
    shards: Mapping[str, Tally]
    types: Mapping[str, Tally]
    leaves: Mapping[tuple[str, str], Tally]
    float_linears: Sequence[str]
    global_keys: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tally.nbytes for tally in self.types.values())

    @property
    def tensors(self) -> int:
        return sum(tally.tensors for tally in self.types.values())

    def text(self) -> str:
        """A plain table to print."""
        quantized = self.model_quant_type is not None
        head = [
            f"{self.path}",
            f"format {self.format}"
            + (f", type {self.model_quant_type}" if quantized else "")
            + f", {self.tensors} tensors, {human_size(self.nbytes)}",
        ]
        sort = "type" if quantized else "dtype"
        total = max(self.nbytes, 1)
        types = [(k, str(t.tensors), human_size(t.nbytes), f"{t.nbytes / total:.1%}") for k, t in self.types.items()]
        leaves = [(leaf, kind, str(t.modules), human_size(t.nbytes)) for (leaf, kind), t in self.leaves.items()]
        shards = [(name, str(t.tensors), human_size(t.nbytes)) for name, t in self.shards.items()]
        others = [(name, human_size(size)) for name, size in self.files.items() if name not in self.shards]
        parts = [
            "\n".join(head),
            _table((sort, "tensors", "size", "share"), types),
            _table(("module", sort, "count", "size"), leaves),
            _table(("weight file", "tensors", "size"), shards),
            _table(("other file", "size"), others),
        ]
        if quantized:
            parts.append(_table(("key", "value"), [(k, repr(v)) for k, v in self.global_keys.items()], right=False))
            names = list(self.float_linears[:_SHOWN])
            more = [f"  ... and {len(self.float_linears) - _SHOWN} more"] if len(self.float_linears) > _SHOWN else []
            parts.append("\n".join([f"not quantized ({len(self.float_linears)})", *(f"  {n}" for n in names), *more]))
        return "\n\n".join(parts)


def inspect_folder(path: Path) -> Inspection:
    """Look into a quantized folder, one that holds a quantized folder for each of several transformers, or a plain
    model folder.

    Raises:
        InvalidModelError: there are no weights, or description, index or a header cannot be read.
    """
    if parts := quantized_parts(path):
        return _together(path, {part.name: inspect_folder(part) for part in parts})
    form = "float"
    if is_quantized(path):
        folder = open_quantized(path)
        form = folder.format
        source, types = folder.source, folder.types
        labels = {name: types.get(name, "(no entry)") for name in source}
        keys = {key: value for key, value in folder.description.items() if key not in types}
        quant_type = str(keys.get("model_quant_type", "Unknown"))
    else:
        source, keys, quant_type = Checkpoint(path), {}, None
        labels = {name: DTYPE_NAMES[source.stored(name).dtype] for name in source}
    stored = [source.stored(name) for name in source]
    floats = [
        tensor.name.removesuffix(".weight")
        for tensor in stored
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and labels[tensor.name] == "FLOAT"
    ]
    return Inspection(
        path=path,
        format=form,
        model_quant_type=quant_type,
        files=_files(path),
        shards=dict(sorted(_tally((tensor.file.name, tensor) for tensor in stored).items())),
        types=_tally((labels[tensor.name], tensor) for tensor in stored),
        leaves=_leaves(stored, labels),
        float_linears=floats,
        global_keys=keys,
    )


def _files(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}


def _together(path: Path, parts: Mapping[str, Inspection]) -> Inspection:
    """All folders in one; names of files, linears and keys have that of their folder ahead."""
    every = list(parts.values())
    types = {part.model_quant_type for part in every if part.model_quant_type is not None}
    return Inspection(
        path=path,
        format=", ".join(sorted({part.format for part in every})),
        model_quant_type=", ".join(sorted(types)),
        files=_files(path),
        shards={f"{name}/{file}": tally for name, part in parts.items() for file, tally in part.shards.items()},
        types=_sums(part.types for part in every),
        leaves=_sums(part.leaves for part in every),
        float_linears=[f"{name}/{linear}" for name, part in parts.items() for linear in part.float_linears],
        global_keys={f"{name}/{key}": value for name, part in parts.items() for key, value in part.global_keys.items()},
    )


def _sums(tallies: Iterable[Mapping[_Key, Tally]]) -> dict[_Key, Tally]:
    sums: dict[_Key, Tally] = {}
    for tally in tallies:
        for key, one in tally.items():
            had = sums.get(key, Tally(0, 0, 0))
            sums[key] = Tally(had.tensors + one.tensors, had.modules + one.modules, had.nbytes + one.nbytes)
    return sums


def _leaves(stored: Sequence[StoredTensor], labels: Mapping[str, str]) -> dict[tuple[str, str], Tally]:
    """All tensors of a module count under the type of its weight; so does the scale of its input."""
    scaled = {tensor.name.removesuffix(MUL_SCALE) for tensor in stored if tensor.name.endswith(MUL_SCALE)}

    def of(tensor: StoredTensor) -> tuple[str, str]:
        prefix = tensor.name.rpartition(".")[0]
        if (linear := prefix.rpartition(".")[0]) in scaled:
            return linear.rpartition(".")[2], labels.get(f"{linear}{INNER}.weight", labels[tensor.name])
        return prefix.rpartition(".")[2] or tensor.name, labels.get(f"{prefix}.weight", labels[tensor.name])

    return _tally((of(tensor), tensor) for tensor in stored)


def _tally(tensors: Iterable[tuple[_Key, StoredTensor]]) -> dict[_Key, Tally]:
    counts: dict[_Key, tuple[int, int, int]] = {}
    for key, tensor in tensors:
        count, modules, nbytes = counts.get(key, (0, 0, 0))
        counts[key] = count + 1, modules + tensor.name.endswith(".weight"), nbytes + tensor.nbytes
    return {key: Tally(*numbers) for key, numbers in counts.items()}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: bool = True) -> str:
    """Columns under their heads; words to the left, numbers (all but the first columns of words) to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    words = 2 if head[0] == "module" else 1

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if right and i >= words else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in (head, *rows))

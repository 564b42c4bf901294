"""Calibration inputs as a sequence of calls, read lazily from ``calib_data.pth``, and the choice of time steps.

Reading is safe whatever the file is, see :mod:`slim_sd.captured.archive`. Files that Slim wrote have a sidecar that
says what they were captured from. Files of msModelSlim have none: their records are held against the model instead, and
those of the original Wan project translated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from slim_core.errors import InvalidDatasetError, SchemaValidateError
from slim_core.logging import get_logger
from slim_sd.captured.archive import RecordArchive, StoredTensor
from slim_sd.captured.checks import REUSE, check_structure, differences_from, read_sidecar
from slim_sd.captured.files import find_records, records_file, sidecar_file
from slim_sd.captured.pickled import DELETE
from slim_sd.captured.plain_values import check_numbers
from slim_sd.wan.records import TEXT_LENGTH, from_original, is_original

__all__ = ["Records", "find_records", "open_records", "records_file", "sidecar_file"]

_logger = get_logger(__name__)

Translate = Callable[[list[Any], str], dict[str, Any]]


class Records(Sequence[dict[str, Any]]):
    """Calls of a transformer: ``records[i]`` are the keyword arguments of call ``i``, read from the file every time.

    Tensors are on the CPU, in fresh memory that may be written to; nothing of other records stays in memory.

    Args:
        archive: the opened file.
        names: of the values of a stored record; those of the forward's arguments unless records are translated.
        translate: from a stored record, loaded or on ``meta``, to keyword arguments; by name if None.
        chosen: which records, in this order; all if None.
    """

    def __init__(
        self,
        archive: RecordArchive,
        names: Sequence[str],
        translate: Translate | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._archive = archive
        self.names = list(names)
        self._translate = translate
        self._chosen = list(range(len(archive.records))) if chosen is None else list(chosen)

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self._archive.path

    @property
    def identity(self) -> list[Any]:
        """Plain data that is different for different calls."""
        return [self._archive.digest, self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Records:
        """One call, or a part of the calls.

        Raises:
            InvalidDatasetError: a tensor holds NaN, or infinities outside of a mask.
            EnvError: the file cannot be read any more.
        """
        if isinstance(index, slice):
            return self._only(self._chosen[index])
        number = self._chosen[index]
        values = self._archive.load(self._archive.records[number])
        for name, value in zip(self.names, values, strict=True):
            _check_values(value, f"{self.path}, record {number}, argument {name}", name)
        return self._named(values, number)

    def outline(self, index: int) -> dict[str, Any]:
        """The same as ``records[index]`` with tensors on ``meta``: shapes and types, without reading data."""
        number = self._chosen[index]
        return self._named(self._archive.outline(self._archive.records[number]), number)

    def _named(self, values: list[Any], number: int) -> dict[str, Any]:
        if self._translate is not None:
            return self._translate(values, f"{self.path}, record {number}")
        return dict(zip(self.names, values, strict=True))

    def _only(self, chosen: Sequence[int]) -> Records:
        return Records(self._archive, self.names, self._translate, chosen)

    def steps(self) -> list[list[int]]:
        """Indices of calls by step: consecutive calls of equal time step, as both branches of guidance are.

        Without an argument that is the time step, every call is a step.
        """
        position = next((self.names.index(name) for name in ("timestep", "timesteps", "t") if name in self.names), None)
        groups: list[list[int]] = []
        before: Any = None
        for index, number in enumerate(self._chosen):
            now = None if position is None else self._archive.records[number][position]
            if groups and now is not None and self._equal(before, now):
                groups[-1].append(index)
            else:
                groups.append([index])
            before = now
        return groups

    def _equal(self, one: Any, other: Any) -> bool:
        if one == other:  # with equal tensors stored once, this is all it takes
            return True
        if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
            return False
        return one.dtype == other.dtype and torch.equal(self._archive.read(one), self._archive.read(other))

    def evenly(self, count: int | None) -> Records:
        """The calls of ``count`` steps, evenly spread from the first to the last.

        Args:
            count: how many steps; all if None or if there are no more. One is the one in the middle.

        Raises:
            SchemaValidateError: less than one.
        """
        if count is None:
            return self
        if count < 1:
            raise SchemaValidateError(
                f"{count} time steps of the calibration inputs are to be used",
                where="steps",
                remedy="give a number from 1 on, or none for all",
            )
        steps = self.steps()
        if count >= len(steps):
            return self
        last = len(steps) - 1
        if count == 1:
            picked = [last // 2]
        else:  # rounded to the nearest
            picked = [(2 * place * last + count - 1) // (2 * (count - 1)) for place in range(count)]
        return self._only([self._chosen[index] for step in picked for index in steps[step]])


def _check_values(value: Any, where: str, parameter: str) -> None:
    if isinstance(value, Tensor):
        check_numbers(value, where, parameter, DELETE)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(cast("Sequence[Any]", value)):
            _check_values(item, f"{where}[{index}]", parameter)
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            _check_values(item, f"{where}[{key!r}]", parameter)


def open_records(
    path: Path,
    *,
    parameters: Sequence[str],
    fingerprint: str | None,
    settings: Mapping[str, Any] | None,
    reuse: bool = False,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    text_length: int = TEXT_LENGTH,
) -> Records:
    """Open a file of calibration inputs for a transformer.

    Args:
        path: the file; its sidecar, if there is one, lies beside it.
        parameters: names of the arguments of the transformer's forward, see
            :func:`slim_sd.captured.recorder.forward_parameters`.
        fingerprint: of the model; not compared if None.
        settings: of the generation, compared with those that it was captured with; not compared if None.
        reuse: use the file though model or settings differ; a warning says what does.
        config: the transformer's configuration, for files without sidecar.
        dtype: the transformer's type, for records of the original Wan project; see
            :func:`slim_sd.wan.records.from_original`, as for ``text_length``.

    Raises:
        InvalidDatasetError: the file is damaged, does not fit the transformer, or was captured from another model or
            with other settings.
        SecurityError, UnsupportedError: see :class:`slim_sd.captured.archive.RecordArchive`.
    """
    archive = RecordArchive(path)
    names = list(parameters)
    about = read_sidecar(path, reuse)
    differences = None if about is None else differences_from(about, archive, names, fingerprint, settings)
    if differences:
        if not reuse:
            raise InvalidDatasetError(
                f"these calibration inputs are of another capture: {'; '.join(differences)}",
                where=str(path),
                remedy=REUSE,
            )
        _logger.warning("using %s although it is of another capture: %s", path, "; ".join(differences))
    if about is not None and not differences:
        return _of_arity(Records(archive, names), archive)
    if "hidden_states" in names and all(is_original(archive.outline(record[:4])) for record in archive.records):
        _logger.info("%s was captured from the original Wan project; its calls are translated", path)
        patch = cast("Sequence[int]", (config or {}).get("patch_size") or (1, 2, 2))
        translate = partial(from_original, parameters=names, patch=patch, dtype=dtype, text_length=text_length)
        longest = max(len(record) for record in archive.records)
        own = ["x", "t", "context", "seq_len", *(str(position) for position in range(4, longest))]
        records = _of_arity(Records(archive, own, translate), archive)
    else:
        if about is not None and isinstance(about.get("parameters"), list):
            names = _known_names(about["parameters"], names, path)
        records = _of_arity(Records(archive, names), archive)
    for index in range(len(records)):
        check_structure(records.outline(index), config or {}, f"{path}, record {index}")
    return records


def _of_arity(records: Records, archive: RecordArchive) -> Records:
    for index, record in enumerate(archive.records):
        if len(record) != len(records.names):
            raise InvalidDatasetError(
                f"record {index} has {len(record)} arguments, and the transformer's forward takes "
                f"{len(records.names)}: {', '.join(records.names)}",
                where=str(archive.path),
                remedy=f"it was captured from another transformer or version of diffusers: {DELETE}",
            )
    return records


def _known_names(captured: list[Any], names: list[str], path: Path) -> list[str]:
    """The names a file was captured with, if the transformer still takes all of them."""
    if unknown := [str(name) for name in captured if name not in names]:
        raise InvalidDatasetError(
            f"the captured calls have arguments that the transformer does not take: {', '.join(unknown)}",
            where=str(path),
            remedy=DELETE,
        )
    return [str(name) for name in captured]

"""What samples need to go on from the boundary between two units, kept on disk while a run lasts, for ``--resume``.

A resumed run starts the model's own forward of every sample again. It gives it the outputs of earlier blocks that it
still needs, which are here, and zeros of the right shape for the others; so it arrives where it was without running a
block. ``activations/<stop>/<sample>.safetensors`` is what the block or tower at a stop gave for a sample, and
``rank-R-of-N.json`` beside them says that all samples of a rank are there.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from slim_core.logging import get_logger
from slim_core.model.suspended import BlockCall
from slim_core.ranks.group import Ranks

__all__ = ["FOLDER", "Boundaries", "Boundary", "keys_of", "last_boundary"]

FOLDER = "activations"
# Of the time of a run, so much may be spent on it; what costs more is kept less often.
_SHARE = 0.03
_SAMPLED = 4096
_WITNESS = "witness"
_logger = get_logger(__name__)
_library: Any = safetensors.torch
_NO_OUTPUT = -1


class _Leaf(BaseModel):
    """A tensor, by dtype and shape, or a value."""

    dtype: str | None = None
    shape: tuple[int, ...] = ()
    value: bool | int | float | str | None = None


class _Form(BaseModel):
    """How an output is made up: a tree as pytorch writes it, and its leaves."""

    tree: str
    leaves: tuple[_Leaf, ...]


class _Note(BaseModel):
    """What a rank says of a stop once all its samples have passed: see :class:`Boundary`."""

    needed: tuple[int, ...]
    forms: tuple[_Form, ...]
    outputs: dict[str, list[int]]
    sums: dict[str, int]
    checks: dict[str, int]


def keys_of(numbers: Sequence[int], streams: int, extra: int, *, first: bool) -> list[str]:
    """The names of what is carried through the blocks: samples, stream by stream, extra samples, and the witness.

    Args:
        numbers: of the samples of this rank, among all.
        first: whether this is the first rank. What every rank carries is kept by the first alone, and is nameless on
            the others.
    """
    own = [f"{number}.{stream}" for stream in range(streams) for number in numbers]
    return [*own, *(f"extra-{number}" if first else "" for number in range(extra)), _WITNESS if first else ""]


class _NotKeepableError(Exception):
    """Something is no plain data."""


class _DamagedError(Exception):
    """A file does not hold what was written to it."""


@dataclass(frozen=True)
class Boundary:
    """A boundary that an interrupted run has kept.

    Args:
        stop: the block or tower that comes next.
        needed: the stops ahead of it whose outputs are on disk.
        forms: the different forms of outputs.
        outputs: by key and stop, the number of the form.
        sums: by needed stop and key, the checksum of what is on disk.
        checks: by key, a checksum of some of what the next block was given.
    """

    folder: Path
    stop: int
    needed: tuple[int, ...]
    forms: tuple[_Form, ...]
    outputs: Mapping[str, Sequence[int]]
    sums: Mapping[int, Mapping[str, int]]
    checks: Mapping[str, int]

    def output(self, key: str, stop: int) -> Any:
        """What a block or tower gave for a sample, or zeros of its shape.

        Raises:
            OSError, SafetensorError, _DamagedError: the file is gone or damaged.
        """
        form = self.forms[self.outputs[key][stop]]
        kept = _library.load_file(self.folder / str(stop) / f"{key}.safetensors") if stop in self.needed else None
        if kept is not None and _sum(kept) != self.sums[stop][key]:
            raise _DamagedError(f"what stop {stop} gave is not what was written")
        values: list[Any] = []
        for at, leaf in enumerate(form.leaves):
            if leaf.dtype is None:
                values.append(leaf.value)
            elif kept is not None:
                values.append(kept[str(at)])
            else:
                values.append(torch.zeros(leaf.shape, dtype=getattr(torch, leaf.dtype)))
        return pytree.tree_unflatten(values, pytree.treespec_loads(form.tree))

    def agrees(self, key: str, call: BlockCall) -> bool:
        """Whether the next block is given what it was given then."""
        return self.checks.get(key, found := _checksum(call)) == found


def last_boundary(folder: Path, keys: Collection[str], limit: int) -> Boundary | None:
    """The last boundary ahead of a stop, or right there, that an interrupted run has kept of everything it carried.

    Args:
        folder: of the run.
        keys: of everything that all ranks carry.
    """
    root = folder / FOLDER
    stops = [int(entry.name) for entry in root.iterdir() if entry.name.isdecimal()] if root.is_dir() else []
    for stop in sorted((stop for stop in stops if stop < limit), reverse=True):
        notes = _notes(root / str(stop))
        if notes is None:
            continue
        forms: list[_Form] = []
        outputs: dict[str, list[int]] = {}
        checks: dict[str, int] = {}
        for note in notes:
            first = len(forms)
            forms += note.forms
            checks |= note.checks
            for key, numbers in note.outputs.items():
                outputs[key] = [number if number == _NO_OUTPUT else first + number for number in numbers]
        needed = notes[0].needed
        sums = {other: _sums(root / str(other)) for other in needed}
        if set(keys) <= outputs.keys() and all(sums.values()):
            return Boundary(root, stop + 1, needed, tuple(forms), outputs, sums, checks)
    return None


def _notes(folder: Path) -> list[_Note] | None:
    """What all ranks of a run have noted of a stop; None if one of them had not got that far, or it is damaged."""
    for path in sorted(folder.glob("rank-0-of-*.json")):
        size = int(path.stem.rpartition("-")[2])
        paths = [folder / f"rank-{rank}-of-{size}.json" for rank in range(size)]
        with suppress(OSError, ValidationError):
            return [_Note.model_validate_json(other.read_bytes()) for other in paths]
    return None


def _sums(folder: Path) -> dict[str, int]:
    """By key, the checksum of what a stop gave; empty if not all ranks had noted it."""
    return {key: found for note in _notes(folder) or () for key, found in note.sums.items()}


@dataclass
class Boundaries:
    """Keeps boundaries while a run goes on.

    Args:
        folder: of the run.
        keys: of what this rank carries, in its order; what has no name another rank keeps.
        names: of the units that run, by stop.
        finished: the units that are written; what they would need again is removed.
        always: how many of the first stops are kept whatever it costs.
        needed: tells which outputs are in use once the samples have passed the stop ahead of another one.
    """

    folder: Path
    keys: list[str]
    ranks: Ranks
    names: Sequence[str]
    finished: Sequence[str]
    always: int
    needed: Callable[[int], Sequence[int]]
    _forms: list[_Form] = field(default_factory=list[_Form])
    _numbers: dict[str, int] = field(default_factory=dict[str, int])  # by form
    _outputs: dict[str, list[int]] = field(default_factory=dict[str, "list[int]"])
    _sums: dict[str, int] = field(default_factory=dict[str, int])
    _checks: dict[str, int] = field(default_factory=dict[str, int])
    _kept: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    _began: float = field(default_factory=time.monotonic)
    _spent: float = 0.0
    _last: float = 0.0
    _off: bool = False

    def __post_init__(self) -> None:
        self._stop, self._keeping = 0, False

    def go_on(self, boundary: Boundary) -> None:
        """Take over what an interrupted run has kept."""
        self._forms = list(boundary.forms)
        self._numbers = {form.model_dump_json(): number for number, form in enumerate(self._forms)}
        self._outputs = {key: list(boundary.outputs[key]) for key in self.keys if key}
        self._kept = dict.fromkeys(boundary.needed, boundary.needed)

    @contextmanager
    def at(self, stop: int) -> Generator[None]:
        """The samples pass a stop within this context, each by :meth:`take` and :meth:`taken`."""
        self._stop, self._keeping, self._sums, self._checks = stop, False, {}, {}
        yield
        if self._keeping:
            self._timed(self._note)

    def decide(self) -> None:
        """See whether what comes after the stop is kept; the witness has passed it."""
        needed = tuple(self.needed(self._stop + 1))
        spared = self._spent + self._last <= _SHARE * (time.monotonic() - self._began)
        known = all(stop in self._kept for stop in needed if stop != self._stop)
        keeps = not self._off and known and (spared or self._stop < self.always)
        self._keeping = self.ranks.broadcast(keeps, 0, "the decision on activations") and not self._off
        if self._keeping and self.ranks.first:
            self._tidy()
        if self._keeping:
            self._last = 0.0
            self._kept[self._stop] = needed
            self._timed(lambda: self._here.mkdir(parents=True, exist_ok=True))

    @property
    def _here(self) -> Path:
        return self.folder / FOLDER / str(self._stop)

    def take(self, index: int, output: Any) -> None:
        """What the stop gave for a sample."""
        key = self.keys[index]
        if not key or self._off:
            return
        try:
            leaves, form = _form_of(output)
        except _NotKeepableError as error:
            self._give_up(f"an output of {self.names[self._stop]} is no plain data: {error}")
            return
        text = form.model_dump_json()
        if text not in self._numbers:
            self._numbers[text] = len(self._forms)
            self._forms.append(form)
        known = self._outputs.setdefault(key, [])
        known += [_NO_OUTPUT] * (self._stop - len(known))
        known.append(self._numbers[text])
        if self._keeping:
            self._timed(lambda: self._save(key, leaves))

    def _save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        plain = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        _write(self._here / f"{key}.safetensors", plain)
        self._sums[key] = _sum(plain)

    def forget(self, index: int) -> None:
        """A sample is no longer carried."""
        self._outputs.pop(self.keys[index], None)
        self.keys[index] = ""

    def taken(self, index: int, call: BlockCall) -> None:
        """The call at which a sample waits now."""
        if self._keeping and self.keys[index]:
            self._checks[self.keys[index]] = _checksum(call)

    def _note(self) -> None:
        needed = self._kept[self._stop]
        for key in filter(None, self.keys):
            known = self._outputs.setdefault(key, [])
            known += [_NO_OUTPUT] * (self._stop + 1 - len(known))
            last = max((stop for stop, number in enumerate(known) if number != _NO_OUTPUT), default=None)
            if last is not None and last not in needed:  # unlike the witness, this sample has passed the stop by
                del self._kept[self._stop]
                shutil.rmtree(self._here, ignore_errors=True)
                return
        note = _Note(
            needed=needed, forms=tuple(self._forms), outputs=self._outputs, sums=self._sums, checks=self._checks
        )
        path = self._here / f"rank-{self.ranks.rank}-of-{self.ranks.size}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(note.model_dump_json(), "utf-8")
        os.replace(partial, path)
        if self.ranks.first:
            self._tidy()

    def _tidy(self) -> None:
        """Remove what is older than the last boundary from which no finished unit would be lost."""
        root, finished = self.folder / FOLDER, set(self.finished)
        complete = [
            stop for stop in self._kept if self.names[stop] in finished and _notes(root / str(stop)) is not None
        ]
        if not complete:
            return
        safe = max(complete)
        used = {other for stop, needed in self._kept.items() if stop >= safe for other in needed}
        for stop in [stop for stop in self._kept if stop not in used and stop < safe]:
            del self._kept[stop]
            shutil.rmtree(root / str(stop), ignore_errors=True)

    def _timed(self, action: Callable[[], None]) -> None:
        """Do something that takes time; nothing depends on its success."""
        began = time.monotonic()
        try:
            action()
        except (OSError, SafetensorError) as error:
            self._give_up(str(error))
        seconds = time.monotonic() - began
        self._spent, self._last = self._spent + seconds, self._last + seconds

    def _give_up(self, why: str) -> None:
        _logger.debug("activations are not kept any more, so --resume would run finished blocks again: %s", why)
        self._off, self._keeping = True, False
        shutil.rmtree(self._here, ignore_errors=True)


def _form_of(output: Any) -> tuple[dict[str, Tensor], _Form]:
    """The tensors of an output, and all else about it as plain data."""
    leaves, spec = pytree.tree_flatten(output)
    tensors: dict[str, Tensor] = {}
    described: list[_Leaf] = []
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and not leaf.is_complex():  # which safetensors has no name for
            tensors[str(at)] = leaf
            described.append(_Leaf(dtype=str(leaf.dtype).removeprefix("torch."), shape=tuple(leaf.shape)))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append(_Leaf(value=leaf))
        else:
            raise _NotKeepableError(type(leaf).__name__)
    try:
        return tensors, _Form(tree=pytree.treespec_dumps(spec), leaves=tuple(described))
    except (NotImplementedError, TypeError, ValueError) as error:  # a container that pytorch knows no name for
        raise _NotKeepableError(str(error)) from error


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of one output so that the file is whole if it is there."""
    partial = path.with_suffix(".partial")
    _library.save_file(dict(tensors), partial)
    os.replace(partial, path)


def _sum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of contiguous tensors, by the order of their names."""
    found = 0
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _checksum(call: BlockCall) -> int:
    """Of some numbers of every tensor that a block is given."""
    found = 0
    for tensor in _tensors((call.args, call.kwargs)):
        step = max(1, tensor.numel() // _SAMPLED)
        some = torch.take(tensor, torch.arange(0, tensor.numel(), step, device=tensor.device)).cpu()
        found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), found)
    return found


def _tensors(value: Any) -> Iterable[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.numel():
            plain = leaf.detach()
            yield torch.view_as_real(plain) if plain.is_complex() else plain

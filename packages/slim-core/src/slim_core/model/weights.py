"""The parameters of a unit as processors leave them: those of the checkpoint, rescaled or replaced.

Nothing is computed until it is read. A weight that was rescaled is still read from the file row by row and multiplied
on the way, in float32, so it is rounded once: when it is quantized or written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slim_core.checkpoint.source import LazyTensor, PassingTensor, TensorMeta, TensorSource
from slim_core.errors import UnexpectedError
from slim_core.model.inputs import MUL_SCALE, scale_input
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit

__all__ = ["Edit", "UnitWeights", "WeightView"]

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of one parameter: multiply its rows, multiply its columns, or put a value in its place.

    Args:
        parameter: name of the parameter in the model; with ``value`` it may be one that the model does not have.
        rows: float32 ``(out,)``.
        columns: float32 ``(in,)``, for matrices.
        value: float32, of the parameter's shape.
    """

    parameter: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class WeightView:
    """One parameter as it is now, not yet read.

    Args:
        meta: the name of its tensor, its shape, and the dtype it is written in.
        base: where it is stored; None if it was replaced or added.
        value: float32, what it was replaced by.
        row_factor, column_factor: float32, what it is multiplied by.
    """

    meta: TensorMeta
    base: LazyTensor | None = None
    value: Tensor | None = None
    row_factor: Tensor | None = None
    column_factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.meta.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @property
    def edited(self) -> bool:
        """Whether it differs from what is stored."""
        return self.value is not None or self.row_factor is not None or self.column_factor is not None

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows: as stored if nothing was edited (never write to them), else a new float32 tensor."""
        stored = self.value[start:stop] if self.value is not None else self._base().rows(start, stop)
        if self.row_factor is None and self.column_factor is None:
            return stored
        result = stored.to(torch.float32, copy=True)
        if self.row_factor is not None:
            result *= self.row_factor[start:stop].view(-1, *[1] * (result.dim() - 1))
        if self.column_factor is not None:
            result *= self.column_factor
        return result

    def load(self) -> Tensor:
        """The whole of it, by the rules of :meth:`rows`."""
        if self.edited:
            return self.rows(0, self.shape[0])
        return self._base().load()

    def stored_form(self) -> Tensor:
        """The whole of it in the dtype it is written in, rounded once; computed a few rows at a time."""
        if not self.edited:
            return self._base().load()
        result = torch.empty(self.shape, dtype=self.dtype)
        width = max(1, self.meta.numel // max(self.shape[0], 1)) if self.shape else 1
        step = max(1, _BLOCK_ELEMENTS // width)
        for start in range(0, self.shape[0], step):
            result[start : start + step].copy_(self.rows(start, min(start + step, self.shape[0])))
        return result

    def release(self) -> None:
        """Give the memory of the mapped file back."""
        if self.base is not None:
            self.base.release()

    def _base(self) -> LazyTensor:
        if self.base is None:
            raise UnexpectedError("the parameter has no value", where=self.meta.name)
        return self.base


class UnitWeights:
    """All parameters of a unit, those that it was given in addition included once they have a value.

    Args:
        live: whether the unit's module holds its parameters, so that edits must reach it too; else they are read in
            passing, a few rows at a time in memory.
        device: where the module is.
        deferred: parameters that the module holds only now and then; who gives them to it asks :meth:`hand_over`.
        source: where to read the parameters, if not from the model's source.
    """

    def __init__(
        self,
        model: StreamedModel,
        unit: Unit,
        *,
        live: bool = False,
        device: torch.device | None = None,
        deferred: Collection[str] = (),
        source: TensorSource | None = None,
    ) -> None:
        self._model = model
        self.live = live
        self._deferred = deferred
        self._device = device or torch.device("cpu")
        tensor = LazyTensor if live else PassingTensor
        self._views = {
            name: WeightView(model.source.meta(stored), tensor(source or model.source, model.source.meta(stored)))
            for name, stored in unit.parameters.items()
        }
        self._added = unit.added

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._views

    def __getitem__(self, parameter: str) -> WeightView:
        return self._views[parameter]

    def edited(self) -> Iterator[tuple[str, WeightView]]:
        """The parameters that are no longer what the checkpoint has, or were added."""
        return ((name, view) for name, view in self._views.items() if view.edited)

    def apply(self, edits: Iterable[Edit]) -> None:
        """Make changes that belong together: all of them, or none if one of them fails.

        Raises:
            UnexpectedError: a parameter is unknown, or a factor or value has the wrong shape.
        """
        changed: dict[str, WeightView] = {}
        for edit in edits:
            view = changed.get(edit.parameter) or self._views.get(edit.parameter) or self._new(edit.parameter)
            changed[edit.parameter] = _edited(view, edit)
        before = self._views
        self._views = before | changed
        held = [name for name in changed if name not in self._deferred] if self.live else []
        try:
            for name in held:
                self.hand_over(name)
        except BaseException:
            self._views = before
            for name in held:
                self.hand_over(name)
            raise

    def hand_over(self, name: str) -> None:
        """Give the module a parameter as it is now; none if it has no value yet."""
        if name.endswith(MUL_SCALE):
            factor = self._views[name].stored_form().to(self._device) if name in self._views else None
            scale_input(self._model.module.get_submodule(name.removesuffix(MUL_SCALE)), factor)
            return
        path, _, leaf = name.rpartition(".")
        if name in self._added and leaf != "bias":
            return  # it lies beside the module in the files, and is applied by who knows of it
        module = self._model.module.get_submodule(path)
        view = self._views.get(name)
        if view is None:
            setattr(module, leaf, None)
            return
        value = view.stored_form().to(self._device)
        if name in self._added and leaf == "bias":
            value = value.to(module.get_parameter("weight").dtype)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def fill(self) -> None:
        """Make the biases zero, and the scales of inputs one, that were added but that nothing has been done to."""
        made = {".bias": torch.zeros, MUL_SCALE: torch.ones}
        self.apply(
            Edit(name, value=make(meta.shape))
            for name, meta in self._added.items()
            for suffix, make in made.items()
            if name not in self._views and name.endswith(suffix)
        )

    def _new(self, parameter: str) -> WeightView:
        if parameter not in self._added:
            raise UnexpectedError("the unit has no such parameter", where=parameter)
        return WeightView(self._added[parameter])


def _edited(view: WeightView, edit: Edit) -> WeightView:
    shape = view.shape
    if edit.value is not None:
        if tuple(edit.value.shape) != shape:
            raise UnexpectedError(f"is given {list(edit.value.shape)} values, has {list(shape)}", where=edit.parameter)
        view = replace(view, value=edit.value.float(), row_factor=None, column_factor=None)
    for attribute, factor, size in (
        ("row_factor", edit.rows, shape[0] if shape else 0),
        ("column_factor", edit.columns, shape[-1] if len(shape) > 1 else 0),
    ):
        if factor is None:
            continue
        if tuple(factor.shape) != (size,):
            raise UnexpectedError(
                f"{attribute} has shape {list(factor.shape)}, expected {[size]}", where=edit.parameter
            )
        before = getattr(view, attribute)
        view = replace(view, **{attribute: factor.float() if before is None else before * factor.float()})
    return view

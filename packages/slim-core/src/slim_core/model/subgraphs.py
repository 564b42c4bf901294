"""Places of a block where a scale can move from one weight to another without changing what the block computes.

================  ===================================  =========================================
type              source, divided by the scale         targets, multiplied by it
================  ===================================  =========================================
``norm-linear``   the weight (and bias) of a norm      every matrix that reads its output
``ov``            the value rows of a projection       the attention's output projection
``up-down``       the up rows of an MLP                its down projection
``linear-linear`` the rows of a linear                 the linear that reads its output
``norm-linear``   none: the input itself is divided    linears that read the same input
================  ===================================  =========================================

The last is called *non-fusion*: its input is divided while the model runs.

Candidates come from the names and shapes that decoders share, or from an adapter; whether one holds is not believed but
proved on the block itself (:mod:`slim_core.model.probing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.skeleton import named_modules

__all__ = ["NON_FUSION", "PRIORITY", "SUBGRAPH_TYPES", "GivenSubgraph", "Subgraph", "candidates", "is_norm"]

SUBGRAPH_TYPES = ("norm-linear", "linear-linear", "ov", "up-down")
NON_FUSION = "non-fusion"
PRIORITY = {"up-down": 0, "ov": 1, "linear-linear": 2, "norm-linear": 3}
"""The order in which they are smoothed: a source's rows change before the columns of the same matrix are measured."""

_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj")
_VALUES = ("v_proj", "wv", "value")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "qkv", "W_pack")
_UPS = ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h")
_GATED_UPS = ("gate_up_proj", "gate_up")
_DOWNS = ("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h")


@dataclass(frozen=True, eq=False)
class Subgraph:
    """One such place.

    Args:
        type: one of :data:`SUBGRAPH_TYPES`.
        source: module name of the norm or linear whose output channels are divided. Empty where there is none to fold
            the scale into (*non-fusion*): what the targets are given is then divided while the model runs.
        targets: module names of the matrices whose input columns are multiplied; all read the same channels.
        columns: int64 ``(in,)``: which of the shared scales each input column of a target belongs to.
        rows: int64 ``(scales,)``: the row of the source's weight that each scale divides; None if it is a norm.
        plus_one: the norm multiplies by ``1 + weight``.
        head_dim: of ``ov``, how many scales belong to a head.
        direct: of ``norm-linear``, whether targets are given what the norm makes as it is, so that it may also be
            shifted; a gate in between lets scales pass, but no shift.
    """

    type: str
    source: str
    targets: tuple[str, ...]
    columns: Tensor
    rows: Tensor | None = None
    plus_one: bool = False
    head_dim: int = 0
    direct: bool = False

    @property
    def name(self) -> str:
        """What it goes by in patterns, notes and reports: its source, or its first target where it has none."""
        return self.source or self.targets[0]

    @property
    def label(self) -> str:
        """Its type, or ``non-fusion`` where nothing is folded."""
        return self.type if self.source else NON_FUSION

    @property
    def scales(self) -> int:
        """How many scales are shared between source and targets."""
        return int(self.columns.max()) + 1 if self.columns.numel() else 0

    def spread(self, scale: Tensor) -> Tensor:
        """The scale of every input column ``(in,)`` from the shared ones ``(scales,)``."""
        return scale[self.columns.to(scale.device)]

    def gather(self, values: Tensor, reduce: str) -> Tensor:
        """One value per shared scale ``(scales,)`` from one per input column ``(in,)``: the largest, or the mean.

        Args:
            reduce: ``amax`` or ``mean``.
        """
        start = torch.zeros(self.scales, dtype=values.dtype, device=values.device)
        return start.scatter_reduce(0, self.columns.to(values.device), values, reduce, include_self=False)


@dataclass(frozen=True)
class GivenSubgraph:
    """A subgraph between two linears that their names do not tell; it is proved like any other.

    It stands wherever in a block both are found below one module, and takes the place of what the name of the source
    suggests there.

    Args:
        type: ``ov``, ``up-down`` or ``linear-linear``. Norms need no telling: their readers are found by running.
        source, target: names of the two linears below that module, e.g. ``value`` and ``out``.
        first_row: the row of the source in which the channels begin.
        channels: how many there are; 0 for all rows that follow.
        head_dim: of ``ov``, channels of a head.
    """

    type: str
    source: str
    target: str
    first_row: int = 0
    channels: int = 0
    head_dim: int = 0

    def below(self, path: str, parent: nn.Module) -> Subgraph | None:
        """The subgraph below a module; None if it does not have the two linears.

        Raises:
            UnsupportedError: their shapes do not fit together.
        """
        modules = dict(named_modules(parent))
        source, target = modules.get(self.source), modules.get(self.target)
        if not isinstance(source, nn.Linear) or not isinstance(target, nn.Linear):
            return None
        width, channels = target.in_features, self.channels or source.out_features - self.first_row
        head = self.head_dim or channels
        fits = 0 < channels <= source.out_features - self.first_row and not width % channels and not channels % head
        fits = fits and (self.type == "ov" or channels == width)
        if self.type not in SUBGRAPH_TYPES or self.type == "norm-linear" or not fits:
            raise UnsupportedError(
                f"{channels} rows of {source.out_features} from {self.first_row} on, in heads of {head}, are no "
                f"{self.type} source for {path}.{self.target} with {width} columns",
                where=f"{path}.{self.source}",
                remedy="correct the subgraph that the model's adapter gives",
            )
        columns = _repeated(channels, head, width) if self.type == "ov" else torch.arange(width)
        rows = torch.arange(self.first_row, self.first_row + channels)
        return Subgraph(
            self.type, f"{path}.{self.source}", (f"{path}.{self.target}",), columns, rows, head_dim=self.head_dim
        )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with a weight per channel."""
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def candidates(root: nn.Module, block: str, given: Sequence[GivenSubgraph] = ()) -> list[list[Subgraph]]:
    """The subgraphs between linears that a block may have, from names and shapes alone.

    Args:
        root: the model; parameters may be on ``meta``.
        block: dotted name of the block.
        given: what an adapter adds or corrects.

    Returns:
        For each place the possible layouts, most common first; at most one of them holds.

    Raises:
        UnsupportedError: what is given does not fit the block.
    """
    told: dict[str, list[Subgraph]] = {}
    found: list[list[Subgraph]] = []
    for name, parent in named_modules(root.get_submodule(block)):
        path = f"{block}.{name}" if name else block
        told |= {graph.source: [graph] for one in given if (graph := one.below(path, parent)) is not None}
        linears = {leaf: child for leaf, child in parent.named_children() if isinstance(child, nn.Linear)}
        found += [options for options in (_value_output(path, parent, linears), _up_down(path, linears)) if options]
    return [*told.values(), *(options for options in found if options[0].source not in told)]


def _first(linears: dict[str, nn.Linear], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in linears), None)


def _value_output(path: str, parent: nn.Module, linears: dict[str, nn.Linear]) -> list[Subgraph]:
    out = _first(linears, _OUTPUTS)
    if out is None:
        return []
    width = linears[out].in_features
    if "kv_b_proj" in linears:
        return _mla(path, parent, linears["kv_b_proj"], width, f"{path}.{out}")
    if value := _first(linears, _VALUES):
        return list(_grouped(path, parent, linears[value].out_features, width, f"{path}.{value}", f"{path}.{out}"))
    if fused := _first(linears, _FUSED):
        return list(_fused(path, parent, linears[fused].out_features, width, f"{path}.{fused}", f"{path}.{out}"))
    return []


def _setting(module: nn.Module, *names: str) -> int | None:
    """A number that an attention module (or its configuration) knows itself by."""
    config: Any = getattr(module, "config", None)
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _head_dim(module: nn.Module, width: int) -> int | None:
    """Width of a head, given that of all query heads."""
    if (known := _setting(module, "head_dim", "head_size")) is not None and width % known == 0:
        return known
    heads = _setting(module, "num_heads", "num_attention_heads", "n_heads", "n_head")
    return width // heads if heads and width % heads == 0 else None


def _repeated(kv: int, head_dim: int, width: int) -> Tensor:
    """Which value channel each input column of the output projection comes from: heads of a group are neighbours."""
    column = torch.arange(width)
    group = column // head_dim // (width // kv)
    return group * head_dim + column % head_dim


def _grouped(path: str, parent: nn.Module, kv: int, width: int, source: str, target: str) -> Iterator[Subgraph]:
    if kv == 0 or width % kv:
        return
    head_dim = kv if kv == width else _head_dim(parent, width)
    if head_dim is not None and kv % head_dim == 0:
        columns = _repeated(kv, head_dim, width)
        known = _head_dim(parent, width) or head_dim
        yield Subgraph("ov", source, (target,), columns, torch.arange(kv), head_dim=known)


def _fused(path: str, parent: nn.Module, out: int, width: int, source: str, target: str) -> Iterator[Subgraph]:
    """Value rows in the layouts ``[Q | K | V]`` and, for every group of heads, ``[queries, key, value]``."""
    head_dim = _head_dim(parent, width)
    if head_dim is None or (out - width) % (2 * head_dim) or out <= width:
        return
    kv = (out - width) // 2
    if width % kv:
        return
    columns = _repeated(kv, head_dim, width)
    yield Subgraph("ov", source, (target,), columns, torch.arange(out - kv, out), head_dim=head_dim)
    groups, channel = kv // head_dim, torch.arange(kv)
    size = out // groups
    rows = channel // head_dim * size + size - head_dim + channel % head_dim
    yield Subgraph("ov", source, (target,), columns, rows, head_dim=head_dim)


def _mla(path: str, parent: nn.Module, source: nn.Linear, width: int, target: str) -> list[Subgraph]:
    """Value rows of ``kv_b_proj``, whose heads are ``[key without position | value]``."""
    nope, value = _setting(parent, "qk_nope_head_dim"), _setting(parent, "v_head_dim")
    if not nope or not value or width % value or source.out_features != width // value * (nope + value):
        return []
    channel = torch.arange(width)
    rows = channel // value * (nope + value) + nope + channel % value
    return [Subgraph("ov", f"{path}.kv_b_proj", (target,), channel, rows, head_dim=value)]


def _up_down(path: str, linears: dict[str, nn.Linear]) -> list[Subgraph]:
    down = _first(linears, _DOWNS)
    if down is None:
        return []
    width = linears[down].in_features
    channel = torch.arange(width)
    up, gated = _first(linears, _UPS), _first(linears, _GATED_UPS)
    if up and linears[up].out_features == width:
        return [Subgraph("up-down", f"{path}.{up}", (f"{path}.{down}",), channel, channel)]
    if gated and linears[gated].out_features == 2 * width:
        rows = (channel + width, channel, 2 * channel + 1)
        return [Subgraph("up-down", f"{path}.{gated}", (f"{path}.{down}",), channel, row) for row in rows]
    return []

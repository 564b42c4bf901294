"""Places of an attention where a scale can move from its keys to its queries, so that their products stay the same.

Keys are divided and queries multiplied where they are made: in the weight of the norm that they pass, or else in the
rows of their projection. Rotary embedding (RoFormer, arXiv 2104.09864) mixes pairs of channels afterwards, which must
then have one scale. Which channels are pairs differs between models: they lie half of the rotated part apart or side by
side, and the rotated part may be the whole head, its beginning, or nothing. As with other subgraphs the layout is not
looked up but proved on the block: with random powers of two the keys must come out divided channel by channel, and the
block's output must stay as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from slim_core.errors import SpecError
from slim_core.model.attention import AttentionInfo
from slim_core.model.changes import changed, enlarging
from slim_core.model.streamed import StreamedModel

__all__ = ["KeyFindings", "QueryKey", "Side", "find_query_key", "query_key_candidates"]

_PROJECTIONS = ("{}_proj", "w{}")
_NORMS = ("{}_norm", "{}_layernorm", "{}_ln")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "qkv", "W_pack")
_FACTORS = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
_DRAWS = 3
_TOLERANCE = 1e-4
# A (1 + weight) norm has float32 weights while it is probed; still, now and then 16 bits round the other way.
_TOLERANCE_OF_ROUNDED = 0.02


@dataclass(frozen=True, eq=False)
class Side:
    """What makes the keys, or the queries.

    Args:
        module: name of the norm or projection.
        rows: int64 ``(heads * dim,)``: the row of its weight (of a norm: the element) behind each channel.
        norm: whether it is a norm.
        plus_one: the norm multiplies by ``1 + weight``.
    """

    module: str
    rows: Tensor
    norm: bool = False
    plus_one: bool = False

    def multiplied(self, part: str, value: Tensor, channels: Tensor) -> Tensor:
        """``weight`` or ``bias`` in float32, so changed that the channels come out multiplied.

        Args:
            part: which of both it is.
            channels: float32 ``(heads * dim,)``.
        """
        factor = torch.ones(value.numel() if self.norm else value.shape[0])
        factor[self.rows] = channels
        factor = factor.view(value.shape if self.norm else (-1, *[1] * (value.dim() - 1)))
        one = float(self.plus_one and part == "weight")
        return (value.float() + one) * factor - one


@dataclass(frozen=True, eq=False)
class QueryKey:
    """One such place. States are ordered head by head.

    Args:
        attention: name of the attention module.
        key, query: what makes them; the same module if they are fused.
        kv_heads, heads, dim: heads of the key and of the query, and channels of each.
        channels: int64 ``(kv_heads * dim,)``: which of the shared scales each channel of the key belongs to.
    """

    attention: str
    key: Side
    query: Side
    kv_heads: int
    heads: int
    dim: int
    channels: Tensor

    @property
    def scales(self) -> int:
        """How many scales there are."""
        return int(self.channels.max()) + 1

    def of_keys(self, scale: Tensor) -> Tensor:
        """The scale of every key channel ``(kv_heads * dim,)`` from the shared ones ``(scales,)``."""
        return scale[self.channels]

    def of_queries(self, scale: Tensor) -> Tensor:
        """The scale of every query channel ``(heads * dim,)``: that of the key head which its head looks at."""
        keys = self.of_keys(scale).view(self.kv_heads, 1, self.dim)
        return keys.expand(-1, self.heads // self.kv_heads, -1).reshape(-1)


@dataclass
class KeyFindings:
    """The places of a unit that were proved, and of its other attentions the reason why nothing can be moved."""

    found: list[QueryKey] = field(default_factory=list[QueryKey])
    refused: dict[str, str] = field(default_factory=dict[str, str])


def find_query_key(model: StreamedModel, info: AttentionInfo, run: Callable[[], Tensor]) -> QueryKey | str:
    """The proved place of an attention whose block is loaded, or the reason why there is none.

    Args:
        run: runs the block on one sample and returns its hidden states; always the same sample.
    """
    if info.latent:
        return "it caches a compressed latent that has no keys to scale"
    if info.problem:
        return info.problem
    if info.shared:
        return "later layers take over its keys, with queries of their own"
    candidates = list(query_key_candidates(model.module, info))
    if not candidates:
        return "what makes its keys and queries is not known by name, or has another shape"
    try:
        probe = _Probe(model, info, run)
        candidates = [replace(one, key=probe.seen(one.key), query=probe.seen(one.query)) for one in candidates]
        proved = next((candidate for candidate in candidates if probe.holds(candidate)), None)
    except SpecError as error:
        return error.what
    return proved or "no way to scale its keys and queries against each other leaves the block's output as it was"


def query_key_candidates(root: nn.Module, info: AttentionInfo) -> Iterator[QueryKey]:
    """Where and how the scale of an attention may move, from names and shapes alone; those with the most scales first.

    Args:
        root: the model; parameters may be on ``meta``.
    """
    parent = root.get_submodule(info.name)
    for key, query in zip(_sources(parent, info, "k"), _sources(parent, info, "q"), strict=False):
        by_head = not any(_repeats(side.rows) for side in (key, query))  # else one norm is for all heads
        heads = torch.arange(info.kv_heads) if by_head else torch.zeros(info.kv_heads, dtype=torch.int64)
        for pairing in _pairings(parent, info.key_dim):
            channels = (heads.unsqueeze(1) * (int(pairing.max()) + 1) + pairing).reshape(-1)
            yield QueryKey(info.name, key, query, info.kv_heads, info.heads, info.key_dim, channels)


def _repeats(rows: Tensor) -> bool:
    return int(torch.bincount(rows).max()) > 1


def _sources(parent: nn.Module, info: AttentionInfo, letter: str) -> Iterator[Side]:
    """What may make the keys (``k``) or queries (``q``)."""
    heads, dim = (info.heads if letter == "q" else info.kv_heads), info.key_dim
    every = torch.arange(heads * dim)
    children = dict(parent.named_children())
    long = {"q": "query", "k": "key"}[letter]
    for leaf in (*(name.format(letter) for name in _NORMS), *(name.format(long) for name in _NORMS)):
        weight = getattr(children.get(leaf), "weight", None)
        if weight is not None and weight.numel() in (dim, heads * dim):
            rows = every if weight.numel() == heads * dim else every % dim
            yield Side(f"{info.name}.{leaf}", rows, norm=True)
            return
    projection = next((found for name in _PROJECTIONS if (found := name.format(letter)) in children), None)
    if projection is not None:
        if _features(children[projection]) == heads * dim:
            yield Side(f"{info.name}.{projection}", every)
        return
    fused = next((name for name in _FUSED if name in children), None)
    if fused is not None and _features(children[fused]) == (info.heads + 2 * info.kv_heads) * dim:
        yield Side(f"{info.name}.{fused}", every + (0 if letter == "q" else info.heads * dim))  # [Q | K | V]
        group = info.heads // info.kv_heads  # for every key head [queries, key, value]
        head, inside = (every // dim, group) if letter == "k" else (every // dim // group, every // dim % group)
        yield Side(f"{info.name}.{fused}", (head * (group + 2) + inside) * dim + every % dim)


def _features(module: nn.Module) -> int | None:
    return module.out_features if isinstance(module, nn.Linear) else None


def _pairings(parent: nn.Module, dim: int) -> Iterator[Tensor]:
    """Which scale each channel of a head belongs to, int64 ``(dim,)``, if rotary embedding mixes no channels, or
    some."""
    yield torch.arange(dim)
    for rotated in _rotary_dims(parent, dim):
        half = rotated // 2
        alone = torch.arange(half, dim - half)
        yield torch.cat([torch.arange(half).repeat(2), alone])
        if half > 1:
            yield torch.cat([torch.arange(half).repeat_interleave(2), alone])


def _rotary_dims(parent: nn.Module, dim: int) -> list[int]:
    """How many channels of a head may be rotated: what module and configuration say, then usual shares."""
    config: Any = getattr(parent, "config", None)
    stated: list[int] = []
    for owner in (parent, config):
        for name in ("rotary_ndims", "rotary_dim", "rotary_emb_dim"):
            value = getattr(owner, name, None)
            stated += [value] if isinstance(value, int) else []
    shares = [*_shares(vars(config) if hasattr(config, "__dict__") else {}), 1.0, 0.5, 0.25, 0.75]
    found = [*stated, *(int(dim * share) for share in shares)]
    return [rotated for rotated in dict.fromkeys(found) if 0 < rotated <= dim and rotated % 2 == 0]


def _shares(settings: Any) -> Iterator[float]:
    """Every ``partial_rotary_factor`` of a configuration, also inside of ``rope_parameters``."""
    for name, value in settings.items():
        if name in ("partial_rotary_factor", "rotary_pct") and isinstance(value, (int, float)):
            yield float(value)
        elif isinstance(value, dict) and name != "sub_configs":
            yield from _shares(cast("dict[Any, Any]", value))


class _Probe:
    """Tries candidates on a block."""

    def __init__(self, model: StreamedModel, info: AttentionInfo, run: Callable[[], Tensor]) -> None:
        self._model = model
        self._info = info
        self._run = run
        self._generator = torch.Generator().manual_seed(0)
        self._keys, self._output = self._forward()
        self._exact = self._output.dtype == torch.float32

    def seen(self, side: Side) -> Side:
        """The same side, once it is known whether a norm adds one: with a weight of zero it would not give zero."""
        if not side.norm:
            return side
        norm = self._model.module.get_submodule(side.module)
        zeros = {f"{side.module}.{part}": torch.zeros_like(value) for part, value in norm.named_parameters()}
        weight = norm.get_parameter("weight")
        x = torch.linspace(-1, 2, weight.numel(), device=weight.device).view(1, 1, *weight.shape)
        with torch.no_grad(), changed(self._model.module, zeros):
            return replace(side, plus_one=bool(norm(x.to(weight.dtype)).any()))

    def holds(self, place: QueryKey) -> bool:
        """Whether random scales change the keys as they should, and nothing else, and so do large ones."""
        random = (self._scale_of(place.scales) for _ in range(_DRAWS))
        return all(self._holds_for(place, scale) for scale in random) and self._holds_for(
            place, enlarging(place.scales, self._output.dtype)
        )

    def _scale_of(self, size: int) -> Tensor:
        return _FACTORS[torch.randint(len(_FACTORS), (size,), generator=self._generator)]

    def _holds_for(self, place: QueryKey, scale: Tensor) -> bool:
        rounded = (place.key.plus_one or place.query.plus_one) and not self._exact
        tolerance = _TOLERANCE_OF_ROUNDED if rounded else _TOLERANCE
        keys, output = self._forward(self._values(place, scale, sides=2))
        expected = self._keys / place.of_keys(scale).view(1, place.kv_heads, 1, place.dim)
        off = (keys - expected).abs().amax((0, 2)) > tolerance * expected.abs().amax((0, 2))
        if bool(off.any()):
            return False
        _, alone = self._forward(self._values(place, scale, sides=1))
        effect = float((alone.float() - self._output.float()).abs().max())
        left = float((output.float() - self._output.float()).abs().max())
        return effect > 0 and left <= tolerance * effect

    def _values(self, place: QueryKey, scale: Tensor, sides: int) -> dict[str, Tensor]:
        """The parameters with keys divided (one side) and queries multiplied as well (two sides)."""
        values: dict[str, Tensor] = {}
        both = ((place.key, 1 / place.of_keys(scale)), (place.query, place.of_queries(scale)))
        for side, channels in both[:sides]:
            module = self._model.module.get_submodule(side.module)
            for part in ("weight", "bias"):
                name, parameter = f"{side.module}.{part}", module._parameters.get(part)  # pyright: ignore
                if parameter is not None:
                    before = values.get(name, parameter)
                    after = side.multiplied(part, before, channels)
                    values[name] = after if side.plus_one else after.to(before.dtype)
        return values

    def _forward(self, values: Mapping[str, Tensor] = MappingProxyType({})) -> tuple[Tensor, Tensor]:
        """Keys ``(batch, kv_heads, tokens, dim)`` in float32 and the block's output."""
        seen: list[Tensor] = []

        def tap(_query: Tensor | None, key: Tensor, _value: Tensor) -> None:
            seen.append(key.detach().float())

        with torch.no_grad(), changed(self._model.module, values), self._model.tapped({self._info.name: tap}):
            output = self._run().detach()
        return torch.cat(seen, 2), output

"""The model as a sequence of units.

A unit knows its parameters and the checkpoint tensors behind them. It is loaded onto a device, worked on and unloaded;
nothing else of the model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim_core.checkpoint.joined import Part
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError, UnexpectedError
from slim_core.model.attention import AttentionAccess, AttentionInfo, Tap
from slim_core.model.biases import drop_bias, expect_bias
from slim_core.model.drafts import find_drafts
from slim_core.model.inputs import MUL_SCALE, drop_input_scales
from slim_core.model.linears import is_linear
from slim_core.model.skeleton import find_blocks, named_modules
from slim_core.model.subgraphs import GivenSubgraph
from slim_core.model.units import Addition, LinearInfo, Unit

__all__ = ["StreamedModel"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class StreamedModel:
    """A skeleton, the checkpoint behind it, and the units they make.

    Args:
        module: the model with parameters on ``meta`` and real buffers.
        source: the checkpoint.
        folder: where the model came from; side files are copied from it.
        config: the content of its ``config.json``.
        block_lists: dotted names of the lists of blocks, in the order in which they run; the one list that is found by
            size if not given.
        tensor_name: turns a parameter name into the checkpoint's name for it, where the two differ.
        skip: checkpoint tensors that are not read through this model (those of quantized linears).
        other_name: gives another name of a module that recipes may use for it.
        attention: the attentions of the model and the way to their states; None if nobody knows.
        joined: tensors of the source that are stored in another arrangement, see :class:`JoinedSource`; what is stored
            is written.
        subgraphs, unsmoothed: what an adapter says of where outliers can be moved.
        scaled_inputs: groups of linears that read the same input, by their names below a block, whose input may be
            scaled while the model runs where nothing can be folded; None: found by running the blocks.
        towers: dotted names of the modules that each run at most once ahead of the blocks, in the order of their calls.
        in_turns: whether the lists of blocks take turns: the first block of each, the second of each and so on.
        skips: whether a forward may pass blocks by.
        tower_example: gives keyword arguments of the model for one short sample that makes all its towers run.

    Raises:
        InvalidModelError: a parameter has no tensor, or one of another shape.
    """

    module: nn.Module
    source: TensorSource
    folder: Path
    config: dict[str, Any]
    block_lists: tuple[str, ...] = ()
    tensor_name: Callable[[str], str] = str
    skip: frozenset[str] = frozenset()
    attention: AttentionAccess | None = None
    joined: Mapping[str, tuple[str | Part, ...]] = field(default_factory=dict[str, "tuple[str | Part, ...]"])
    subgraphs: tuple[GivenSubgraph, ...] = ()
    unsmoothed: tuple[str, ...] = ()
    scaled_inputs: tuple[tuple[str, ...], ...] | None = ()
    other_name: Callable[[str], str] | None = None
    towers: tuple[str, ...] = ()
    tower_example: Callable[[], Mapping[str, Any]] | None = None
    in_turns: bool = False
    skips: bool = False
    units: list[Unit] = field(default_factory=list[Unit], init=False)

    def __post_init__(self) -> None:
        self.module.eval()
        self.block_lists = self.block_lists or (find_blocks(self.module),)
        self._shapes = dict(_named_tensors(self.module))
        self._names, ties = self._match()
        self.units = self._cut(ties)

    def _list(self, name: str) -> list[nn.Module]:
        return list(self.module.get_submodule(name).children())

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return [self.module.get_submodule(name) for name in self._block_names()]

    def _block_names(self) -> list[str]:
        lists = [[f"{name}.{i}" for i in range(len(self._list(name)))] for name in self.block_lists]
        order = zip_longest(*lists) if self.in_turns else lists
        return [name for names in order for name in names if name is not None]

    @property
    def stops(self) -> list[nn.Module]:
        """Where the forward of a sample is suspended: the towers, which it may pass by, and the blocks."""
        return [*(self.module.get_submodule(name) for name in self.towers), *self.blocks]

    @property
    def running(self) -> list[Unit]:
        """The units that samples run through, in the order of the stops."""
        return [unit for unit in self.units if unit.stop is not None]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that ``config.json`` names (also inside ``text_config``), None if it names none."""
        for part in (self.config, self.config.get("text_config"), self.config.get("vision_config")):
            name = (part or {}).get("dtype") or (part or {}).get("torch_dtype")
            if isinstance(name, str) and isinstance(
                found := getattr(torch, name.removeprefix("torch."), None), torch.dtype
            ):
                return found
        return None

    @property
    def tied_head(self) -> bool:
        """Whether some tensor is written under a second name."""
        return any(output != origin for unit in self.units for output, origin in unit.tensors.items())

    def with_source(self, source: TensorSource) -> StreamedModel:
        """The same model over a source whose tensors have the same names, dtypes and shapes."""
        model = copy(self)
        model.source = source
        return model

    def with_additions(self, additions: Iterable[Addition]) -> StreamedModel:
        """The same model, its units having these parameters as well; modules that are given a bias add it, and linears
        know of it."""
        model = copy(self)
        wanted = {addition.parameter: addition for addition in additions}
        model.units = [self._extended(unit, wanted) for unit in self.units]
        for name in wanted:
            if name.endswith(".bias"):
                path = name.removesuffix(".bias")
                expect_bias(self.module.get_submodule(path), path)
        return model

    def _extended(self, unit: Unit, additions: Mapping[str, Addition]) -> Unit:
        mine = {
            name: TensorMeta(self._name_of_addition(name), addition.dtype, addition.shape)
            for name, addition in additions.items()
            if name.startswith(f"{unit.name}.") and name not in unit.parameters
        }
        if not mine:
            return unit
        linears = tuple(replace(info, has_bias=info.has_bias or f"{info.name}.bias" in mine) for info in unit.linears)
        return replace(unit, linears=linears, added={**unit.added, **mine})

    def _name_of_addition(self, parameter: str) -> str:
        """A name like that of the module's weight, which the checkpoint may call otherwise than the model does."""
        path, _, leaf = parameter.rpartition(".")
        if parameter.endswith(MUL_SCALE):
            path, leaf = parameter.removesuffix(MUL_SCALE), MUL_SCALE.removeprefix(".")
        weight = self.tensor_name(f"{path}.weight")
        known = f"{path}.weight" in self._shapes and weight.endswith(".weight")
        return weight.removesuffix("weight") + leaf if known else self.tensor_name(parameter)

    def _stored_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter; one that was added is called like its module's weight."""
        name = self.tensor_name(parameter)
        return self._name_of_addition(parameter) if name not in self.source and parameter.endswith(".bias") else name

    def _match(self) -> tuple[dict[str, str], dict[str, str]]:
        """Checkpoint tensor of each parameter, and of each name that is not stored but tied to one that is."""
        stored = {name: self._stored_name(name) for name in self._shapes}
        here = {name: there for name, there in stored.items() if there in self.source and there not in self.skip}
        holder: dict[int, str] = {}
        for name, there in here.items():
            holder.setdefault(id(self._shapes[name]), there)
        names: dict[str, str] = {}
        ties: dict[str, str] = {}
        missing: list[str] = []
        for name, tensor in self._shapes.items():
            if stored[name] in self.skip:
                continue
            if origin := here.get(name):
                names[name] = origin
            elif origin := holder.get(id(tensor)):
                names[name] = ties[stored[name]] = origin
            elif isinstance(tensor, nn.Parameter):
                missing.append(stored[name])
        if missing:
            near = get_close_matches(missing[0], list(self.source), n=1)
            raise InvalidModelError(
                f"{len(missing)} tensors of the model are not in the checkpoint, among them {missing[0]!r}"
                + (f" (there is {near[0]!r})" if near else ""),
                where=str(self.folder),
                remedy="the weights and config.json do not belong together, or a shard is missing",
            )
        for name, stored in names.items():
            kept = self.source.meta(stored).dtype
            if self._shapes[name].is_floating_point() and kept not in _FLOATS:
                raise InvalidModelError(
                    f"the tensor is stored as {str(kept).removeprefix('torch.')}, not as a floating-point weight",
                    where=stored,
                    remedy="start from a floating-point checkpoint; float8 needs quantization_config in config.json",
                )
            have, want = self.source.meta(stored).shape, tuple(self._shapes[name].shape)
            if have != want:
                raise InvalidModelError(
                    f"tensor {stored!r} has shape {list(have)}, config.json asks for {list(want)}",
                    where=str(self.folder),
                    remedy="the weights and config.json do not belong together",
                )
        return names, ties

    def owner(self, name: str) -> str | None:
        """The block or tower that a module or parameter belongs to."""
        for prefix in (f"{blocks}." for blocks in self.block_lists):
            if name.startswith(prefix):
                return prefix + name.removeprefix(prefix).split(".", 1)[0]
        return next((tower for tower in self.towers if name == tower or name.startswith(f"{tower}.")), None)

    def _cut(self, ties: dict[str, str]) -> list[Unit]:
        order = list(self._shapes)
        owners = [self.owner(name) for name in order]
        towers = len(self.towers)
        first = next((i for i, owner in enumerate(owners) if owner is not None and owner not in self.towers), 0)
        stops = [*self.towers, *self._block_names()]
        groups: dict[str, list[str]] = {name: [] for name in ("prologue", *stops, "epilogue")}
        for position, name in enumerate(order):
            groups[owners[position] or ("prologue" if position < first else "epilogue")].append(name)
        linears = self._linears(set(ties.values()))
        written: set[str] = set()
        units: list[Unit] = []
        for number, (name, members) in enumerate(groups.items()):
            parameters = {member: self._names[member] for member in members if member in self._names}
            held = [part for stored in parameters.values() for part in self.joined.get(stored, (stored,))]
            parts = [part.name if isinstance(part, Part) else part for part in held]
            tensors = {part: part for part in parts if part not in written}
            tensors |= {
                alias: origin
                for member in members
                if (alias := self.tensor_name(member)) in ties and (origin := ties[alias])
            }
            written |= set(tensors)
            stop = number - 1 if 0 < number <= len(stops) else None
            block = stop - towers if stop is not None and stop >= towers else None
            attentions = self._attentions(name) if block is not None else ()
            units.append(Unit(name, block, parameters, tensors, tuple(linears.get(name, ())), attentions, stop=stop))
        extra = {name: name for name in self.source if name not in written}
        for draft in find_drafts([unit for unit in units if unit.block is not None], extra, self.source):
            units.append(draft)
            extra = {name: name for name in extra if name not in draft.tensors}
        if extra:
            units.append(Unit("extra", None, {}, extra))
        return [unit for unit in units if unit.tensors or unit.parameters or unit.stop is not None]

    def _linears(self, tied: Collection[str]) -> dict[str, list[LinearInfo]]:
        """The linears of every unit.

        Args:
            tied: tensors that several parameters share. Blocks that share a linear give it different inputs, and it
                could not be quantized in one and stay float in the other, so it stays float.
        """
        found: dict[str, list[LinearInfo]] = {}
        for name, module in named_modules(self.module):
            weight = f"{name}.weight"
            # The format calls what it has of a linear <name>.weight, <name>.weight_scale and so on.
            if weight not in self._names or not self.tensor_name(weight).endswith(".weight"):
                continue
            if not isinstance(module, nn.Linear) or not is_linear(module):
                continue
            owner = self.owner(name)
            if owner is not None and self._names[weight] in tied:
                continue
            found.setdefault(owner or "epilogue", []).append(
                LinearInfo(
                    name=name,
                    prefix=self.tensor_name(weight).removesuffix(".weight"),
                    in_features=module.in_features,
                    out_features=module.out_features,
                    has_bias=module._parameters.get("bias") is not None,  # pyright: ignore
                    in_block=owner is not None,
                    in_decoder=owner is not None and owner not in self.towers,
                    also_called=(self.other_name(name),) if self.other_name is not None else (),
                )
            )
        return found

    def _attentions(self, unit: str) -> tuple[AttentionInfo, ...]:
        known = self.attention.attentions if self.attention is not None else ()
        return tuple(info for info in known if info.name.startswith(f"{unit}."))

    def tapped(self, taps: Mapping[str, Tap]) -> AbstractContextManager[None]:
        """See :meth:`AttentionAccess.tapped`."""
        if not taps:
            return nullcontext()
        if self.attention is None:
            raise UnexpectedError("the states of its attentions cannot be reached", where=next(iter(taps)))
        return self.attention.tapped(taps)

    def load(self, names: Iterable[str], device: torch.device) -> None:
        """Give these parameters their values on a device. On the CPU they are views of the mapped checkpoint."""
        for name in names:
            if (stored := self._names.get(name)) is None:
                continue
            value = self.source.load(stored).to(device=device, dtype=self._shapes[name].dtype)
            _assign(self.module, name, value, self._shapes[name])

    def unload(self, names: Iterable[str]) -> None:
        """Put these parameters back on ``meta`` and give their memory back; what was added is dropped."""
        wanted = list(names)
        drop_input_scales(self.module, wanted)
        for name in wanted:
            if name not in self._names and name.endswith(".bias"):
                drop_bias(self.module.get_submodule(name.removesuffix(".bias")))
        names = [name for name in wanted if name in self._names]
        for name in names:
            _assign(self.module, name, self._shapes[name], self._shapes[name])
        self.source.release(self._names[name] for name in names)

    def tensors_of(self, names: Iterable[str]) -> list[str]:
        """The checkpoint tensors behind parameters."""
        return [self._names[name] for name in names if name in self._names]

    def made_while_read(self, kind: type[nn.Module]) -> list[str]:
        """Weights outside the blocks of modules of a kind that are not stored as they are: they take memory."""
        return [
            name
            for name in self.outside
            if isinstance(self.module.get_submodule(name.rpartition(".")[0]), kind)
            and self.source.stored(self._names[name]) is None
        ]

    @property
    def outside(self) -> list[str]:
        """Parameters that belong to neither a block nor a tower."""
        return [name for name in self._names if self.owner(name) is None]


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, in the order of the modules, tied ones under each of their names."""
    for prefix, child in named_modules(module, remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        passing: set[str] = getattr(child, "_non_persistent_buffers_set", set[str]())
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            yield dot + name, parameter
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            if name not in passing:
                yield dot + name, buffer


def _assign(root: nn.Module, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    if isinstance(like, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(root.get_submodule(path), leaf, value)

"""Opening the transformer of a diffusion model for streaming: class, names, checkpoint."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from slim_core.checkpoint.header import parse_object
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.renamed import RenamedSource
from slim_core.checkpoint.source import TensorSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.skeleton import find_blocks, named_modules, parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.rotation.attention import rotate_queries_and_keys, stored_rotations
from slim_sd.attention import Attentions
from slim_sd.pipeline.folders import layout_of, transformer_folders
from slim_sd.wan import files as wan_files
from slim_sd.wan.names import diffusers_name, original_name

__all__ = ["Names", "is_wan", "open_tensors", "open_transformer", "open_written"]

Names = Literal["original", "diffusers"]
"""Which names the output has: those of the original project, if it has any of its own, or those of diffusers."""

_WAN = "WanTransformer3DModel"
_IN_TURNS = frozenset({"LatteTransformer3DModel"})  # those whose lists of blocks take turns
_LARGE_SHARE = 0.2
_BLOCK = re.compile(r"(.+?)\.(\d+)\.")
# Linears of a block that read the same input, none of which comes from a norm with a weight that could be scaled.
_WAN_INPUTS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn1.to_out.0",),
    ("attn2.to_q",),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
    ("attn2.to_out.0",),
    ("ffn.net.0.proj",),
    ("ffn.net.2",),
)


def is_wan(config: Mapping[str, Any]) -> bool:
    """Whether a transformer is one of Wan, which has names of its own."""
    return config.get("_class_name") == _WAN


def open_transformer(
    folder: Path, component: str, names: Names = "original", dtype: torch.dtype | None = None
) -> StreamedModel:
    """A transformer of a model folder in either layout, ready to be streamed.

    Args:
        folder: the model folder.
        component: one of :func:`slim_sd.pipeline.folders.transformer_folders`.
        names: what its tensors are called from here on.
        dtype: what it runs in; None: what most of its weights are stored in.

    Raises:
        SlimError: see :class:`Checkpoint` and :class:`StreamedModel`; also where the class is unknown to diffusers, its
            configuration does not make a model, or the folder holds a quantized checkpoint.
    """
    place = transformer_folders(folder)[component]
    checkpoint, config = _open_files(folder, place)
    source = _named(checkpoint, config, names, original=layout_of(folder) == "original")
    dtype = dtype or _main_dtype(checkpoint)
    module = _skeleton(config, dtype, place)
    renamed = is_wan(config) and names == "original"
    other_name = original_name if is_wan(config) else None
    lists = _block_lists(module)
    _check_counts(source, module, lists, place)
    return StreamedModel(
        module,
        source,
        place,
        config | {"dtype": str(dtype).removeprefix("torch.")},
        lists,
        original_name if renamed else str,
        attention=Attentions(module, original_name if renamed else str, other_name),
        other_name=other_name,
        scaled_inputs=_WAN_INPUTS if is_wan(config) else None,
        in_turns=config.get("_class_name") in _IN_TURNS,
        skips=True,
    )


def open_written(original: StreamedModel, source: TensorSource, folder: Path, skip: frozenset[str]) -> StreamedModel:
    """The same transformer over files that were written for it.

    Args:
        source: the tensors that are not quantized.
        skip: names of weights that are, or that are of such layers.
    """
    with parameters_on_meta():
        module = type(original.module).from_config(_own(original.config))  # pyright: ignore
    _set_dtypes(module, original.dtype or torch.float32)
    attention = Attentions(module, original.tensor_name, original.other_name)
    model = StreamedModel(
        module,
        source,
        folder,
        original.config,
        original.block_lists,
        original.tensor_name,
        skip,
        attention,
        other_name=original.other_name,
        in_turns=original.in_turns,
        skips=original.skips,
    )
    return rotate_queries_and_keys(model, stored_rotations(attention.attentions, source))


def open_tensors(folder: Path, component: str, names: Collection[str]) -> TensorSource:
    """The tensors of a transformer as they are stored.

    Args:
        names: of those that were written for it; of the two sets of names that Wan has, the source has that of which
            there are more.

    Raises:
        SlimError: as :func:`open_transformer`.
    """
    checkpoint, config = _open_files(folder, transformer_folders(folder)[component])
    original = layout_of(folder) == "original"
    kinds: tuple[Names, ...] = ("original", "diffusers") if is_wan(config) else ("diffusers",)
    sources = [_named(checkpoint, config, kind, original=original) for kind in kinds]
    return max(sources, key=lambda source: sum(name in source for name in names))


def _open_files(folder: Path, place: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The weights of a float transformer and its configuration, as diffusers has it."""
    if found := sorted(place.glob("quant_model_description*.json")):
        raise UnsupportedError(
            "this folder holds a quantized checkpoint", where=str(found[0]), remedy="start from the original"
        )
    checkpoint = Checkpoint(place)
    original = layout_of(folder) == "original"
    config = wan_files.transformer_config(place, checkpoint) if original else _read_config(place)
    if config.get("quantization_config"):
        raise UnsupportedError(
            "the source is already quantized", where=str(place / "config.json"), remedy="start from the original"
        )
    return checkpoint, config


def _named(checkpoint: Checkpoint, config: Mapping[str, Any], names: Names, *, original: bool) -> TensorSource:
    """The tensors under the names that are wanted.

    Args:
        original: whether they are stored under those of the original project.
    """
    if not is_wan(config) or original == (names == "original"):
        return checkpoint
    other = diffusers_name if original else original_name
    return RenamedSource(checkpoint, {other(name): name for name in checkpoint})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        raise InvalidModelError(
            f"config.json cannot be read: {error.strerror}", where=str(folder), remedy="download the folder again"
        ) from error
    except ValueError as error:
        raise InvalidModelError(
            f"is not a JSON object: {error}", where=str(path), remedy="download the folder again"
        ) from error


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "dtype"}


def _skeleton(config: Mapping[str, Any], dtype: torch.dtype, folder: Path) -> nn.Module:
    """The transformer with its parameters on ``meta``."""
    import diffusers

    where = str(folder / "config.json")
    name = config.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no model {name!r}", where=where, remedy="upgrade diffusers"
        )
    try:
        with parameters_on_meta():
            module = cast("Any", kind).from_config(_own(config))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError, ImportError) as error:
        raise InvalidModelError(
            f"diffusers cannot build the model: {type(error).__name__}: {error}",
            where=where,
            remedy="correct the file, or download it again",
        ) from error
    _set_dtypes(module, dtype)
    return module


def _set_dtypes(module: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters the dtype they run in: one for all but those that their class wants in float32."""
    kept: list[str] = getattr(module, "_keep_in_fp32_modules", None) or []
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            single = any(part in kept for part in name.split("."))
            parameter.data = parameter.data.to(torch.float32 if single else dtype)


def _main_dtype(source: TensorSource) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for name in source:
        meta = source.meta(name)
        if meta.dtype.is_floating_point:
            sizes[meta.dtype] = sizes.get(meta.dtype, 0) + meta.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _block_lists(module: nn.Module) -> tuple[str, ...]:
    """The lists of blocks, in the order in which they run: those of the classes that diffusers itself compiles or
    places as one, and others that hold a large part of the model."""
    kinds = {*(getattr(module, "_repeated_blocks", None) or ()), *(getattr(module, "_no_split_modules", None) or ())}
    lists = {name: part for name, part in named_modules(module) if isinstance(part, nn.ModuleList) and len(part)}
    outer = {name: part for name, part in lists.items() if not any(name.startswith(f"{one}.") for one in lists)}
    size = _size(module)
    found = [
        name
        for name, part in outer.items()
        if all(type(block).__name__ in kinds for block in part) or _size(part) > _LARGE_SHARE * size
    ]
    # In the code of the forward, names stand in the order of their first use. Where it leaves lists to a method, they
    # stay in the order in which they are registered; if that is wrong, a calibrated run tells.
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    used: Sequence[str] = code.co_names if code is not None else ()
    at = {name: used.index(part) for name in found if (part := name.split(".")[0]) in used}
    ordered = sorted(found, key=lambda name: at[name]) if len(at) == len(found) else found
    return tuple(ordered) or (find_blocks(module),)


def _check_counts(source: TensorSource, module: nn.Module, lists: tuple[str, ...], folder: Path) -> None:
    """Refuse a checkpoint with blocks that the configuration leaves out; lists are called alike in both layouts."""
    counts = {name: len(list(module.get_submodule(name).children())) for name in lists}
    for tensor in source:
        found = _BLOCK.match(tensor)
        if found is not None and int(found[2]) >= counts.get(found[1], int(found[2]) + 1):
            raise InvalidModelError(
                f"the checkpoint has {tensor!r}, but by config.json there are {counts[found[1]]} {found[1]}",
                where=str(folder),
                remedy="the weights and config.json do not belong together",
            )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

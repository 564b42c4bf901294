"""Which modules of a transformers model are attentions with a cache, and the shape of their states.

Nothing is known of single families: an attention is a module that owns the projections of keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from slim_core.model.attention import AttentionInfo

__all__ = ["describe_attention", "takes_cache"]

_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "qkv", "att_proj")
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_KEEPS_NO_KEYS = ("linear", "mamba", "ssm", "conv", "recurrent", "moe", "mlp")


def describe_attention(
    name: str, module: nn.Module, model: nn.Module, tensor_name: Callable[[str], str]
) -> AttentionInfo | None:
    """What is known of a module that is an attention with keys and values of its own; None for all other modules."""
    leaf = _projection(module)
    config = _config(module, model)
    if _is_linear_attention(module, config) or getattr(module, "is_kv_shared_layer", False):
        return None
    if leaf is None:
        return _foreign(name, type(module)) if _is_called_attention(module) else None
    prefix = tensor_name(f"{name}.{leaf}.weight").removesuffix(".weight").rpartition(".")[0]
    try:
        shape = _latent_shape(module, config) if leaf == "kv_b_proj" else _shape(module, config)
    except _Unknown as error:
        return AttentionInfo(name, prefix, 0, 0, 0, 0, problem=str(error))
    latent = leaf == "kv_b_proj"
    shows_query = _uses_interface(type(module))
    # Later layers that take over the keys and values of this one get what went through the cache.
    shared = bool(getattr(module, "store_full_length_kv", False))
    if shows_query and shared:
        shows_query = False
    problem = ""
    if not shows_query and (latent or takes_cache(type(module)) is None):
        problem = (
            f"{type(module).__name__} neither calls the attention interface of transformers nor updates a cache, so "
            "its query, key and value cannot be reached"
        )
    return AttentionInfo(name, prefix, *shape, latent=latent, sees_query=shows_query, problem=problem, shared=shared)


def takes_cache(kind: type) -> str | None:
    """The argument by which the forward of an attention class takes a cache that it updates; None if it has none."""
    forward: Any = inspect.unwrap(kind.forward)  # pyright: ignore
    if "update" not in forward.__code__.co_names:
        return None
    return next((name for name in _CACHE_ARGUMENTS if name in inspect.signature(forward).parameters), None)


class _Unknown(Exception):
    """The structure of an attention is not understood."""


def _projection(module: nn.Module) -> str | None:
    """The child whose output holds the keys; None if the module projects no keys and values."""
    children = {name for name, child in module.named_children() if _features(child) is not None}
    if "kv_b_proj" in children:
        return "kv_b_proj"
    if "k_proj" in children and ("v_proj" in children or hasattr(module, "v_proj")):
        return "k_proj"
    return next((name for name in _FUSED if name in children), None) if _is_called_attention(module) else None


def _is_called_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("attention", "attn"))


def _foreign(name: str, kind: type) -> AttentionInfo | None:
    """A class that attends, and by its name is meant to, but whose projections go by no name that is known."""
    if not _uses_interface(kind) and takes_cache(kind) is None:
        return None
    return AttentionInfo(name, name, 0, 0, 0, 0, problem=f"the projections of {kind.__name__} are not known by name")


def _features(projection: nn.Module | None) -> int | None:
    """Output features of a linear (or of a Conv1D, which stores its weight the other way around)."""
    weight = getattr(projection, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    return int(weight.shape[0] if isinstance(projection, nn.Linear) else weight.shape[1])


def _config(module: nn.Module, model: nn.Module) -> Any:
    config: Any = getattr(module, "config", None) or getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _is_linear_attention(module: nn.Module, config: Any) -> bool:
    """Whether the configuration says that this layer keeps a state instead of keys and values."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    index = getattr(module, "layer_idx", None)
    if not types or not isinstance(index, int) or not 0 <= index < len(types):
        return False
    return any(word in str(types[index]) for word in _KEEPS_NO_KEYS)


def _first(*sources: tuple[Any, tuple[str, ...]]) -> int | None:
    """The first positive integer among named attributes."""
    for owner, names in sources:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _shape(module: nn.Module, config: Any) -> tuple[int, int, int, int]:
    """Heads of query, heads of key, channels of a key, channels of a value."""
    heads_of_all = _first(
        (module, ("num_heads", "num_attention_heads", "n_heads", "n_head")),
        (config, ("num_attention_heads", "n_head", "n_heads")),
    )
    if heads_of_all is None:
        raise _Unknown("neither the module nor the configuration says how many heads it has")
    hidden = _first((config, ("hidden_size", "n_embd", "d_model")))
    dim = _first((module, ("head_dim", "head_size", "attention_head_size")), (config, ("head_dim",)))
    dim = dim or (hidden // heads_of_all if hidden else None)
    if dim is None:
        raise _Unknown("neither the module nor the configuration says how large a head is")
    keys, values = _features(getattr(module, "k_proj", None)), _features(getattr(module, "v_proj", None))
    if keys is None:
        own = ("num_key_value_heads", "num_kv_heads", "kv_heads")
        kv_heads = _first((module, own), (config, ("num_key_value_heads",))) or heads_of_all
        return heads_of_all, kv_heads, dim, dim
    if keys % dim:
        raise _Unknown(f"its k_proj has {keys} output features, which are no whole heads of {dim}")
    kv_heads = keys // dim
    groups = _first((module, ("num_key_value_groups",)))
    heads = kv_heads * groups if groups else heads_of_all
    return heads, kv_heads, dim, (values or keys) // kv_heads


def _latent_shape(module: nn.Module, config: Any) -> tuple[int, int, int, int]:
    """The same in the space of the latent."""
    heads = _first((module, ("num_heads", "num_attention_heads")), (config, ("num_attention_heads",)))
    expand = getattr(module, "kv_b_proj", None)
    nope, value = _first((module, ("qk_nope_head_dim",))), _first((module, ("v_head_dim",)))
    if heads is None or nope is None or value is None or not isinstance(expand, nn.Linear):
        raise _Unknown("a latent attention whose heads, qk_nope_head_dim or v_head_dim are not known")
    if expand.out_features != heads * (nope + value) or expand.bias is not None:
        raise _Unknown(f"kv_b_proj does not make {heads} heads of {nope} key and {value} value channels without bias")
    return heads, 1, expand.in_features, expand.in_features


def _uses_interface(kind: type) -> bool:
    return any(_INTERFACE in function.__code__.co_names for function in _functions(kind))


def _functions(kind: type) -> Iterator[Any]:
    """The functions of a class as its instances see them, those of ``nn.Module`` aside."""
    for name in dir(kind):
        found: Any = getattr(kind, name, None)
        if inspect.isfunction(found) and found is not getattr(nn.Module, name, None):
            function = inspect.unwrap(found)
            if inspect.isfunction(function):
                yield function

"""Processors and savers found through entry points, and the field types that are parsed with their help.

An entry point of the group ``slim.processors`` (``slim.savers``) is named like the ``type`` it serves and loads a class
whose attribute ``Config`` is a :class:`ProcessorConfig` (:class:`SaverConfig`). Only the types that a recipe names are
imported, when the recipe is validated.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Annotated, Any, LiteralString, cast, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from slim_core.errors import EnvError, UnsupportedError
from slim_core.recipe.base import ProcessorConfig, SaverConfig, StrictModel
from slim_core.recipe.wording import nearest, one_of

__all__ = [
    "PROCESSOR_GROUP",
    "SAVER_GROUP",
    "AnyProcessor",
    "AnySaver",
    "PluginConfig",
    "forget_plugins",
    "plugin_names",
    "processor_class",
    "saver_class",
]

PROCESSOR_GROUP = "slim.processors"
SAVER_GROUP = "slim.savers"

_PROTOCOL = {
    PROCESSOR_GROUP: frozenset(
        {"adapt_rotation", "autoround_quant", "awq", "dynamic_cache", "fa3_quant", "flatquant", "flex_awq_ssz"}
        | {"flex_smooth_quant", "float_sparse", "group", "iter_smooth", "kv_smooth", "linear_quant", "online_quarot"}
        | {"quarot", "smooth_quant", "svd_res"}
    ),
    SAVER_GROUP: frozenset({"ascendv1_saver", "compressed_tensors", "mindie_format_saver"}),
}


def processor_class(name: str) -> type[Any]:
    """The class behind ``type: name`` in ``process``.

    Raises:
        UnsupportedError: no installed package provides it.
        EnvError: a package announces it but it cannot be imported, or two packages announce it.
    """
    return _plugin(PROCESSOR_GROUP, name)[0]


def saver_class(name: str) -> type[Any]:
    """The class behind ``type: name`` in ``save``.

    Raises:
        UnsupportedError: no installed package provides it.
        EnvError: a package announces it but it cannot be imported, or two packages announce it.
    """
    return _plugin(SAVER_GROUP, name)[0]


def plugin_names(group: str) -> list[str]:
    """Sorted names of a group's entry points; imports none of them."""
    return sorted(_points(group))


def forget_plugins() -> None:
    """Look for entry points afresh, after a package was installed into the running process."""
    _points.cache_clear()
    _plugin.cache_clear()


@cache
def _points(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        # The same value twice is one package seen through two metadata folders (an editable install).
        found.setdefault(point.name, {}).setdefault(point.value, point)
    return MappingProxyType({name: tuple(points.values()) for name, points in found.items()})


@cache
def _plugin(group: str, name: str) -> tuple[type[Any], type[StrictModel]]:
    """Class and configuration class behind an entry point."""
    kind = _kind(group)
    points = _points(group).get(name, ())
    if not points:
        raise UnsupportedError(_unknown(group, name))
    owners = " and ".join(_owner(point) for point in points)
    point = points[0]
    if len(points) > 1:
        raise EnvError(f"the {kind} {name!r} is provided by {owners}", remedy="uninstall all but one")
    try:
        loaded: Any = point.load()
    except Exception as error:
        raise EnvError(
            f"the {kind} {name!r} of {owners} cannot be imported: {type(error).__name__}: {error}",
            where=point.value,
            remedy=f"reinstall or remove {owners}",
        ) from error
    config: Any = getattr(loaded, "Config", None)
    base = ProcessorConfig if group == PROCESSOR_GROUP else SaverConfig
    problem = None
    if not (isinstance(config, type) and issubclass(config, base)):
        problem = f"has no attribute Config that is a {base.__name__}"
    elif name not in get_args(config.model_fields["type"].annotation):
        problem = f"has a Config whose field type is not Literal[{name!r}]"
    if problem:
        raise EnvError(f"the {kind} {name!r} of {owners} {problem}", where=point.value)
    return cast("type[Any]", loaded), cast("type[StrictModel]", config)


def _kind(group: str) -> str:
    return group.removeprefix("slim.").removesuffix("s")


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else f"an unnamed package ({point.value})"


def _unknown(group: str, name: str) -> str:
    installed = plugin_names(group)
    if name in _PROTOCOL[group]:
        return f"no installed package provides the {_kind(group)} {name!r}; installed: {one_of(installed)}"
    return f"got {name!r}; installed {_kind(group)}s: {one_of(installed)}{nearest(name, installed)}"


@dataclass(frozen=True)
class PluginConfig:
    """Marks a field type as "the configuration of whatever the ``type`` key names" within an entry point group."""

    group: str

    def config_class(self, name: str) -> type[StrictModel]:
        """Configuration class of one type; raises as :func:`processor_class`."""
        return _plugin(self.group, name)[1]

    def parse(self, value: Any) -> StrictModel:
        """A configuration object from a mapping with a ``type``; an object that already is one passes.

        Raises:
            pydantic.ValidationError: the type is missing or unknown, or the mapping does not fit it.
            EnvError: the type's package is broken.
        """
        if isinstance(value, ProcessorConfig if self.group == PROCESSOR_GROUP else SaverConfig):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "mapping_expected", "must be a mapping that starts with `type:`; check the indentation"
            )
        data = cast("Mapping[str, Any]", value)
        name = data.get("type")
        if "type" not in data:
            raise self._error("missing_type", f"required field is missing; {one_of(plugin_names(self.group))}", None)
        if not isinstance(name, str) or name not in _points(self.group):
            text = _unknown(self.group, name) if isinstance(name, str) else "must be a string"
            raise self._error("unknown_type", text, name)
        return self.config_class(name).model_validate(data)

    def _error(self, kind: LiteralString, text: str, value: object) -> ValidationError:
        # Through ctx, since the template would trip over braces in the text.
        error = PydanticCustomError(kind, "{text}", {"text": text})
        return ValidationError.from_exception_data(
            _kind(self.group), [InitErrorDetails(type=error, loc=("type",), input=value)]
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-slim-plugins": self.group}


AnyProcessor = Annotated[ProcessorConfig, PluginConfig(PROCESSOR_GROUP)]
"""Field type: the configuration of any installed processor, told apart by its ``type``."""

AnySaver = Annotated[SaverConfig, PluginConfig(SAVER_GROUP)]
"""Field type: the configuration of any installed saver, told apart by its ``type``."""

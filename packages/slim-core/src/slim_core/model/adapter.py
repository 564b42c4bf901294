"""What a model family tells Slim that its structure does not: data, found through entry points.

Most families need none. A package adds one by pointing an entry point of the group ``slim.adapters``, named like the
``model_type`` in ``config.json``, at a :class:`ModelAdapter`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from slim_core.errors import EnvError
from slim_core.model.subgraphs import GivenSubgraph

__all__ = ["ADAPTER_GROUP", "ModelAdapter", "find_adapter"]

ADAPTER_GROUP = "slim.adapters"


@dataclass(frozen=True)
class ModelAdapter:
    """Corrections to what is found by itself.

    Args:
        blocks: dotted name of the list of decoder blocks; empty: the list with the most parameters.
        tensor_name: turns the name of a parameter into the checkpoint's name for it.
        subgraphs: places where outliers can be moved, which names do not tell, or tell wrongly.
        unsmoothed: patterns of sources that are never smoothed, by full name, e.g. ``*.attn_norm``.
        towers: dotted names of the modules that run as a whole ahead of the decoder blocks, in the order of their
            calls; each may be called once by a forward, or not at all. None: found by the service.
    """

    blocks: str = ""
    tensor_name: Callable[[str], str] = str
    subgraphs: tuple[GivenSubgraph, ...] = ()
    unsmoothed: tuple[str, ...] = ()
    towers: tuple[str, ...] | None = None


def find_adapter(model_type: str) -> ModelAdapter:
    """The adapter of a model type; one without corrections if no package brings one.

    Raises:
        EnvError: an entry point does not lead to a :class:`ModelAdapter`.
    """
    for point in entry_points(group=ADAPTER_GROUP, name=model_type):
        try:
            found: Any = point.load()
        except ImportError as error:
            raise EnvError(f"the adapter for {model_type!r} cannot be imported: {error}", where=point.value) from error
        if not isinstance(found, ModelAdapter):
            raise EnvError(f"the adapter for {model_type!r} is no ModelAdapter", where=point.value)
        return found
    return ModelAdapter()

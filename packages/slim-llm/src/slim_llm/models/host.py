"""Models that ask where they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["say_host"]


def say_host(module: nn.Module, parts: Iterable[str]) -> None:
    """Let a model, and what lies between it and some of its parts, say that they are on the host.

    transformers' models take the device of their first parameter for their own and move inputs there. While the model
    is streamed that parameter may have no values, and be on ``meta``. What is not a block or a tower always computes on
    the host.
    """
    above = {name.rpartition(".")[0] for name in parts}
    above |= {place.rsplit(".", depth)[0] for place in above for depth in range(1, place.count(".") + 1)} | {""}
    for name in above:
        part = module.get_submodule(name)
        cls = type(part)
        if isinstance(getattr(cls, "device", None), property):
            own = {"device": property(lambda _: torch.device("cpu")), "__module__": cls.__module__}
            part.__class__ = type(cls.__name__, (cls,), own)

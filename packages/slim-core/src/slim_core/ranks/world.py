"""Which of several processes this one is, as its environment says."""

from __future__ import annotations

import os
from dataclasses import dataclass

from slim_core.errors import EnvVarError

__all__ = ["World", "world_of_environment"]


@dataclass(frozen=True)
class World:
    """This process among all that work on a run; one that nobody started as a rank is alone.

    Args:
        local_rank, local_size: among those on this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world_of_environment() -> World:
    """The place that ``torchrun``, or Slim itself, gave this process. Imports no torch.

    Raises:
        EnvVarError: one of the variables is no number, or they contradict each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    world = World(rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size))
    if not (0 <= rank < size and 0 <= world.local_rank < world.local_size <= size):
        raise EnvVarError(f"rank {rank} of {size} (local {world.local_rank} of {world.local_size}) makes no sense")
    return world


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise EnvVarError(f"{name} is {text!r}, not a number", where="environment", remedy="start with torchrun")
    return int(text)

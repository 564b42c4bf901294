"""Whether the disk of the output has room for a run, looked at before anything is written."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slim_core.errors import EnvError
from slim_core.runners.plan import Plan
from slim_core.sizes import human_size

__all__ = ["DiskNeed", "disk_need", "disk_problem", "existing_part", "has_room_to_keep", "taken"]

# Journal, report, description and index: some of each for every linear, and what does not depend on them.
_NOTES_PER_LINEAR, _NOTES = 2 << 10, 1 << 20
_BLOCK = 512  # unit of st_blocks, whatever the file system


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run will have on the disk of its output when it has the most.

    Args:
        output: the weight files, exactly.
        notes: journal and files beside the weights, about.
        activations: those of samples that wait on disk, about.
        kept: what is kept for ``--resume`` if there is room for it, about.
    """

    output: int
    notes: int
    activations: int
    kept: int = 0

    def __add__(self, other: DiskNeed) -> DiskNeed:
        """Of two models, one after the other: only one of them has activations that wait."""
        waiting, kept = max(self.activations, other.activations), max(self.kept, other.kept)
        return DiskNeed(self.output + other.output, self.notes + other.notes, waiting, kept)

    @property
    def least(self) -> int:
        """What the run cannot do without."""
        return self.output + self.notes + self.activations

    @property
    def total(self) -> int:
        return self.least + self.kept


def disk_need(plan: Plan) -> DiskNeed:
    """What the run of a plan needs; an output that it will replace is there besides until the end."""
    linears = sum(len(unit.linears) for unit in plan.units)
    sharing = 1 if plan.runner.by_units else plan.runner.ranks
    activations = plan.activation_bytes * sharing
    waiting = activations if plan.memory.spills else 0
    # Of the last boundary, and of the one ahead of it until the unit in between is on disk.
    kept = 2 * activations if plan.needs_data else 0
    output = sum(shard.nbytes for shard in plan.output.shards)
    return DiskNeed(output, _NOTES + _NOTES_PER_LINEAR * linears, waiting, kept)


def disk_problem(need: DiskNeed, save_path: Path, partial: Path) -> EnvError | None:
    """What to say if the need is more than is free where ``save_path`` will lie.

    Args:
        partial: the folder that an interrupted run has left; a new run removes it and a resumed one goes on with it,
            so what it takes counts as free.
    """
    free = _free(save_path, partial)
    if need.least <= free:
        return None
    waiting = f", {human_size(need.activations)} of it activations that wait on disk" if need.activations else ""
    return EnvError(
        f"the run needs about {human_size(need.least)} of disk space{waiting}, and {human_size(free)} are free",
        where=str(save_path),
        remedy="make room, choose another disk, or try it all the same with --force",
    )


def has_room_to_keep(need: DiskNeed, save_path: Path, partial: Path) -> bool:
    """Whether there is room for what is kept for ``--resume`` as well."""
    return need.total <= _free(save_path, partial)


def _free(save_path: Path, partial: Path) -> int:
    found = os.statvfs(existing_part(save_path))
    return found.f_bavail * found.f_frsize + taken(partial)


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    there = path.resolve()
    while not there.exists():
        there = there.parent
    return there


def taken(folder: Path) -> int:
    """Bytes that the files of a folder take; parts of them that were never written take none, nor do files that
    disappear meanwhile."""
    blocks = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                blocks += os.lstat(os.path.join(place, name)).st_blocks
    return blocks * _BLOCK

"""How much memory a run may take, as the user writes it. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["UNLIMITED", "MemoryBudget", "parse_budget"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_EXAMPLE = "write host=8GiB, device=20GiB, or both with a comma between them"


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that a run may take beyond what the process takes when it begins; None where nothing was said.

    Args:
        host: of the host's memory; on the CPU that is all there is.
        device: of the memory of a device that is not the CPU.
    """

    host: int | None = None
    device: int | None = None

    def of_rank(self, ranks: int) -> MemoryBudget:
        """What each of several processes on one host may take, which have devices of their own."""
        return MemoryBudget(None if self.host is None else self.host // ranks, self.device)


UNLIMITED = MemoryBudget()


def parse_budget(text: str) -> MemoryBudget:
    """``host=8GiB,device=20GiB``: sizes in bytes, or with one of the units KB, MB, GB, KiB, MiB, GiB, in any case.

    Raises:
        ValueError: it is not written like that; says what is wrong and what to write.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        key, equals, size = (one.strip() for one in part.partition("="))
        if not equals or key not in ("host", "device"):
            raise ValueError(f"{part.strip()!r} is no budget; {_EXAMPLE}")
        if key in found:
            raise ValueError(f"{key} is given twice; {_EXAMPLE}")
        found[key] = _bytes(size)
    return MemoryBudget(**found)


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is no size; give a number and one of B, KB, MB, GB, KiB, MiB, GiB, e.g. 8GiB")
    size = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if not size:
        raise ValueError(f"{text!r} is no memory at all; {_EXAMPLE}")
    return size

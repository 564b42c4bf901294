"""Small phrases that error messages share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["nearest", "nearest_name", "one_of"]


def nearest_name(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that ``word`` was probably meant to be; case, ``-`` and ``_`` count for nothing."""
    plain = {_plain(name): name for name in names}
    found = get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def nearest(word: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing if no name is near."""
    name = nearest_name(word, names)
    return f"; did you mean {name!r}?" if name else ""


def one_of(names: Iterable[str], limit: int = 30) -> str:
    """The names in a row, cut after ``limit``."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "") if listed else "none"


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")

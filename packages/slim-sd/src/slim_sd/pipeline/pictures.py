"""Pictures that a pipeline begins with, or edits."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from slim_core.errors import InvalidDatasetError

__all__ = ["open_picture"]


def open_picture(path: Path, where: str = "") -> Any:
    """A picture in RGB, turned as its EXIF orientation says.

    Args:
        path: the file.
        where: who names it, for messages.

    Raises:
        InvalidDatasetError: it is missing, no picture, damaged or too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            if prod(picture.size) > Image.MAX_IMAGE_PIXELS:  # pyright: ignore[reportOperatorIssue]
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels are too many")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidDatasetError(
            f"the picture cannot be read: {reason}",
            where=f"{where}: {path}" if where else str(path),
            remedy="give a JPEG or PNG file; a relative path starts at the working folder",
        ) from error

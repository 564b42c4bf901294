"""What was generated while a model was scored, for people: pictures, a page, and the scores as JSON."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slim_core.errors import EnvError, SecurityError

if TYPE_CHECKING:
    from slim_sd.pipeline.generation import Generation
    from slim_sd.score import DiffusionScores

__all__ = ["check_report_folder", "write_score_report"]

_GAP = 8  # pixels between two pictures
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .8rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr:nth-child(even) {{ background: #f3f3f3; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{title}</h1>
<p>{generation}</p>
{pictures}
<table><tr>{head}</tr>
{rows}
</table>
</body></html>
"""


def check_report_folder(folder: Path) -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        SecurityError: it does, or is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SecurityError("exists and is not empty", where=str(folder), remedy="give a new folder to --report")


def write_score_report(
    folder: Path,
    scores: DiffusionScores,
    generation: Generation,
    frames: tuple[Tensor | None, Tensor | None],
    quantized: Path,
) -> None:
    """Write ``eval.html``, ``eval.json`` and, if there are pictures, ``first_frames.png``.

    Args:
        frames: of both runs ``(frames, height, width, 3)``, the original's first; values from 0 to 1.

    Raises:
        EnvError: the folder cannot be written to.
    """
    told = {key: value for key, value in generation.facts.items() if value is not None}
    head, rows = scores.table()
    original, other = frames
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = ""
        if original is not None and other is not None:
            _side_by_side(original[0], other[0]).save(folder / "first_frames.png")
            pictures = '<p><img src="first_frames.png" alt="first frames"><br>first frame: original, quantized</p>'
        content = {"quantized": str(quantized), "generation": told, **scores.as_json()}
        (folder / "eval.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        page = _PAGE.format(
            title=f"Original and quantized: {escape(quantized.name)}",
            generation=escape(", ".join(f"{key}: {value}" for key, value in told.items())),
            pictures=pictures,
            head="".join(f"<th>{escape(cell)}</th>" for cell in head),
            rows="\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
        )
        (folder / "eval.html").write_text(page, "utf-8")
    except OSError as error:
        raise EnvError(f"the report cannot be written: {error.strerror}", where=str(folder)) from error


def _side_by_side(first: Tensor, second: Tensor) -> Any:
    """Two pictures ``(height, width, 3)`` as one."""
    from PIL import Image

    height, width, _ = first.shape
    both = Image.new("RGB", (2 * width + _GAP, height), "white")
    for place, picture in ((0, first), (width + _GAP, second)):
        values = (picture.clamp(0, 1) * 255).round().byte().numpy()
        both.paste(Image.fromarray(values), (place, 0))
    return both

"""Python code that ships with a model: whether it is allowed, complete and in the folder, before any of it is run."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any, cast

from slim_core.errors import InvalidModelError, SecurityError, UnsupportedError

__all__ = ["failure_of_own_code", "uses_own_code"]

_CONFIG = "AutoConfig"
_REFERENCE = re.compile(r"([\w-]+)\.(\w+)")


def uses_own_code(
    folder: Path, config: dict[str, Any], *, auto_class: str, what: str, trusted: bool, known: bool
) -> bool:
    """Whether transformers will run code of the model folder.

    Args:
        config: the content of ``config.json``.
        auto_class: under which ``auto_map`` names the model class.
        what: such a model is called.
        trusted: ``--trust_remote_code``.
        known: transformers has a class for this model as well, which serves where the code is not trusted.

    Raises:
        SecurityError: the code is needed and not trusted, or lies in another repository.
        InvalidModelError: ``auto_map`` is malformed, or the code that it names is not there.
        UnsupportedError: the code has no such model.
    """
    named: Any = config.get("auto_map")
    if not named or (known and not trusted):
        return False
    where = str(folder / "config.json")
    if not trusted:
        raise SecurityError(
            "this model needs Python code that ships with it",
            where=where,
            remedy="read that code, then pass --trust_remote_code True",
        )
    if not isinstance(named, dict):
        raise InvalidModelError(f"auto_map is no object, but {named!r:.100}", where=where, remedy="download it again")
    references = cast("dict[str, Any]", named)
    for name in (_CONFIG, auto_class):
        if name in references:
            _check_reference(folder, name, references[name], known=known)
    if not known and auto_class not in references:
        raise UnsupportedError(
            f"the code of this model has no {what}: auto_map does not name {auto_class}",
            where=where,
            remedy=f"only {what}s can be quantized by this kind of recipe; check the file if this is one",
        )
    return _CONFIG in references or auto_class in references


def _check_reference(folder: Path, name: str, reference: Any, *, known: bool) -> None:
    where = str(folder / "config.json")
    if isinstance(reference, str) and "--" in reference:
        repository, _, local = reference.partition("--")
        raise SecurityError(
            f"auto_map.{name} names code of another repository ({repository!r}); nothing is loaded from the network",
            where=where,
            remedy=f"copy that code into the folder, read it, and write {local!r} there",
        )
    found = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if found is None:
        raise InvalidModelError(
            f"auto_map.{name} is {reference!r:.100}, no name like 'modeling_mine.MyModel'",
            where=where,
            remedy="download it again",
        )
    if not (folder / f"{found[1]}.py").is_file():
        way_out = ", or pass --trust_remote_code False: transformers has this model too" if known else ""
        raise InvalidModelError(
            f"auto_map.{name} needs {found[1]}.py, which is not in the folder",
            where=where,
            remedy=f"download the Python files of the model too{way_out}",
        )


def failure_of_own_code(folder: Path, error: BaseException) -> InvalidModelError:
    """What went wrong while code of the model folder ran, and where in it."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return InvalidModelError(
        f"the code that ships with the model fails: {type(error).__name__}: {said:.300}",
        where=_place(folder, error),
        remedy="complete the folder, install what the code asks for, or use the transformers that it was written for",
    )


def _place(folder: Path, error: BaseException) -> str:
    """File and line of the folder, as far as the error tells; transformers runs copies, and parses without a name."""
    files = sorted(folder.glob("*.py"))
    if isinstance(error, SyntaxError):
        for path in files:
            try:
                compile(path.read_bytes(), path, "exec")
            except (SyntaxError, ValueError) as found:
                return f"{path}:{getattr(found, 'lineno', None) or 1}"
    names = {path.name for path in files}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name in names]
    return f"{folder / Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else str(folder)

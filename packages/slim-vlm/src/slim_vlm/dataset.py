"""Calibration sets of images: from the name in a recipe to samples.

==================================  ================================================================================
what ``spec.dataset`` names         samples
==================================  ================================================================================
a folder of pictures                one per picture, in the order of their names, each with the default prompt
a folder with one JSON or JSONL     what the file lists
a ``.json`` file                    an array of records, or one record
a ``.jsonl`` file                   one record per line
==================================  ================================================================================

A record is an object with ``image``, a path, and if wanted ``text``, the prompt, and ``answer``, which only an
evaluation reads. Pictures themselves are opened by :mod:`slim_vlm.images`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slim_core.errors import InvalidDatasetError
from slim_core.logging import get_logger
from slim_llm.resources import CALIBRATION_FOLDER as TEXT_FOLDER
from slim_vlm.records import TEXT_SET, Record, read_records
from slim_vlm.resources import CALIBRATION_FOLDER

__all__ = ["IMAGE_SUFFIXES", "ImageSample", "find_dataset", "read_samples"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_logger = get_logger(__name__)
_RECORD_SUFFIXES = (".json", ".jsonl")
_MAX_BYTES = 256 << 20
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class ImageSample:
    """A picture and a prompt.

    Attributes:
        where: where the sample was found: ``file:line`` of a JSONL file, ``file[index]`` of an array, ``file`` if it is
            the only record of a JSON file, the path of the picture if there is no file.
        image: the picture.
        text: the prompt.
        answer: what a good model would answer, for evaluations; may be empty.
    """

    where: str
    image: Path
    text: str
    answer: str = ""


def find_dataset(name: str) -> Path:
    """The file or folder behind ``spec.dataset``.

    A bare name is a bundled set, or else something in the working folder; what has a separator is a path.

    Raises:
        InvalidDatasetError: there is nothing of that name.
    """
    path = Path(name)
    if name not in ("", ".", "..") and not {os.sep, os.altsep} & set(name):
        for folder in (CALIBRATION_FOLDER, TEXT_FOLDER):
            bundled = folder / name
            if os.path.exists(bundled):
                if os.path.exists(path) and os.path.realpath(path) != os.path.realpath(bundled):
                    _logger.warning(
                        "the bundled calibration set %s is used, not what has this name in the working folder "
                        "(that would be ./%s)",
                        name,
                        name,
                    )
                return bundled
    if os.path.exists(name):  # false for what no file can be called, too
        return path
    problem = "leads nowhere" if os.path.islink(name) else "does not exist"
    raise InvalidDatasetError(
        f"the calibration set {name!r} {problem}",
        where="spec.dataset",
        remedy=f"give the path of a folder, a .json or a .jsonl file, or one of: {', '.join(_bundled_sets())}",
    )


def _bundled_sets() -> list[str]:
    return sorted(entry.name for entry in CALIBRATION_FOLDER.iterdir() if entry.is_dir() and entry.name[0] not in "._")


def read_samples(path: Path, default_text: str, *, answers: bool = False) -> list[ImageSample]:
    """All samples of a set, each checked as far as that goes without opening the picture.

    Args:
        path: of a folder or of a JSON or JSONL file.
        default_text: the prompt of samples that have none.
        answers: whether every sample must have an answer.

    Raises:
        InvalidDatasetError: the set is empty or of another kind, has samples without a picture, or a record, a path or
            a file that is not as it should be. The message names the line.
    """
    if path.is_dir():
        return _read_folder(path, default_text, answers)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InvalidDatasetError(
            "is a picture, not a set of pictures",
            where=str(path),
            remedy="give its folder, or a .jsonl file that lists it",
        )
    if path.suffix.lower() not in _RECORD_SUFFIXES:
        raise InvalidDatasetError(
            f"{path.suffix!r} files are not read" + (f": {TEXT_SET}" if path.suffix.lower() == ".txt" else ""),
            where=str(path),
            remedy="give a folder of pictures, a .json or a .jsonl file",
        )
    return _from_records(path, default_text, answers)


def _read_folder(folder: Path, default_text: str, answers: bool) -> list[ImageSample]:
    """Files of the folder itself. Folders in it are not entered, and hidden files are none of ours."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InvalidDatasetError(
            f"cannot be read: {error.strerror}", where=str(folder), remedy="check the folder and its permissions"
        ) from error
    files = [folder / name for name in names if not (folder / name).is_dir()]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    records = [file for file in files if file.suffix.lower() in _RECORD_SUFFIXES]
    if len(records) > 1:
        raise InvalidDatasetError(
            f"has {len(records)} files that could list the samples: {_some(file.name for file in records)}",
            where=str(folder),
            remedy="name the one to use as the dataset, or leave only that one in the folder",
        )
    if records:
        samples = _from_records(records[0], default_text, answers)
        listed = {os.path.realpath(sample.image) for sample in samples}
        unlisted = [image.name for image in images if os.path.realpath(image) not in listed]
        if unlisted:
            _logger.warning(
                "%d of the pictures in %s are not used, because %s does not list them: %s",
                len(unlisted),
                folder,
                records[0].name,
                _some(unlisted),
            )
        return samples
    if not images:
        raise InvalidDatasetError(
            "there is no picture in the folder, and no JSON or JSONL file that lists some",
            where=str(folder),
            remedy=f"add pictures ({', '.join(IMAGE_SUFFIXES)}); folders in the folder are not searched",
        )
    if answers:
        raise InvalidDatasetError(
            "is a folder of pictures without answers",
            where=str(folder),
            remedy="add a .jsonl file of one object per line, with 'image', 'text' and 'answer'",
        )
    for image in images:
        _check_file(str(image), image)
    return [ImageSample(str(image), image, default_text) for image in images]


def _from_records(path: Path, default_text: str, answers: bool) -> list[ImageSample]:
    records = read_records(path)
    for record in records:
        if answers and not record.answer.strip():
            raise InvalidDatasetError(
                "the sample has no answer, and an evaluation needs one",
                where=record.where,
                remedy="add 'answer', what a good model would say, or leave the sample out",
            )
    samples = [
        ImageSample(record.where, _image_of(record, path.parent), record.text or default_text, record.answer)
        for record in records
    ]
    without = [record.where for record in records if not record.text]
    if without:
        _logger.warning(
            "%d of the %d samples of %s have no text and get the default prompt, %r; the first is %s",
            len(without),
            len(records),
            path,
            default_text,
            without[0],
        )
    return samples


def _image_of(record: Record, folder: Path) -> Path:
    """The picture that a record names.

    A relative path stays inside of the folder, whatever links there are on the way, so that a set that was fetched from
    somewhere reads nothing but its own files. An absolute path was written for this machine, and on purpose.
    """
    path, where = Path(record.image), record.where
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        remedy = f"use pictures of the kinds {', '.join(IMAGE_SUFFIXES)}"
        raise _fault(where, record.image, f"has the suffix {path.suffix!r}", remedy)
    outside = _fault(
        where,
        record.image,
        f"lies outside of {folder}",
        "put the picture into the folder, or write its absolute path",
    )
    if not path.is_absolute() and _climbs_out(path):
        raise outside
    image = folder / path
    real = _check_file(where, image, record.image)
    if not path.is_absolute() and not Path(real).is_relative_to(os.path.realpath(folder)):
        raise outside
    return image


def _climbs_out(path: Path) -> bool:
    depth = 0
    for part in path.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _fault(where: str, name: str, problem: str, remedy: str) -> InvalidDatasetError:
    return InvalidDatasetError(f"the image {name!r} {problem}" if name else problem, where=where, remedy=remedy)


def _check_file(where: str, path: Path, name: str = "") -> str:
    """The real path of a picture; an error unless it is a file of a fair size.

    Args:
        name: how a record calls it; empty if ``where`` is the picture.
    """
    try:
        found = os.stat(path)  # first, because realpath takes "a.jpg/.." for the folder, where the system refuses
        real = os.path.realpath(path, strict=True)
    except FileNotFoundError as error:
        problem = "is a link to something that does not exist" if path.is_symlink() else "does not exist"
        remedy = "correct the path; a relative one starts at the folder of the file that lists it"
        raise _fault(where, name, problem, remedy if name else "remove the link") from error
    except OSError as error:  # a loop of links, a file where a folder should be, a name that is too long, no permission
        raise _fault(where, name, f"cannot be opened: {error.strerror}", "correct the path or the link") from error
    if stat.S_ISDIR(found.st_mode):
        raise _fault(where, name, "is a folder", "list the pictures in it one by one")
    if not stat.S_ISREG(found.st_mode):
        raise _fault(where, name, "is not a regular file", "use a picture file")
    if found.st_size > _MAX_BYTES:
        raise _fault(where, name, "is larger than 256 MiB", "scale the picture down")
    return real


def _some(names: Iterable[str]) -> str:
    """A few names for a message."""
    every = list(names)
    shown = ", ".join(every[:_NAMES_SHOWN])
    return shown if len(every) <= _NAMES_SHOWN else f"{shown}, and {len(every) - _NAMES_SHOWN} more"

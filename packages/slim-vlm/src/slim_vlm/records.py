"""The JSON and JSONL files that list the samples of a set of images: from bytes to checked records.

Nothing here touches a picture; paths are as they are written. The rules are strict, because a record that is skipped or
misread shrinks a calibration set without anybody noticing.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from slim_core.errors import InvalidDatasetError

__all__ = ["TEXT_SET", "Record", "read_records"]

TEXT_SET = (
    "texts are what modelslim_v1 calibrates language models with, while a vision-language model is shown "
    "pictures and prompts"
)

_KEYS = ("image", "text", "answer")
_OTHER_MEDIA = ("audio", "video")
_TEXT_KEYS = {"inputs_pretokenized", "messages", "prompt", "text"}
_MAX_BYTES = 64 << 20
_EXAMPLE = '{"image": "photo.jpg", "text": "What is this?"}'


@dataclass(frozen=True)
class Record:
    """What a file says of a sample: where that stands, and three texts, of which ``image`` is not empty."""

    where: str
    image: str
    text: str
    answer: str


def read_records(path: Path) -> list[Record]:
    """All records of a ``.json`` or ``.jsonl`` file, in order, at least one.

    Raises:
        InvalidDatasetError: the file cannot be read, is no UTF-8 or no JSON, is empty, or has a record with an unknown
            key, without an image, with a value of another type or with a blank text.
    """
    content = _text_of(path)
    values = _lines(path, content) if path.suffix.lower() == ".jsonl" else _array(path, content)
    records = [_record(where, value) for where, value in values]
    if not records:
        raise InvalidDatasetError("lists no sample", where=str(path), remedy=f"add some, such as {_EXAMPLE}")
    return records


def _text_of(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe would wait
            raise InvalidDatasetError("is not a regular file", where=str(path), remedy="use a file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InvalidDatasetError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="check the file and its permissions"
        ) from error
    if len(data) > _MAX_BYTES:
        raise InvalidDatasetError("is larger than 64 MiB", where=str(path), remedy="use fewer samples")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidDatasetError(
            f"is not UTF-8 text (byte {error.start})", where=f"{path}:{line}", remedy="save the file as UTF-8"
        ) from error


class _RepeatedKeyError(ValueError):
    """A key that one object has twice, of which JSON readers keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values


def _parse(where: str, content: str, remedy: str) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        raise InvalidDatasetError(f"in one object, {error}", where=where, remedy="write a record for each") from error
    except (ValueError, RecursionError) as error:
        raise InvalidDatasetError(f"not valid JSON: {error}", where=where, remedy=remedy) from error


def _array(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    if content.strip():
        remedy = "correct it; a file of one object per line must be called .jsonl"
        value = _parse(str(path), content, remedy)
        if isinstance(value, list):
            yield from ((f"{path}[{i}]", record) for i, record in enumerate(value))
        else:
            yield str(path), value


def _lines(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines: separators such as U+2028 may stand inside of a JSON string.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse(where, line, "write one JSON object per line")


def _record(where: str, value: Any) -> Record:
    if isinstance(value, str):
        raise _without_image(where, "is a text without an image", f"write {_EXAMPLE}")
    if not isinstance(value, dict):
        raise InvalidDatasetError(f"is {_kind(value)}, not an object", where=where, remedy=f"write {_EXAMPLE}")
    if value.get("image") is None and _TEXT_KEYS & value.keys() and not any(_nearest(key) == "image" for key in value):
        raise _without_image(where, "has no 'image'", "add the path of a picture, or take another set")
    for key in value:
        _check_key(where, key, value[key])
    image = _string(where, "image", value.get("image"))
    if not image:
        raise InvalidDatasetError("has no 'image'", where=where, remedy="add the path of a picture")
    if "\0" in image:
        raise InvalidDatasetError("'image' holds the character NUL", where=where, remedy="correct the path")
    text = _string(where, "text", value.get("text"))
    if text and not text.strip():
        raise InvalidDatasetError(
            "'text' is blank", where=where, remedy="write a prompt, or leave the key out for the default one"
        )
    return Record(where, image, text, _string(where, "answer", value.get("answer")))


def _without_image(where: str, problem: str, remedy: str) -> InvalidDatasetError:
    return InvalidDatasetError(f"{problem}: {TEXT_SET}", where=where, remedy=remedy)


def _check_key(where: str, key: str, value: Any) -> None:
    if key in _KEYS:
        return
    if key in _OTHER_MEDIA:
        if value is not None:
            raise InvalidDatasetError(
                f"has {key!r}, but only images are calibrated", where=where, remedy="leave the key out, or make it null"
            )
        return
    near = _nearest(key)
    raise InvalidDatasetError(
        f"unknown key {key!r}",
        where=where,
        remedy=f"did you mean {near!r}?" if near else f"a sample has {', '.join(map(repr, _KEYS))}",
    )


def _nearest(key: str) -> str | None:
    """The key that an unknown one was probably meant to be."""
    if key in _KEYS or key in _TEXT_KEYS:
        return None
    return next(iter(get_close_matches(key.lower(), (*_KEYS, *_OTHER_MEDIA), n=1)), None)


def _string(where: str, key: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidDatasetError(f"{key!r} is {_kind(value)}, not a string", where=where, remedy="put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidDatasetError(
            f"{key!r} holds half of a surrogate pair ({value[error.start]!a})", where=where, remedy="remove it"
        ) from error
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")

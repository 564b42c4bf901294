"""Calibration text: from a file to token ids.

========================  ==================================================================================
file                      samples
========================  ==================================================================================
``.jsonl``                one JSON value per line
``.json``                 an array of such values
``.txt``                  paragraphs, separated by blank lines
========================  ==================================================================================

A value is a string, or an object with ``inputs_pretokenized`` (or ``text``, or ``prompt``), or with ``messages``, which
go through the tokenizer's chat template. An object with none of these is used as its own JSON text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slim_core.errors import InvalidDatasetError
from slim_core.logging import get_logger
from slim_core.recipe import DatasetConfig
from slim_llm.resources import CALIBRATION_FOLDER

__all__ = ["TextSample", "find_dataset", "read_samples", "tokenize", "tokenize_extra"]

_logger = get_logger(__name__)
_TEXT_KEYS = ("inputs_pretokenized", "text", "prompt")
_MAX_BYTES = 4 << 30
_TAKEN, _CANDIDATES = 16, 1024


@dataclass(frozen=True)
class TextSample:
    """A text or a conversation, and where it came from (``file:line``)."""

    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()


def find_dataset(name: str) -> Path:
    """The file behind ``spec.dataset``: an absolute path, one below the working folder, or a bundled set.

    Raises:
        InvalidDatasetError: there is no such file, or its kind is not known.
    """
    bundled = CALIBRATION_FOLDER / name
    path = Path(name)
    if not path.exists():
        path = bundled
    elif not Path(name).is_absolute() and bundled.exists() and path.resolve() != bundled.resolve():
        _logger.warning("%s in the working folder is used, not the bundled calibration set of that name", name)
    if not path.is_file():
        have = ", ".join(sorted(file.name for file in CALIBRATION_FOLDER.glob("*.json*")))
        raise InvalidDatasetError(
            f"there is no calibration set {name!r}", where="spec.dataset", remedy=f"give a path, or one of: {have}"
        )
    if path.suffix not in (".json", ".jsonl", ".txt"):
        raise InvalidDatasetError(f"{path.suffix!r} files are not read", where=name, remedy="use .jsonl, .json or .txt")
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidDatasetError("the file is larger than 4 GiB", where=name, remedy="use fewer samples")
    return path


def read_samples(path: Path) -> list[TextSample]:
    """All samples of a file, each line checked.

    Raises:
        InvalidDatasetError: not UTF-8, not JSON, an empty line or sample, a malformed conversation, no sample at all.
    """
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidDatasetError(
            f"is not UTF-8 text (byte {error.start})", where=str(path), remedy="save it as UTF-8"
        ) from error
    except OSError as error:
        raise InvalidDatasetError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="check the file and its permissions"
        ) from error
    if path.suffix == ".txt":
        parts = [part.strip() for part in re.split(r"\n\s*\n", content)]
        samples = [TextSample(str(path), text=part) for part in parts if part]
    else:
        values = _array(path, content) if path.suffix == ".json" else _lines(path, content)
        samples = [_sample(where, value) for where, value in values]
    if not samples:
        raise InvalidDatasetError("the calibration set is empty", where=str(path), remedy="add samples")
    return samples


def _array(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidDatasetError(f"not valid JSON: {error}", where=str(path), remedy="correct it") from error
    if not isinstance(values, list):
        raise InvalidDatasetError("must hold a JSON array", where=str(path), remedy="use .jsonl for one value per line")
    return ((f"{path}[{i}]", value) for i, value in enumerate(values))


def _lines(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    lines = content.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise InvalidDatasetError("the line is empty", where=where, remedy="remove it")
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidDatasetError(
                f"not valid JSON: {error}", where=where, remedy="write one JSON value per line"
            ) from error


def _sample(where: str, value: Any) -> TextSample:
    if isinstance(value, str):
        return _text(where, value)
    if not isinstance(value, dict):
        raise InvalidDatasetError(
            f"is a {type(value).__name__}, not an object or a string",
            where=where,
            remedy='write {"text": "..."}, or see docs/calibration.md',
        )
    for key in _TEXT_KEYS:
        if key in value:
            if not isinstance(value[key], str):
                raise InvalidDatasetError(f"{key!r} is not a string", where=where, remedy="put the text in quotes")
            return _text(where, value[key])
    if "messages" in value:
        return TextSample(where, messages=_conversation(where, value["messages"]))
    return _text(where, json.dumps(value, ensure_ascii=False))


def _text(where: str, text: str) -> TextSample:
    if not text.strip():
        raise InvalidDatasetError("the text is empty", where=where, remedy="remove the sample")
    return TextSample(where, text=text)


def _conversation(where: str, messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise InvalidDatasetError("'messages' must be a non-empty list", where=where)
    for i, message in enumerate(messages):
        ok = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not ok or not isinstance(message.get("content"), str):
            raise InvalidDatasetError(f"messages[{i}] needs a 'role' and a 'content', both strings", where=where)
    return tuple(messages)


def tokenize(
    samples: list[TextSample], tokenizer: Any, dataset: DatasetConfig, max_positions: int | None
) -> list[dict[str, Any]]:
    """Keyword arguments of the model for each forward.

    Samples are cut to ``dataset.max_length`` if it is given and to what the model can take. Only samples of one length
    share a forward, so there is no padding and batching does not change what a token sees.

    Args:
        max_positions: longest sequence of the model, None if there is no limit.

    Raises:
        InvalidDatasetError: a sample has no tokens, or the chat template refuses a conversation.
    """
    return _batches(_ids_of(samples[: dataset.num_samples], tokenizer, dataset, max_positions), dataset.batch_size)


def tokenize_extra(
    samples: list[TextSample],
    tokenizer: Any,
    dataset: DatasetConfig,
    max_positions: int | None,
    main: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """:func:`tokenize` for extra samples: those beyond ``dataset.num_samples``, in the order of the file, that fit into
    ``dataset.extra_share`` times the tokens of the main ones.

    Args:
        main: what :func:`tokenize` made.

    Raises:
        InvalidDatasetError: as there.
    """
    start = len(samples) if dataset.num_samples is None else dataset.num_samples
    budget = math.floor(dataset.extra_share * sum(given["input_ids"].numel() for given in main))
    fitting: list[list[int]] = []
    for first in range(start, len(samples), _TAKEN):  # a long file is not tokenized beyond what is needed
        for ids in _ids_of(samples[first : first + _TAKEN], tokenizer, dataset, max_positions):
            if len(ids) <= budget:
                fitting.append(ids)
                budget -= len(ids)
        if not budget or first - start >= _CANDIDATES:
            break
    return _batches(fitting, dataset.batch_size)


def _ids_of(
    samples: list[TextSample], tokenizer: Any, dataset: DatasetConfig, max_positions: int | None
) -> list[list[int]]:
    limit = min(filter(None, (dataset.max_length, max_positions)), default=None)
    encoded: list[list[int]] = []
    too_long = 0
    for sample in samples:
        ids = _encode(sample, tokenizer)
        if not ids:
            raise InvalidDatasetError(
                "the sample has no tokens", where=sample.where, remedy="remove the sample, or check the tokenizer"
            )
        too_long += bool(max_positions and len(ids) > max_positions and not dataset.max_length)
        encoded.append(ids[:limit])
    if too_long:
        _logger.warning("%d calibration samples were cut to the model's %s positions", too_long, max_positions)
    return encoded


def _batches(encoded: list[list[int]], batch_size: int) -> list[dict[str, Any]]:
    batches: list[list[list[int]]] = []
    open_batch: dict[int, list[list[int]]] = {}
    for ids in encoded:
        batch = open_batch.get(len(ids))
        if batch is None or len(batch) >= batch_size:
            batch = open_batch[len(ids)] = []
            batches.append(batch)
        batch.append(ids)
    return [{"input_ids": torch.tensor(batch), "use_cache": False} for batch in batches]


def _encode(sample: TextSample, tokenizer: Any) -> list[int]:
    if not sample.messages:
        return _ids(sample.where, sample.text, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in sample.messages)
        return _ids(sample.where, text, tokenizer)
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(sample.messages), tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InvalidDatasetError(
            f"the tokenizer's chat template refuses the conversation: {error}",
            where=sample.where,
            remedy="change the sample, or write it as plain text",
        ) from error
    return _ids(sample.where, text, tokenizer, add_special_tokens=False)


def _ids(where: str, text: str, tokenizer: Any, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidDatasetError(
            f"the text holds half of a surrogate pair ({text[error.start]!a})", where=where, remedy="remove it"
        ) from error
    return list(tokenizer(text, **options)["input_ids"])

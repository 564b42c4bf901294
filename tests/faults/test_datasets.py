"""Broken calibration sets. A row: what is done to a good one, and kind, words, place and way out of the message."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

DATASET, MODEL = "202 InvalidDatasetError", "201 InvalidModelError"
GOOD = '{"text": "good"}\n'


def lines(*rows: str | bytes) -> Callable[..., None]:
    """Good lines and bad ones."""
    data = b"".join(row.encode() if isinstance(row, str) else row for row in rows)
    return lambda w: w.dataset.write_bytes(data) and None


def named(name: str, content: str = GOOD) -> Callable[..., None]:
    """A set under another name."""

    def change(w) -> None:
        (w.folder / name).write_text(content)
        w.edit(str(w.dataset), name)

    return change


def messages(value: object) -> Callable[..., None]:
    return lines(GOOD, json.dumps({"messages": value}) + "\n")


def unreadable(w) -> None:
    w.dataset.unlink()
    w.dataset.symlink_to("/proc/self/mem")


def huge(w) -> None:
    os.truncate(w.dataset, (4 << 30) + 1)
    # The workplace is compared by content, and this content is better not read.
    read = Path.read_bytes
    w.patch.setattr(Path, "read_bytes", lambda path: b"" if path == w.dataset else read(path))


def swallow(w) -> None:
    """A tokenizer that drops every character."""
    path = w.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    path.write_text(json.dumps(tokenizer))
    (w.model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def template(text: str) -> Callable[..., None]:
    def change(w) -> None:
        path = w.model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))

    return change


def small_vocabulary(w) -> None:
    w.configure(vocab_size=16)
    w.change(lambda t: t.update({n: t[n][:16].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}))


ROWS = {
    "missing": (
        lambda w: w.dataset.unlink(),
        DATASET,
        "there is no calibration set",
        "spec.dataset",
        "mix_calib.jsonl",
    ),
    "unknown name": (
        lambda w: w.edit(str(w.dataset), "mixcalib.jsonl"),
        DATASET,
        "there is no calibration set 'mixcalib.jsonl'",
        "spec.dataset",
        "one of: mix_calib.jsonl",
    ),
    "a folder": (
        lambda w: (w.dataset.unlink(), w.dataset.mkdir()),
        DATASET,
        "there is no calibration set",
        "spec.dataset",
        "give a path",
    ),
    "table": (named("data.csv"), DATASET, "'.csv' files are not read", "data.csv", "use .jsonl, .json or .txt"),
    "no suffix": (named("data"), DATASET, "'' files are not read", "data", "use .jsonl, .json or .txt"),
    "larger than 4 GiB": (huge, DATASET, "larger than 4 GiB", "{dataset}", "use fewer samples"),
    "unreadable": (unreadable, DATASET, "cannot be read: Input/output error", "{dataset}", "check the file"),
    "empty": (lines(""), DATASET, "the calibration set is empty", "{dataset}", "add samples"),
    "empty array": (named("data.json", "[]"), DATASET, "the calibration set is empty", "data.json", "add samples"),
    "blank text": (named("data.txt", "\n \n\n"), DATASET, "the calibration set is empty", "data.txt", "add samples"),
    "blank line": (lines(GOOD, "\n", GOOD), DATASET, "the line is empty", "{dataset}:2", "remove it"),
    "broken line": (lines(GOOD, '{"text": "x"\n'), DATASET, "not valid JSON", "{dataset}:2", "one JSON value per line"),
    "array over several lines": (lines("[\n", GOOD, "]\n"), DATASET, "not valid JSON", "{dataset}:1", "per line"),
    "nested too deeply": (lines(GOOD, "[" * 99_999, "\n"), DATASET, "not valid JSON", "{dataset}:2", "per line"),
    "number": (lines(GOOD, "17\n"), DATASET, "is a int, not an object or a string", "{dataset}:2", 'write {"text"'),
    "list": (lines(GOOD, '["a", "b"]\n'), DATASET, "is a list, not an object", "{dataset}:2", 'write {"text"'),
    "null": (lines(GOOD, "null\n"), DATASET, "is a NoneType, not an object", "{dataset}:2", 'write {"text"'),
    "text is a number": (lines(GOOD, '{"text": 5}\n'), DATASET, "'text' is not a string", "{dataset}:2", "in quotes"),
    "empty text": (lines(GOOD, '{"text": " "}\n'), DATASET, "the text is empty", "{dataset}:2", "remove the sample"),
    "no messages": (messages([]), DATASET, "'messages' must be a non-empty list", "{dataset}:2", "must be"),
    "messages are text": (messages("hi"), DATASET, "'messages' must be a non-empty list", "{dataset}:2", "must be"),
    "message without a role": (
        messages([{"role": "user", "content": "x"}, {"content": "y"}]),
        DATASET,
        "messages[1]",
        "{dataset}:2",
        "needs a 'role' and a 'content'",
    ),
    "message of parts": (
        messages([{"role": "user", "content": [{"type": "text"}]}]),
        DATASET,
        "messages[0]",
        "{dataset}:2",
        "both strings",
    ),
    "object for an array": (named("data.json", GOOD), DATASET, "must hold a JSON array", "data.json", "use .jsonl"),
    "broken array": (named("data.json", '["a", "b"'), DATASET, "not valid JSON", "data.json", "correct it"),
    "wrong item of an array": (named("data.json", '["a", 5]'), DATASET, "is a int", "data.json[1]", 'write {"text"'),
    "not UTF-8": (lines(GOOD, b'{"text": "caf\xe9"}\n'), DATASET, "is not UTF-8 text", "{dataset}", "save it as UTF-8"),
    "half a surrogate pair": (lines(GOOD, '{"text": "\\ud83d"}\n'), DATASET, "surrogate", "{dataset}:2", "remove it"),
    "no tokens": (swallow, MODEL, "it turns text into nothing", "{model}", "copy the tokenizer files"),
    "refusing template": (
        template("{{ raise_exception('roles must alternate') }}"),
        DATASET,
        "chat template refuses the conversation: roles must alternate",
        "{dataset}:2",
        "change the sample",
    ),
    "broken template": (
        template("{% if %}"),
        DATASET,
        "chat template refuses the conversation",
        "{dataset}:2",
        "change the sample",
    ),
    "tokens beyond the vocabulary": (
        small_vocabulary,
        MODEL,
        "the tokenizer gives id | the model has 16 embeddings",
        "{model}",
        "copy the tokenizer that belongs to the model",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), ROWS.values(), ids=ROWS)
def test_broken_dataset(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    fault(workplace)
    refused(kind, what, where, remedy)

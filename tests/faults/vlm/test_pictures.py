"""Broken pictures, and broken lists of them.

A row: what is done to a workplace where all is right, and kind, words, place and way out of the message.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable

import pytest

DATASET = "202 InvalidDatasetError"
GOOD = ({"image": "a.png"}, {"image": "more/b.jpg"})


def record(value: object) -> Callable[..., None]:
    """A third record, after two good ones."""
    return lambda w: w.break_third(value)


def array(value: object) -> Callable[..., None]:
    """The same in a JSON file."""

    def change(w) -> None:
        w.dataset.unlink()
        (w.pictures / "index.json").write_text(json.dumps([*GOOD, value]))

    return change


def lines(text: bytes) -> Callable[..., None]:
    return lambda w: w.dataset.write_bytes(text) and None


def dataset(name: str, change: Callable[..., object] = lambda w: None) -> Callable[..., None]:
    """Another set in the recipe; the name may name places of the workplace."""

    def both(w) -> None:
        change(w)
        w.edit(f"dataset: {w.pictures}", f"dataset: {w.fill(name)}")

    return both


def contents(data: bytes, name: str = "c.jpg") -> Callable[..., None]:
    """A third record, whose picture is these bytes."""

    def change(w) -> None:
        (w.pictures / name).write_bytes(data)
        record({"image": name})(w)

    return change


def link(to: str, name: str = "c.jpg") -> Callable[..., None]:
    def change(w) -> None:
        (w.pictures / name).symlink_to(w.fill(to))
        record({"image": name})(w)

    return change


def folder_of(*names: str) -> Callable[..., None]:
    """An own folder as the set, with empty files of these names."""

    def change(w) -> None:
        (w.folder / "own").mkdir()
        for name in names:
            (w.folder / "own" / name).touch()

    return dataset("own/", change)


def huge_png(width: int, height: int) -> bytes:
    """The header of a picture, and nothing of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def both_lists(w) -> None:
    (w.pictures / "old.json").write_text("[]")


def truncated(w) -> None:
    whole = (w.pictures / "more" / "b.jpg").read_bytes()
    contents(whole[: len(whole) // 2])(w)


THIRD, THIRD_ITEM = "{dataset}:3", "index.json[2]"
OUTSIDE = "put the picture into the folder, or write its absolute path"
PICTURES = {
    "json and jsonl": (
        both_lists,
        DATASET,
        "has 2 files that could list the samples: index.jsonl, old.json",
        "{folder}/pictures",
        "name the one to use",
    ),
    "missing": (record({"image": "z.png"}), DATASET, "the image 'z.png' does not exist", THIRD, "correct the path"),
    "missing, json": (array({"image": "z.png"}), DATASET, "'z.png' does not exist", THIRD_ITEM, "correct the path"),
    "absolute and missing": (record({"image": "/no/z.png"}), DATASET, "does not exist", THIRD, "correct the path"),
    "outside": (record({"image": "../outside.png"}), DATASET, "'../outside.png' lies outside of", THIRD, OUTSIDE),
    "outside, json": (array({"image": "../outside.png"}), DATASET, "lies outside of", THIRD_ITEM, OUTSIDE),
    "climbs out": (record({"image": "more/../../outside.png"}), DATASET, "lies outside of", THIRD, OUTSIDE),
    "out and in": (record({"image": "../pictures/a.png"}), DATASET, "lies outside of", THIRD, OUTSIDE),
    "link to the outside": (link("{folder}/outside.png"), DATASET, "'c.jpg' lies outside of", THIRD, OUTSIDE),
    "link to itself": (
        link("c.jpg"),
        DATASET,
        "'c.jpg' cannot be opened: Too many levels of symbolic links",
        THIRD,
        "correct the path or the link",
    ),
    "link to nowhere": (link("gone.jpg"), DATASET, "is a link to something that does not exist", THIRD, "correct"),
    "no permission to look": (record({"image": "a.png/b.png"}), DATASET, "cannot be opened: Not a dir", THIRD, "path"),
    "a folder": (
        lambda w: ((w.pictures / "d.png").mkdir(), record({"image": "d.png"})(w)),
        DATASET,
        "the image 'd.png' is a folder",
        THIRD,
        "one by one",
    ),
    "another suffix": (record({"image": "a.webp"}), DATASET, "has the suffix '.webp'", THIRD, ".jpg, .jpeg, .png"),
    "NUL": (record({"image": "a\0.png"}), DATASET, "NUL", THIRD, "correct the path"),
    "zero bytes": (contents(b""), DATASET, "c.jpg' is empty", THIRD, "replace the file"),
    "no picture": (contents(b"hello"), DATASET, "c.jpg' is neither a JPEG nor a PNG", THIRD, "convert it"),
    "a GIF": (contents(b"GIF89a" + b"\0" * 40), DATASET, "neither a JPEG nor a PNG", THIRD, "convert it"),
    "cut short": (truncated, DATASET, "c.jpg' is incomplete or broken", THIRD, "replace the file"),
    "huge": (
        contents(huge_png(20_000, 20_000), "c.png"),
        DATASET,
        "has 20000 x 20000 pixels, more than 64 million",
        THIRD,
        "scale the picture down",
    ),
    "unknown key": (
        record({"image": "a.png", "txt": "?"}),
        DATASET,
        "unknown key 'txt'",
        THIRD,
        "did you mean 'text'?",
    ),
    "misspelt image": (record({"imgae": "a.png"}), DATASET, "unknown key 'imgae'", THIRD, "did you mean 'image'?"),
    "far-off key": (record({"image": "a.png", "x": 1}), DATASET, "unknown key 'x'", THIRD, "'image', 'text', 'answer'"),
    "unknown key, json": (array({"image": "a.png", "txt": "?"}), DATASET, "unknown key", THIRD_ITEM, "mean 'text'?"),
    "a film": (record({"image": "a.png", "video": "a.mp4"}), DATASET, "has 'video'", THIRD, "leave the key out"),
    "blank text": (record({"image": "a.png", "text": " \n"}), DATASET, "'text' is blank", THIRD, "leave the key out"),
    "text is a number": (record({"image": "a.png", "text": 5}), DATASET, "is a number", THIRD, "in quotes"),
    "no image": (record({"text": "Hi"}), DATASET, "has no 'image'", THIRD, "add the path of a picture"),
    "bare text": (record("Hi"), DATASET, "is a text without an image", THIRD, 'write {"image"'),
    "bare text, json": (array("Hi"), DATASET, "is a text without an image", THIRD_ITEM, 'write {"image"'),
    "no record": (record(7), DATASET, "is a number, not an object", THIRD, 'write {"image"'),
    "broken line": (lines(b'{"image": "a.png"}\n\n{"image"\n'), DATASET, "not valid JSON", THIRD, "per line"),
    "key twice": (
        lines(b'\n\n{"image": "a.png", "image": "b.png"}\n'),
        DATASET,
        "the key 'image' stands twice",
        THIRD,
        "a record for each",
    ),
    "not UTF-8": (lines(b'\n\n{"image": "\xe9.png"}\n'), DATASET, "is not UTF-8 text", THIRD, "save the file as UTF-8"),
    "empty list": (lines(b"\n"), DATASET, "lists no sample", "{dataset}", "add some"),
    "texts by name": (
        dataset("mix_calib.jsonl"),
        DATASET,
        "has no 'image': texts are what modelslim_v1",
        "mix_calib.jsonl:1",
        "take another set",
    ),
    "texts by path": (
        dataset("own.jsonl", lambda w: (w.folder / "own.jsonl").write_text('{"inputs_pretokenized": "Hi"}\n')),
        DATASET,
        "has no 'image': texts are what modelslim_v1",
        "own.jsonl:1",
        "take another set",
    ),
    "plain text": (
        dataset("own.txt", lambda w: (w.folder / "own.txt").write_text("Hi\n")),
        DATASET,
        "'.txt' files are not read | texts are what",
        "own.txt",
        "give a folder of pictures",
    ),
    "one picture": (dataset("{folder}/outside.png"), DATASET, "is a picture, not a set", "outside.png", "its folder"),
    "empty folder": (folder_of(), DATASET, "there is no picture in the folder", "own", "add pictures (.jpg"),
    "folder without pictures": (folder_of("a.gif", "b.txt"), DATASET, "there is no picture", "own", "add pictures"),
    "folder of empty files": (folder_of("a.JPG"), DATASET, "the picture is empty", "own/a.JPG", "replace the file"),
    "no such name": (dataset("calibImage"), DATASET, "'calibImage' does not exist", "spec.dataset", "calibImages"),
    "no such folder": (dataset("{folder}/no"), DATASET, "/no' does not exist", "spec.dataset", "calibImages"),
    "a set that links to itself": (
        dataset("loop", lambda w: (w.folder / "loop").symlink_to("loop")),
        DATASET,
        "'loop' leads nowhere",
        "spec.dataset",
        "give the path of a folder",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), PICTURES.values(), ids=PICTURES)
def test_pictures(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    workplace.fill_save()
    fault(workplace)
    refused(kind, what, where, remedy, "--overwrite")

"""Recipe files that cannot be read as one. A row: what is done to a good one, and kind, words, place and way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SCHEMA, SECURITY, UNSUPPORTED = "203 SchemaValidateError", "204 SecurityError", "301 UnsupportedError"
PROCESS = "spec.process[0]"


def edit(old: str, new: str) -> Callable[..., None]:
    """Replace a part of the good recipe."""
    return lambda w: w.edit(old, new)


def text(content: str) -> Callable[..., None]:
    return lambda w: w.recipe.write_text(content)


def raw(content: bytes) -> Callable[..., None]:
    return lambda w: w.recipe.write_bytes(content)


def cut(start: str) -> Callable[..., None]:
    """Drop everything from ``start`` on."""
    return lambda w: w.recipe.write_text(w.recipe.read_text().partition(start)[0])


def links(w) -> None:
    w.recipe.unlink()
    w.recipe.symlink_to("/proc/self/mem")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)

FILES = {
    "missing": (lambda w: w.recipe.unlink(), SECURITY, "no such file", "{recipe}", "give the path of a YAML file"),
    "a folder": (
        lambda w: (w.recipe.unlink(), w.recipe.mkdir()),
        SECURITY,
        "is a folder",
        "{recipe}",
        "give the path of a YAML file",
    ),
    "unreadable": (links, SECURITY, "cannot be read: Input/output error", "{recipe}", "check the file"),
    "empty": (text(""), SCHEMA, "the file is empty", "{recipe}", "needs apiversion and spec"),
    "only comments": (text("# nothing\n"), SCHEMA, "the file is empty", "{recipe}", "needs apiversion and spec"),
    "binary": (
        raw(b"\x7fELF\x02\x01\x01\x00\xff\xfe\x80"),
        SCHEMA,
        "not UTF-8",
        "{recipe}:1",
        "save the file as UTF-8",
    ),
    "latin-1": (raw(b"# caf\n\n# caf\xe9\n"), SCHEMA, "byte 0xe9", "{recipe}:3", "save the file as UTF-8"),
    "control character": (edit("good", "go\x07od"), SCHEMA, "control character U+0007", "{recipe}:3", "remove it"),
    "17 MiB": (text("# x\n" * (5 << 20)), SECURITY, "larger than 16 MiB", "{recipe}", "small text file"),
    "a list": (text("- apiversion\n"), SCHEMA, "must hold a mapping", "{recipe}:1", "start with"),
    "a sentence": (text("quantize it all"), SCHEMA, "must hold a mapping", "{recipe}:1", "start with"),
    "open flow": (edit('["*"]', '["*"'), SCHEMA, "not valid YAML", "{recipe}:23", "expected ',' or ']'"),
    "tab": (edit("  runner", "\trunner"), SCHEMA, "not valid YAML", "{recipe}:7", "indent with spaces"),
    "two documents": (
        edit("spec:", "---\nspec:"),
        SCHEMA,
        "a second document starts here",
        "{recipe}:6",
        "keep one recipe per file",
    ),
    "missing spec": (cut("spec:"), SCHEMA, "spec is missing", "{recipe}", "add `spec:`"),
    "empty spec": (cut("  runner:"), SCHEMA, "spec is empty", "{recipe}:6", "add `spec:`"),
    "spec is a word": (
        text("apiversion: modelslim_v1\nspec: w8a8\n"),
        SCHEMA,
        "got 'w8a8'; must be a mapping",
        "{recipe}:2: spec",
        "indent its fields",
    ),
    "missing apiversion": (
        edit("apiversion: modelslim_v1\n", ""),
        SCHEMA,
        "apiversion is missing",
        "{recipe}",
        "add `apiversion: modelslim_v1`",
    ),
    "apiversion is a number": (
        edit("modelslim_v1", "1"),
        SCHEMA,
        "got 1",
        "{recipe}:1: apiversion",
        "must be a string",
    ),
    "duplicate key": (
        edit("  runner: layer_wise", "  runner: auto\n  runner: layer_wise"),
        SCHEMA,
        "duplicate key 'runner', first on line 7",
        "{recipe}:8:3",
        "remove one of the two",
    ),
    "key is a number": (
        edit("  score: 50", "  50: score"),
        SCHEMA,
        "a key must be a string",
        "{recipe}:4",
        'write "50"',
    ),
    "python tag": (
        edit("score: 50", "score: !!python/object/apply:os.system [echo]"),
        SCHEMA,
        "python/object/apply:os.system is not allowed",
        "{recipe}:4",
        "plain values only",
    ),
    "unknown anchor": (edit("score: 50", "score: *nobody"), SCHEMA, "undefined alias 'nobody'", "{recipe}:4", "alias"),
    "alias bomb": (
        lambda w: w.recipe.write_text(BOMB + w.recipe.read_text()),
        SCHEMA,
        "more than 100000 values once the aliases are expanded",
        "{recipe}:",
        "fewer aliases",
    ),
    "alias of itself": (
        edit("label: {w_bit: 8, a_bit: 8}", "label: &l {w_bit: 8, deeper: *l}"),
        SCHEMA,
        "an alias refers to the value that contains it",
        "{recipe}:5",
        "remove the circular alias",
    ),
    "merge of a list": (
        edit("  score: 50", "  <<: [1, 2]"),
        SCHEMA,
        "can only merge mappings",
        "{recipe}:4",
        "point it at an anchor",
    ),
    "too deep": (text("spec: " + "[" * 200), SCHEMA, "nested deeper than 100 levels", "{recipe}:1", "correct the line"),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), FILES.values(), ids=FILES)
def test_broken_recipe_file(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    fault(workplace)
    refused(kind, what, where, remedy)

"""The text that the tiny models are trained on: Python's documentation and docstrings.

The reStructuredText sources that Debian's ``python3.11-doc`` package installs are cleaned to
plain text, and the standard library's docstrings become short chat exchanges. The pages in
``HELD_OUT`` (and the docstrings of their modules) are kept out of the training text.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Whole pages that the model never sees in training (heldout.txt), in this order.
HELD_OUT = [
    "library/heapq",
    "library/textwrap",
    "tutorial/errors",
    "library/zipfile",
    "library/fractions",
    "howto/sockets",
    "library/graphlib",
]

# Parts of the standard library whose docstrings are not used: tests, programs and
# code that was not written for CPython.
SKIPPED_STDLIB = {
    "__pycache__",
    "_vendor",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}

DROPPED_DIRECTIVES = {
    "currentmodule", "figure", "highlight", "highlightlang", "image", "include", "index",
    "literalinclude", "module", "moduleauthor", "only", "py:currentmodule", "py:module",
    "sectionauthor", "tabularcolumns", "testcleanup", "testsetup", "toctree", "versionhistory",
}  # fmt: skip
BODY_ONLY_DIRECTIVES = {
    "code", "code-block", "container", "csv-table", "describe", "doctest", "epigraph",
    "hlist", "list-table", "math", "parsed-literal", "productionlist", "rst-class",
    "rubric", "sourcecode", "table", "testcode", "testoutput", "topic",
}  # fmt: skip
SENTENCES = {
    "versionadded": "New in version {}",
    "versionchanged": "Changed in version {}",
    "deprecated": "Deprecated since version {}",
    "deprecated-removed": "Deprecated since version {}",
    "note": "Note: {}",
    "warning": "Warning: {}",
    "caution": "Caution: {}",
    "danger": "Danger: {}",
    "tip": "Tip: {}",
    "hint": "Hint: {}",
    "important": "Important: {}",
    "attention": "Attention: {}",
    "seealso": "See also: {}",
    "impl-detail": "CPython implementation detail: {}",
    "availability": "Availability: {}",
    "audit-event": "Raises an auditing event {}",
}
HEADING_LEVEL = {"#": 1, "*": 1, "=": 1, "-": 2, "~": 3, "^": 3, '"': 4, "'": 4, "+": 4}


def clean_inline(line: str) -> str:
    """Turn inline reStructuredText markup to what the rendered page would show."""
    line = re.sub(r"``(.+?)``", r"`\1`", line)
    line = re.sub(r":[a-zA-Z0-9:+-]+:`!?~(?:[\w.]*\.)?(\w+)`", r"`\1`", line)
    line = re.sub(r":[a-zA-Z0-9:+-]+:`([^`<]+?)\s*<[^`>]+>`", r"\1", line)
    line = re.sub(
        r":(?:mod|func|meth|class|data|attr|const|exc|keyword|file|option|program|envvar"
        r"|kbd|samp|token|c:\w+|opcode|source|command):`!?([^`]+)`",
        r"`\1`",
        line,
    )
    line = re.sub(r":[a-zA-Z0-9:+-]+:`!?([^`]+)`", r"\1", line)
    line = re.sub(r"`([^`<]+?)\s*<[^`>]+>`__?", r"\1", line)
    line = re.sub(r"\|(\w+)\|", r"\1", line)
    return re.sub(r"\\([*_`|<>])", r"\1", line)  # fmt: skip


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def directive_line(name: str, argument: str) -> str | None:
    """What the line of a directive becomes; None where nothing of it is kept."""
    if name in BODY_ONLY_DIRECTIVES:
        return argument if argument and name in {"rubric", "topic", "describe", "table"} else None
    if name in SENTENCES:
        return SENTENCES[name].format(argument).rstrip()
    prefix = {"class": "class ", "exception": "exception ", "decorator": "@"}.get(name, "")
    return prefix + argument


def explicit_markup(content: str, indent: int, lines: list[str], position: int) -> tuple[str | None, int]:
    """Handle a line that starts with "..": what it becomes, and the next line's number."""
    directive = re.match(r"([a-zA-Z][\w:+-]*)::\s*(.*)$", content)
    if directive is None or directive.group(1) in DROPPED_DIRECTIVES:
        # A comment, a label, a substitution or something without text: skip it with
        # its indented body.
        while position < len(lines) and (not lines[position].strip() or indent_of(lines[position]) > indent):
            position += 1
        return "", position
    # Options such as ":noindex:" directly below the directive.
    while position < len(lines) and re.match(r"\s+:[\w-]+:", lines[position]):
        position += 1
    text = directive_line(directive.group(1), directive.group(2))
    return (None if text is None else " " * indent + clean_inline(text)), position


def rst_to_text(source: str) -> str:
    """Clean one reStructuredText page to readable plain text with Markdown headings."""
    lines = source.expandtabs().splitlines()
    kept: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position].rstrip()
        position += 1
        indent, stripped = indent_of(line), line.strip()
        markup = re.match(r"\.\.(?:\s+(.*))?$", stripped)
        if markup:
            text, position = explicit_markup(markup.group(1) or "", indent, lines, position)
            if text is not None:
                kept.append(text)
        elif re.fullmatch(r"([=\-~^*#\"'+])\1{2,}", stripped) and indent == 0:
            # An underline makes a heading of the line above; overlines and
            # transitions go.
            if kept and kept[-1] and not kept[-1].startswith((" ", "#", ">>>")):
                kept[-1] = "#" * HEADING_LEVEL[stripped[0]] + " " + kept[-1]
        elif stripped != "::":
            kept.append(clean_inline(line[:-1] if line.endswith("::") else line))
    text = "\n".join(line.rstrip() for line in kept)
    text = re.sub(r" \\\n\s+", " ", text)  # continued signatures
    text = re.sub(r":[a-z:]+:`([^`<]+?)\s*<[^`>]+>`", r"\1", text)  # roles over two lines
    text = re.sub(r":[a-z:]+:`([^`]+)`", r"\1", text)
    text = re.sub(r"`([^`]+)`_\b", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_pages(docs: Path) -> dict[str, str]:
    """All documentation pages, by name without suffix (library/heapq), cleaned."""
    sources = docs / "_sources" if (docs / "_sources").is_dir() else docs
    pages = {}
    for path in sorted(sources.rglob("*.rst*")):
        name = str(path.relative_to(sources)).split(".rst")[0]
        pages[name] = rst_to_text(path.read_text(encoding="utf-8"))
    return pages


def read_docstrings(stdlib: Path) -> list[str]:
    """The standard library's docstrings, each as a chat exchange in the Qwen style."""
    held_out_modules = {page.split("/")[1] for page in HELD_OUT if page.startswith("library/")}
    exchanges = []
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if SKIPPED_STDLIB.intersection(parts) or held_out_modules.intersection(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        pending: list[tuple[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]] = [(tree, module)]
        while pending:
            node, name = pending.pop(0)
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 40:
                kind = {"Module": "module", "ClassDef": "class"}.get(type(node).__name__)
                question = f"What is the {kind} {name}?" if kind else f"What does {name} do?"
                answer = inspect.cleandoc(docstring)[:3000]
                exchanges.append(f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n")
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    pending.append((child, f"{name}.{child.name}"))
    return exchanges


@dataclass(frozen=True)
class Corpus:
    """Pages by name without those held out, chat exchanges, and the pages held out as one text."""

    pages: dict[str, str]
    exchanges: list[str]
    held_out: str

    @property
    def texts(self) -> list[str]:
        """What a model is trained on."""
        return [text for text in self.pages.values() if len(text) > 200] + self.exchanges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the text lies, for :func:`read_corpus`."""
    parser.add_argument(
        "--docs",
        type=Path,
        default=Path("/usr/share/doc/python3.11/html"),
        help="the documentation's folder (with _sources/ or .rst files)",
    )
    parser.add_argument(
        "--stdlib",
        type=Path,
        default=Path("/usr/lib/python3.11"),
        help="the standard library whose docstrings are used",
    )


def read_corpus(docs: Path, stdlib: Path) -> Corpus:
    """All the text there is."""
    pages = read_pages(docs)
    held_out = "\n".join(pages.pop(name) for name in HELD_OUT)
    return Corpus(pages, read_docstrings(stdlib), held_out)

"""Name patterns: which modules a processor works on.

A pattern selects a dotted module name if it equals the name, or if it matches the whole name as a glob:

==============  ========================================================
``*``           any run of characters, dots included
``?``           any one character
``[abc]``       one of these, ``[a-f]`` a range, ``[!abc]`` none of these
``{a,b}``       either; nests, and each alternative may hold wildcards
``{1..3}``      a range of integers, ``{0..60..2}`` with a step
``\\``           takes the next character literally
==============  ========================================================

Matching is case-sensitive and a wildcard never matches a leading dot. Braces are expanded first, as text. Each
expansion becomes a regular expression that never backtracks from one ``*`` to another, so time stays linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from slim_core.errors import SchemaValidateError

__all__ = ["Exclude", "Include", "NameFilter", "NamePattern", "check_pattern", "compile_pattern", "escape_pattern"]

MAX_LENGTH = 200
MAX_ALTERNATIVES = 1000

_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.(-?[0-9]+))?\}")


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression to be used with ``fullmatch``.

    Raises:
        ValueError: the pattern is empty, too long, malformed, or its braces expand to more than 1000 alternatives.
    """
    if not pattern:
        raise ValueError("the pattern is empty")
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"the pattern has {len(pattern)} characters, at most {MAX_LENGTH} are allowed")
    alternatives, _ = _expand(pattern, 0, nested=False)
    return re.compile("|".join(_translate(text, pattern) for text in dict.fromkeys(alternatives)), re.DOTALL)


def escape_pattern(name: str) -> str:
    """The pattern that matches this name and nothing else."""
    return re.sub(r"[\\*?\[\]{}]", r"\\\g<0>", name)


def check_pattern(pattern: str) -> str:
    """The pattern itself, if it is well-formed.

    Raises:
        ValueError: as :func:`compile_pattern`.
    """
    compile_pattern(pattern)
    return pattern


NamePattern = Annotated[
    str, AfterValidator(check_pattern), Field(description="Module name or glob: * ? [abc] [!abc] {a,b} {1..3}")
]
"""A string field that only takes well-formed patterns."""

Include = Annotated[
    tuple[NamePattern, ...], Field(description="Modules to work on; an empty list means all. Default: all")
]
"""The ``include`` field of a processor; give it the default ``("*",)``."""

Exclude = Annotated[tuple[NamePattern, ...], Field(description="Modules to leave alone; wins over include")]
"""The ``exclude`` field of a processor; give it the default ``()``."""


@dataclass(frozen=True)
class NameFilter:
    """Names that match ``include`` and not ``exclude``; an empty ``include`` means every name.

    Raises:
        SchemaValidateError: a pattern is malformed.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    _include: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)
    _exclude: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_include", _compile_all(self.include, "include"))
        object.__setattr__(self, "_exclude", _compile_all(self.exclude, "exclude"))

    def matches(self, *names: str) -> bool:
        """Whether the filter selects something that has this name, or these: the model's and the checkpoint's."""
        if any(_any(name, self.exclude, self._exclude) for name in names):
            return False
        return not self.include or any(_any(name, self.include, self._include) for name in names)

    def unmatched(self, names: Iterable[str]) -> list[tuple[Literal["include", "exclude"], str]]:
        """Patterns that match none of the names, with the list they stand in; a plain ``*`` is never reported."""
        names = list(names)
        found: list[tuple[Literal["include", "exclude"], str]] = []
        for text, regex in zip(self.include, self._include, strict=True):
            if text != "*" and not any(_any(name, (text,), (regex,)) for name in names):
                found.append(("include", text))
        for text, regex in zip(self.exclude, self._exclude, strict=True):
            if text != "*" and not any(_any(name, (text,), (regex,)) for name in names):
                found.append(("exclude", text))
        return found


def _compile_all(patterns: tuple[str, ...], side: str) -> tuple[re.Pattern[str], ...]:
    compiled: list[re.Pattern[str]] = []
    for i, pattern in enumerate(patterns):
        try:
            compiled.append(compile_pattern(pattern))
        except ValueError as error:
            raise SchemaValidateError(str(error), where=f"{side}[{i}] {pattern[:MAX_LENGTH]!r}") from None
    return tuple(compiled)


def _any(name: str, texts: tuple[str, ...], compiled: tuple[re.Pattern[str], ...]) -> bool:
    return name in texts or any(regex.fullmatch(name) for regex in compiled)


def _expand(text: str, at: int, *, nested: bool) -> tuple[list[str], int]:
    """Brace expansions of ``text`` from ``at`` up to its end, or up to the ``,`` or ``}`` that ends an alternative."""
    found = [""]
    while at < len(text):
        char = text[at]
        if char == "\\":
            if at + 1 == len(text):
                raise ValueError(f"{text!r} ends in a backslash that escapes nothing")
            found = [head + text[at : at + 2] for head in found]
            at += 2
        elif char == "{":
            options, at = _brace(text, at)
            _bound(text, len(found) * len(options))
            found = [head + option for head in found for option in options]
        elif nested and char in ",}":
            break
        elif char == "}":
            raise ValueError(f"'}}' at character {at + 1} of {text!r} closes nothing")
        else:
            found = [head + char for head in found]
            at += 1
    return found, at


def _brace(text: str, start: int) -> tuple[list[str], int]:
    """Alternatives of the brace that opens at ``start``, and the position after it."""
    if match := _RANGE.match(text, start):
        return _numbers(text, match), match.end()
    options: list[str] = []
    at, commas = start + 1, 0
    while True:
        part, at = _expand(text, at, nested=True)
        options += part
        _bound(text, len(options))
        if at == len(text):
            raise ValueError(f"'{{' at character {start + 1} of {text!r} is never closed")
        at += 1
        if text[at - 1] == "}":
            break
        commas += 1
    if not commas:
        raise ValueError(f"braces at character {start + 1} of {text!r} hold neither a comma nor a range like {{1..3}}")
    return options, at


def _numbers(text: str, match: re.Match[str]) -> list[str]:
    first, last, step_text = match.groups()
    step = abs(int(step_text or 1))
    if step == 0:
        raise ValueError(f"the range {match[0]} in {text!r} has step 0")
    low, high = int(first), int(last)
    _bound(text, abs(high - low) // step + 1)
    numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
    padded = any(re.match(r"-?0[0-9]", bound) for bound in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" if padded else str(number) for number in numbers]


def _bound(text: str, count: int) -> None:
    if count > MAX_ALTERNATIVES:
        raise ValueError(f"the braces of {text!r} stand for more than {MAX_ALTERNATIVES} alternatives")


def _translate(glob: str, pattern: str) -> str:
    """One brace-free glob as a regular expression.

    Text between two ``*`` is searched for at its leftmost place and never revisited (an atomic group), which is enough:
    an earlier place leaves at least as much to the rest.
    """
    segments = [""]
    at = 0
    while at < len(glob):
        char = glob[at]
        if char == "*":
            if segments[-1] or len(segments) == 1:
                segments.append("")
            at += 1
        elif char == "[":
            piece, at = _bracket(glob, at, pattern)
            segments[-1] += piece
        elif char == "\\":
            segments[-1] += re.escape(glob[at + 1])
            at += 2
        else:
            segments[-1] += "." if char == "?" else re.escape(char)
            at += 1
    hidden = r"(?!\.)" if glob[:1] in ("*", "?", "[") else ""
    if len(segments) == 1:
        return hidden + segments[0]
    first, *middle, last = segments
    return hidden + first + "".join(f"(?>.*?{segment})" for segment in middle) + f".*{last}"


def _bracket(glob: str, start: int, pattern: str) -> tuple[str, int]:
    """The character class that opens at ``start``, and the position after it."""
    at = start + 1
    negated = glob[at : at + 1] in ("!", "^") and bool(glob[at : at + 1])
    at += negated
    pieces: list[str] = []
    while at < len(glob) and (glob[at] != "]" or not pieces):
        if glob.startswith("[:", at):
            raise ValueError(f"character classes such as [:alpha:] are not supported, in {pattern!r}")
        low, at = _member(glob, at)
        if glob[at : at + 1] == "-" and glob[at + 1 : at + 2] not in ("]", ""):
            high, at = _member(glob, at + 1)
            if low > high:
                raise ValueError(f"the range [{low}-{high}] in {pattern!r} runs backwards")
            pieces.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            pieces.append(re.escape(low))
    if at >= len(glob):
        raise ValueError(f"'[' in {pattern!r} is never closed")
    return f"[{'^' if negated else ''}{''.join(pieces)}]", at + 1


def _member(glob: str, at: int) -> tuple[str, int]:
    return (glob[at + 1], at + 2) if glob[at] == "\\" else (glob[at], at + 1)

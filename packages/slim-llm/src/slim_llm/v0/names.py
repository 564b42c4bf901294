"""Names of v0 recipes as patterns of v1: exact names, and the keys of ``mix_cfg``, which are Python's fnmatch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from slim_core.recipe import escape_pattern
from slim_core.recipe.patterns import MAX_ALTERNATIVES, MAX_LENGTH

__all__ = ["from_fnmatch", "is_exact", "literal_patterns"]

# A range such as {1000..9999} must fit beside what is equal in all names.
_ROOM = 30
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")


def literal_patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and nothing else, in their order.

    Names that differ only in their first number, as those of the layers do, share one pattern with a brace.
    """
    families: dict[tuple[str, str | None], list[int]] = {}
    for name in dict.fromkeys(names):
        number = _NUMBER.search(name)
        if number is None:
            families[escape_pattern(name), None] = []
        else:
            family = escape_pattern(name[: number.start()]), escape_pattern(name[number.end() :])
            families.setdefault(family, []).append(int(number[0]))
    patterns: list[str] = []
    for (head, tail), numbers in families.items():
        patterns += [head] if tail is None else _family(head, tail, sorted(numbers))
    return patterns


def _family(head: str, tail: str, numbers: Sequence[int]) -> list[str]:
    """Patterns for ``head``, one of the numbers, ``tail``; as many as the bounds on a pattern ask for."""
    room = MAX_LENGTH - len(head) - len(tail) - 2
    if room < _ROOM:
        return [f"{head}{number}{tail}" for number in numbers]
    if len(numbers) > MAX_ALTERNATIVES:
        return _family(head, tail, numbers[:MAX_ALTERNATIVES]) + _family(head, tail, numbers[MAX_ALTERNATIVES:])
    patterns: list[str] = []
    taken: list[str] = []
    for piece in _runs(numbers):
        if taken and len(",".join([*taken, piece])) > room:
            patterns.append(head + _braced(taken) + tail)
            taken = []
        taken.append(piece)
    return [*patterns, head + _braced(taken) + tail]


def _runs(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers, three and more in a row as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        piece for run in runs for piece in ([f"{{{run[0]}..{run[-1]}}}"] if len(run) > 2 else [str(one) for one in run])
    ]


def _braced(pieces: Sequence[str]) -> str:
    text = ",".join(pieces)
    return text if len(pieces) == 1 else f"{{{text}}}"


def is_exact(key: str) -> bool:
    """Whether a key of ``mix_cfg`` is a name, not a pattern."""
    return not set(key) & set("*?[")


def from_fnmatch(key: str) -> str | None:
    """The v1 pattern that matches what ``fnmatch.fnmatchcase`` matches; None if that is nothing.

    v1 has braces and a backslash that escapes, fnmatch has neither; and they read odd character classes differently.
    A name that begins with a dot, which no module has, is left out of account.
    """
    text = ""
    at = 0
    while at < len(key):
        if key[at] != "[":
            text += key[at] if key[at] in "*?" else escape_pattern(key[at])
            at += 1
            continue
        end = _class_end(key, at)
        if end is None:
            text += escape_pattern("[")
            at += 1
            continue
        members = _class(key[at + 1 : end])
        if members is None:
            return None
        text += members
        at = end + 1
    return text


def _class_end(key: str, start: int) -> int | None:
    """Where the class that opens at ``start`` closes; None if it does not. A first ``]`` is a member."""
    at = start + 1
    at += key[at : at + 1] == "!"
    at += key[at : at + 1] == "]"
    end = key.find("]", at)
    return None if end < 0 else end


def _class(body: str) -> str | None:
    """A character class with every member escaped that could be misread; None if it has no member."""
    negated = body.startswith("!")
    body = body[negated:]
    members: list[str] = []
    at = 0
    while at < len(body):
        if body[at + 1 : at + 2] == "-" and at + 2 < len(body):
            low, high = body[at], body[at + 2]
            if low <= high:
                members.append(f"{_member(low)}-{_member(high)}")
            at += 3
        else:
            members.append(_member(body[at]))
            at += 1
    if not members:
        return "?" if negated else None
    return f"[{'!' if negated else ''}{''.join(members)}]"


def _member(char: str) -> str:
    return f"\\{char}" if char in "\\[]{}!^-" else char

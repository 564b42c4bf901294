from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slim_core.errors import SchemaValidateError
from slim_core.recipe.patterns import NameFilter, check_pattern, compile_pattern, escape_pattern

NAME = "model.layers.3.self_attn.q_proj"

MATCHES = [
    ("*", NAME, True),
    (NAME, NAME, True),
    ("*self_attn*", NAME, True),
    ("model.layers.3.*", NAME, True),
    ("model.layers.3", NAME, False),
    ("model.layers.?.self_attn.q_proj", NAME, True),
    ("model.layers.?.*", "model.layers.31.mlp", False),
    ("*.[qk]_proj", NAME, True),
    ("*.[!qk]_proj", NAME, False),
    ("*.[^vo]_proj", NAME, True),
    ("*.[a-q]_proj", NAME, True),
    ("*.[]q]_proj", NAME, True),
    ("*.[q-]_proj", "x.-_proj", True),
    ("*.{q,k,v}_proj", NAME, True),
    ("*.{k,v}_proj", NAME, False),
    ("*{.mlp.*,.self_attn.{q,o}_proj}", NAME, True),
    ("model.layers.{1..3}.*", NAME, True),
    ("model.layers.{4..9}.*", NAME, False),
    ("model.layers.{9..1..2}.*", NAME, True),
    ("model.layers.{0..8..2}.*", NAME, False),
    ("model.layers.{1..3}.*", "model.layers.2.5", True),
    ("x{-1..1}", "x-1", True),
    ("x{01..10}", "x03", True),
    ("x{01..10}", "x3", False),
    ("a{,b}", "a", True),
    ("*gate", "model.layers.0.mlp.gate", True),
    ("*gate", "model.layers.0.mlp.gate_proj", False),
    ("*SELF_attn*", NAME, False),
    ("*", ".hidden", False),
    ("?hidden", ".hidden", False),
    ("[.]hidden", ".hidden", False),
    (".*", ".hidden", True),
    ("*.b", "a.b", True),
    (r"a\*b", "a*b", True),
    (r"a\*b", "axb", False),
    (r"\{a,b\}", "{a,b}", True),
    (r"{a\,b,c}", "a,b", True),
    (r"[\]]", "]", True),
    ("a.b", "axb", False),
    ("a*c", "a\nc", True),
    ("*a*b", "abab", True),
    ("*ab*ab", "ab", False),
    ("**", "a.b", True),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), MATCHES)
def test_matching(pattern, name, expected):
    assert NameFilter(include=(pattern,)).matches(name) is expected
    assert NameFilter(include=(), exclude=(pattern,)).matches(name) is not expected


def test_exclude_wins_and_an_empty_include_means_everything():
    assert not NameFilter(include=("*",), exclude=("*down_proj",)).matches("mlp.down_proj")
    assert NameFilter(include=()).matches("anything")
    assert NameFilter(include=()).matches(".hidden")
    assert not NameFilter(include=(), exclude=("any*",)).matches("anything")


def test_unmatched_patterns_are_named_with_their_side():
    names = NameFilter(include=("*", "a*", "b*", "{c,d}"), exclude=("*", "*z", "a1"))
    assert names.unmatched(["a1", "d"]) == [("include", "b*"), ("exclude", "*z")]
    assert NameFilter(include=("a",)).unmatched([]) == [("include", "a")]


def test_one_of_two_names_is_enough_to_be_included_and_to_be_excluded():
    both = ("model.visual.blocks.0.attn", "visual.blocks.0.attn")
    assert NameFilter(("visual.*",)).matches(*both)
    assert NameFilter(("model.visual.*",)).matches(*both)
    assert not NameFilter(("*",), ("visual.*",)).matches(*both)
    assert not NameFilter(("visual.*",), ("model.*",)).matches(*both)
    assert not NameFilter(("text.*",)).matches(*both)


@given(st.text("ab.[]{}*?!^-,\\", min_size=1, max_size=8), st.text("ab.[]{}*?!^-,\\", max_size=8))
def test_an_escaped_name_matches_itself_only(name, other):
    pattern = compile_pattern(escape_pattern(name))
    assert pattern.fullmatch(name)
    assert bool(pattern.fullmatch(other)) is (name == other)


MALFORMED = {
    "": "empty",
    "a" * 201: "201 characters, at most 200",
    "a[bc": "'[' in 'a[bc' is never closed",
    "a[]": "is never closed",
    "a[z-a]": "runs backwards",
    "[[:alpha:]]": "not supported",
    "a{b,c": "'{' at character 2 of 'a{b,c' is never closed",
    "a}": "'}' at character 2 of 'a}' closes nothing",
    "a{b}": "neither a comma nor a range",
    "a{}": "neither a comma nor a range",
    "a{a..c}": "neither a comma nor a range",
    "a{1..9..0}": "step 0",
    "a\\": "ends in a backslash",
    "{1..999999999999}": "more than 1000 alternatives",
    "{1..40}{1..40}": "more than 1000 alternatives",
    "{a,b}" * 11: "more than 1000 alternatives",
}


@pytest.mark.parametrize(("pattern", "message"), MALFORMED.items())
def test_malformed_patterns(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pattern(pattern)
    with pytest.raises(SchemaValidateError, match=re.escape(message)) as caught:
        NameFilter(exclude=("fine", pattern))
    assert "exclude[1]" in str(caught.value)


def naive_expand(pattern: str) -> list[str]:
    """Innermost braces first, by rewriting; an independent route to the same alternatives."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        low, high = sorted((int(match[1]), int(match[2])))
        options = [str(number) for number in range(low, high + 1)]
    elif match := re.search(r"\{([^{}]*)\}", pattern):
        options = match[1].split(",")
    else:
        return [pattern]
    return [
        text for option in options for text in naive_expand(pattern[: match.start()] + option + pattern[match.end() :])
    ]


def naive_glob(glob: str, name: str) -> bool:
    """Straight recursion over every way a star can match."""
    if not glob:
        return not name
    if glob[0] == "*":
        return any(naive_glob(glob[1:], name[i:]) for i in range(len(name) + 1))
    if not name:
        return False
    if glob[0] == "[":
        end = glob.index("]", 2)
        body = glob[1:end]
        inside = name[0] in body.lstrip("!")
        return inside != body.startswith("!") and naive_glob(glob[end + 1 :], name[1:])
    return glob[0] in ("?", name[0]) and naive_glob(glob[1:], name[1:])


def naive_matches(pattern: str, name: str) -> bool:
    def visible(glob: str) -> bool:
        return not (name.startswith(".") and glob[:1] in ("*", "?", "["))

    return name == pattern or any(visible(glob) and naive_glob(glob, name) for glob in naive_expand(pattern))


atoms = st.sampled_from(["a", "b", ".", "1", "2", "*", "*", "?", "[ab]", "[!a1]", "{1..2}", "{2..1}"])
patterns = st.recursive(
    st.lists(atoms, min_size=1, max_size=4).map("".join),
    lambda inner: st.lists(
        inner | st.lists(inner | st.just(""), min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
        min_size=1,
        max_size=3,
    ).map("".join),
    max_leaves=5,
).filter(lambda text: 0 < len(text) <= 60)


@settings(max_examples=600)
@given(patterns, st.lists(st.text("ab.12", max_size=8), min_size=1, max_size=8))
def test_agrees_with_a_naive_matcher(pattern, names):
    assume(len(naive_expand(pattern)) <= 1000)
    matcher = NameFilter(include=(pattern,))
    for name in names:
        assert matcher.matches(name) == naive_matches(pattern, name), (pattern, name)


@given(st.text("ab.*?[]{}!,-^\\1", max_size=30))
def test_any_text_compiles_or_is_refused(pattern):
    try:
        regex = compile_pattern(pattern)
    except ValueError:
        return
    assert regex.fullmatch("a.b.1") is None or NameFilter((pattern,)).matches("a.b.1")


@given(st.text(min_size=1, max_size=30).filter(lambda text: "." in text or text.isalnum()))
def test_a_name_matches_itself_with_everything_escaped(name):
    escaped = "".join(f"\\{char}" for char in name)
    assert compile_pattern(escaped).fullmatch(name)


@pytest.mark.parametrize(
    "pattern",
    ["*a" * 99 + "*b", "*" + "?*" * 90 + "b", "*[ab]" * 39 + "c", "{*a,*aa}" * 9 + "*b", "*{a,b}*{a,b}*{a,b}*{a,b}*c"],
)
def test_no_pattern_is_slow(pattern):
    name = "a" * 2000
    start = time.perf_counter()
    assert not NameFilter((pattern,)).matches(name)
    assert time.perf_counter() - start < 2

"""Patterns made from exact names and from fnmatch patterns select what those selected."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from slim_core.recipe.patterns import MAX_LENGTH, compile_pattern
from slim_llm.v0.names import from_fnmatch, is_exact, literal_patterns

SYMBOLS = "ab[]!^-*?{}\\,.0:"
KEYS = st.text(SYMBOLS, min_size=1, max_size=12)
TEXTS = st.text(SYMBOLS, min_size=1, max_size=8).filter(lambda name: not name.startswith("."))


def matches(patterns: list[str], name: str) -> bool:
    return any(compile_pattern(pattern).fullmatch(name) for pattern in patterns)


@settings(max_examples=500, deadline=None)
@given(KEYS, st.lists(TEXTS, min_size=1, max_size=5))
@example("a[!]b]c", ["a]c", "abc", "axc"])
@example("[]a]", ["]", "a"])
@example("a[z-a]", ["az", "aa", "a"])
@example("a[!z-a]", ["az", "a."])
@example("[^a]", ["^", "a", "b"])
@example("[[:b]a", ["[a", ":a", "ba"])
@example("a[b", ["a[b", "ab"])
@example("{a,b}", ["{a,b}", "a"])
@example("a\\*", ["a\\", "a\\b", "a*"])
@example("[a--]", ["a", "-", "b"])
def test_keys_match_as_fnmatch_does(key: str, names: list[str]) -> None:
    pattern = from_fnmatch(key)
    for name in [*names, key]:
        assume(not name.startswith("."))
        wanted = fnmatch.fnmatchcase(name, key)
        assert (pattern is not None and bool(compile_pattern(pattern).fullmatch(name))) == wanted


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("*.mlp.*", "*.mlp.*"),
        ("model.layers.[0-3].mlp.gate_pro?", "model.layers.[0-3].mlp.gate_pro?"),
        ("*.{q,k}_proj", "*.\\{q,k\\}_proj"),
        ("[!ab]*", "[!ab]*"),
    ],
)
def test_usual_keys_stay_as_they_are(key: str, pattern: str) -> None:
    assert from_fnmatch(key) == pattern


def test_a_key_without_wildcard_is_a_name() -> None:
    assert is_exact("model.layers.0.mlp.up_proj")
    assert is_exact("model.{a}")
    assert not any(is_exact(f"a{symbol}") for symbol in "*?[")


NAMES = st.lists(
    st.one_of(
        st.builds("model.layers.{}.mlp.{}".format, st.integers(0, 40), st.sampled_from(["up", "down", "experts.3.up"])),
        st.builds("a{}b[{}]".format, st.integers(0, 3), st.integers(0, 9)),
        st.text(SYMBOLS, min_size=1, max_size=6),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(NAMES, st.integers(0, 41))
def test_literal_patterns_match_the_names_and_no_others(names: list[str], number: int) -> None:
    patterns = literal_patterns(names)
    assert all(matches(patterns, name) for name in names)
    near = [f"model.layers.{number}.mlp.{part}" for part in ("up", "down", "experts.3.up", "experts.4.up", "dow")]
    near += [name + "x" for name in names] + [name[:-1] for name in names] + [name.replace("[", "") for name in names]
    for other in set(near) - set(names):
        assert not matches(patterns, other), (patterns, other)


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([], []),
        (["lm_head", "lm_head"], ["lm_head"]),
        ([f"model.layers.{i}.mlp.down_proj" for i in range(28)], ["model.layers.{0..27}.mlp.down_proj"]),
        ([f"l.{i}.x" for i in (62, 1, 2, 6, 43, 44, 45)], ["l.{1,2,6,{43..45},62}.x"]),
        (["l.1.x", "h", "l.1.y", "l.2.x"], ["l.{1,2}.x", "h", "l.1.y"]),
        (["l.01.x", "l.02.x"], ["l.01.x", "l.02.x"]),
        (["a*[0]{b}\\?"], ["a\\*\\[0\\]\\{b\\}\\\\\\?"]),
    ],
)
def test_names_that_differ_in_their_number_share_a_pattern(names: list[str], patterns: list[str]) -> None:
    assert literal_patterns(names) == patterns


def test_patterns_stay_within_their_bounds() -> None:
    odd = [f"model.layers.{i}.mlp.down_proj" for i in range(1, 400, 2)]
    many = [f"block.{i}" for i in range(2500)]
    long = [f"{'x' * 190}.{i}.y" for i in range(5)]
    for names in (odd, many, long):
        patterns = literal_patterns(names)
        assert all(len(pattern) <= MAX_LENGTH for pattern in patterns)
        assert all(matches(patterns, name) for name in names)
        assert len(patterns) < len(names) or names is long

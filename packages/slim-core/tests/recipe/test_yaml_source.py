from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import SchemaValidateError, SecurityError
from slim_core.recipe.yaml_source import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_yaml


def test_lines_of_mappings_lists_and_unknown_places(write):
    document = read_yaml(write("a: 1\nb:\n  - x\n  -\n    c: 2\n    d: [3,\n        4]\n"))
    assert document.data == {"a": 1, "b": ["x", {"c": 2, "d": [3, 4]}]}
    assert [document.line(loc) for loc in [(), ("a",), ("b",), ("b", 0), ("b", 1), ("b", 1, "c")]] == [1, 1, 2, 3, 5, 5]
    assert document.line(("b", 1, "d", 1)) == 7
    assert document.line(("b", 1, "nope", "deeper")) == 5
    assert document.line(("b", 9)) == 2
    assert document.where(("a",)) == f"{document.path}:1"


def test_lines_inside_an_alias_are_those_of_the_anchor(write):
    document = read_yaml(write("base: &base\n  x: 1\nuse: *base\n"))
    assert document.line(("use",)) == 3
    assert document.line(("use", "x")) == 2
    assert document.data["use"] is not document.data["base"]


def test_merge_keys_are_overridden_by_own_keys_and_earlier_merges_win(write):
    document = read_yaml(
        write("a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: [*a, *b]\n  x: 3\nd:\n  y: 4\n  <<: *b\n")
    )
    assert document.data["c"] == {"x": 3, "y": 1, "z": 2}
    assert document.data["d"] == {"y": 4, "z": 2}
    assert document.line(("c", "x")) == 5
    assert document.line(("c", "z")) == 2


def test_yaml_1_1_scalars(write):
    text = "a: 1e-5\nb: 1.0e-5\nc: yes\nd: 2024-01-01\ne: =\nf: ~\ng: 0x10\nh: '<<'\n"
    assert read_yaml(write(text)).data == {
        "a": "1e-5",
        "b": 1e-5,
        "c": True,
        "d": "2024-01-01",
        "e": "=",
        "f": None,
        "g": 16,
        "h": "<<",
    }


def test_byte_order_mark_and_windows_line_ends(write):
    document = read_yaml(write(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n"))
    assert document.data == {"a": 1, "b": 2}
    assert document.line(("b",)) == 2


BROKEN = {
    "duplicate": ("a: 1\nb: 2\na: 3\n", ":3:1: duplicate key 'a', first on line 1"),
    "duplicate below": ("s:\n  - x: 1\n    x: 2\n", ":3:5: duplicate key 'x', first on line 2"),
    "duplicate in quotes": ("a: 1\n'a': 3\n", ":2:1: duplicate key 'a', first on line 1"),
    "two merges": ("a: &a {}\nb:\n  <<: *a\n  <<: *a\n", ":4:3: duplicate key '<<', first on line 3"),
    "merge of a list": ("a: &a [1]\nb:\n  <<: *a\n", "`<<` can only merge mappings"),
    "merge of a scalar": ("b:\n  <<: 7\n", ":2:7: `<<` can only merge mappings"),
    "number as key": ("1: x\n", ":1:1: a key must be a string, got '1' (int)"),
    "on as key": ("a:\n  on: x\n", """:2:3: a key must be a string, got 'on' (bool) (write "on")"""),
    "null as key": ("~: x\n", ":1:1: a key must be a string, got '~' (NoneType)"),
    "list as key": ("? [a]\n: x\n", ":1:3: a key must be a string, not a list or mapping"),
    "two documents": ("a: 1\n---\nb: 2\n", ":2: a second document starts here"),
    "tab": ("a:\n\tb: 1\n", ":2:1: not valid YAML: found character '\\t'"),
    "tab, what to do": ("a:\n\tb: 1\n", "indent with spaces"),
    "open bracket": ("a: [1, 2\nb: 3\n", ":2:2: not valid YAML: "),
    "open quote": ("a: 'x\n", "not valid YAML: found unexpected end of stream"),
    "bad indentation": ("a: 1\n  b: 2\n", ":2:4: not valid YAML: mapping values are not allowed here"),
    "unknown alias": ("a: *b\n", ":1:4: not valid YAML: found undefined alias 'b'"),
    "python object": (
        "a: !!python/object/apply:os.system ['true']\n",
        ":1:4: tag !!python/object/apply:os.system is not",
    ),
    "python name": ("a: !!python/name:os.system\n", "tag !!python/name:os.system is not allowed"),
    "own tag": ("a: !thing {b: 1}\n", ":1:4: tag !thing is not allowed"),
    "binary": ("a: !!binary aGVsbG8=\n", "tag !!binary is not allowed"),
    "set": ("a: !!set {b}\n", "tag !!set is not allowed"),
    "not an int": ("a: !!int abc\n", ":1:4: 'abc' is not a valid int"),
    "not a bool": ("a: !!bool abc\n", ":1:4: 'abc' is not a valid bool"),
    "empty float": ("a: !!float ''\n", ":1:4: '' is not a valid float"),
    "endless int": ("a: " + "9" * 5000 + "\n", "is not a valid int"),
    "empty": ("", "the file is empty"),
    "comment only": ("# nothing\n", "the file is empty"),
    "null": ("---\n", "the file is empty"),
    "list at the root": ("- a\n", ":1:1: the file must hold a mapping, got a list"),
    "text at the root": ("hello\n", ":1:1: the file must hold a mapping, got 'hello'"),
    "not UTF-8": (b"a: 1\nb: \xff\n", ":2: byte 0xff is not UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), ":1: byte 0xff is not UTF-8"),
    "control character": ("a: 1\nb: \x07\n", ":2: control character U+0007"),
    "circle": ("a: &a\n  b: *a\n", "an alias refers to the value that contains it"),
    "circle by merge": ("a: &a\n  <<: *a\n", "an alias refers to the value that contains it"),
    "deep": ("a: " + "[" * 200 + "]" * 200 + "\n", f"nested deeper than {MAX_DEPTH} levels"),
    "deep in blocks": ("- " * 5000 + "a\n", f"nested deeper than {MAX_DEPTH} levels"),
    "deep by aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)),
        f"nested deeper than {MAX_DEPTH} levels once the aliases are expanded",
    ),
    "many values": ("a: [" + "1," * (MAX_NODES + 1) + "]\n", f"more than {MAX_NODES} values"),
    "billion laughs": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 10)),
        f"more than {MAX_NODES} values once the aliases are expanded",
    ),
    "billion merges": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{f'*a{i - 1},' * 9}]}}\n" for i in range(1, 10)),
        f"more than {MAX_NODES} values once the aliases are expanded",
    ),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_text(write, text, message):
    path = write(text)
    with pytest.raises(SchemaValidateError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_size_kind_and_absence_of_the_file(tmp_path, write):
    path = write(b"a: 1\n#" + b" " * MAX_BYTES)
    with pytest.raises(SecurityError, match="larger than 16 MiB"):
        read_yaml(path)
    with pytest.raises(SecurityError, match="is a folder"):
        read_yaml(tmp_path)
    with pytest.raises(SecurityError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")


keys = st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | keys
trees = st.dictionaries(
    keys,
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=12
    ),
    min_size=1,
    max_size=4,
)


@given(trees)
def test_what_pyyaml_writes_is_read_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    document = read_yaml(path)
    assert document.data == tree
    for key in tree:
        assert document.line((key,)) is not None


@given(st.text(max_size=200) | st.lists(st.sampled_from([*"&*{}[]:,-!<>|?#'\"\n\t ab", "\n  ", "<<: *a"])).map("".join))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        document = read_yaml(path)
    except SchemaValidateError:
        return
    assert isinstance(document.data, dict)

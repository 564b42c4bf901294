"""YAML files to plain Python data that remembers where every value stood.

The dialect is the one of PyYAML's safe loader (YAML 1.1), narrowed to what a recipe needs: one document, a mapping at
the root, string keys, no tags beyond the plain scalars, bounded size, depth and alias expansion. Merge keys (``<<``)
are allowed and the mapping's own keys override the merged ones. Dates stay strings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from slim_core.errors import SchemaValidateError, SecurityError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "Document", "Location", "read_yaml"]

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 100
MAX_NODES = 100_000

Location = tuple[str | int, ...]
"""A place in a document: mapping keys and sequence indices from the root."""

_SMALLER = "a recipe needs no such size, use fewer aliases"
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
_KINDS: dict[type, str] = {dict: "a mapping", list: "a list", tuple: "a list"}


@dataclass(frozen=True, slots=True)
class _Place:
    """The line of a value (of its key, if it has one) and the places inside it."""

    line: int
    inside: dict[str | int, _Place]


@dataclass(frozen=True)
class Document:
    """Plain data with the lines it came from; :attr:`path` is None for data that was never a file."""

    data: dict[str, Any]
    path: Path | None
    name: str
    _root: _Place | None = field(default=None, repr=False, compare=False)

    def line(self, loc: Location) -> int | None:
        """One-based line of ``loc`` or of its deepest known prefix; None without a file."""
        if self._root is None:
            return None
        place = self._root
        for step in loc:
            if (inner := place.inside.get(step)) is None:
                break
            place = inner
        return place.line

    def where(self, loc: Location = ()) -> str:
        """``file:line`` of a location, or the bare name where lines are unknown."""
        line = self.line(loc)
        return self.name if line is None else f"{self.name}:{line}"


def kind_of(value: object) -> str:
    """A value in words for an error message: containers by kind, scalars by (shortened) representation."""
    if value is None:
        return "nothing"
    if type(value) in _KINDS:
        return _KINDS[type(value)]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def read_yaml(path: Path) -> Document:
    """Read one YAML file.

    Raises:
        SecurityError: the path is no regular file, cannot be read, or the file is larger than 16 MiB.
        SchemaValidateError: the text is not YAML of the accepted dialect; the message names line and column.
    """
    text = _read_text(path)
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SchemaValidateError(
            f"control character U+{error.character:04X} in the text", where=f"{path}:{line}", remedy="remove it"
        ) from None
    try:
        node = _compose(loader, path)
        return _Builder(loader, path).document(node)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, path, text) from None


def _read_text(path: Path) -> str:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise SecurityError(what, where=str(path), remedy="give the path of a YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SecurityError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="check the file and its permissions"
        ) from error
    if len(raw) > MAX_BYTES:
        raise SecurityError("larger than 16 MiB", where=str(path), remedy="a recipe is a small text file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SchemaValidateError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8", where=f"{path}:{line}", remedy="save the file as UTF-8"
        ) from None


class _Loader(yaml.SafeLoader):
    """Safe loader that stops composing at the bounds instead of exhausting the stack or the memory."""

    # Dates and the YAML 1.1 "=" value stay strings; own copy, since the base class shares one table.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regex) for tag, regex in resolvers if tag not in (_TAG + "timestamp", _TAG + "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.count = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.depth += 1
        self.count += 1
        mark: yaml.Mark = cast("Any", self).peek_event().start_mark
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        if self.count > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(loader: _Loader, path: Path) -> Node:
    node = loader.get_node() if loader.check_node() else None
    if node is None or (isinstance(node, ScalarNode) and node.tag == _TAG + "null"):
        raise SchemaValidateError("the file is empty", where=str(path), remedy="a recipe needs apiversion and spec")
    if loader.check_node():
        mark: yaml.Mark = cast("Any", loader).peek_event().start_mark
        raise SchemaValidateError(
            "a second document starts here", where=f"{path}:{mark.line + 1}", remedy="keep one recipe per file"
        )
    return node


def _syntax_error(error: yaml.MarkedYAMLError, path: Path, text: str) -> SchemaValidateError:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    what = error.problem or error.context or "not valid YAML"
    if error.context and error.context_mark and error.problem:
        what = f"{what}, {error.context} (line {error.context_mark.line + 1})"
    tabbed = mark is not None and "\t" in "".join(text.split("\n")[mark.line : mark.line + 1])
    remedy = "indent with spaces, YAML allows no tabs" if tabbed else "correct the line, or the one before it"
    return SchemaValidateError(f"not valid YAML: {what}", where=where, remedy=remedy)


class _Builder:
    """Turns composed nodes into fresh Python values; aliases and merges are written out, up to ``MAX_NODES``."""

    def __init__(self, loader: _Loader, path: Path) -> None:
        self._loader = loader
        self._path = path
        self._count = 0
        self._open: set[int] = set()

    def document(self, node: Node) -> Document:
        if not isinstance(node, MappingNode):
            value, _ = self._value(node)
            raise self._error(
                node, f"the file must hold a mapping, got {kind_of(value)}", "start with `apiversion: modelslim_v1`"
            )
        data, place = self._value(node)
        return Document(data, self._path, str(self._path), place)

    def _value(self, node: Node) -> tuple[Any, _Place]:
        line = node.start_mark.line + 1
        self._enter(node)
        try:
            if isinstance(node, MappingNode):
                self._expect_tag(node, "map")
                return self._mapping(node, line)
            if isinstance(node, SequenceNode):
                self._expect_tag(node, "seq")
                built = [self._value(item) for item in node.value]
                return [value for value, _ in built], _Place(line, {i: place for i, (_, place) in enumerate(built)})
            return self._scalar(node), _Place(line, {})
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, line: int) -> tuple[dict[str, Any], _Place]:
        data: dict[str, Any] = {}
        inside: dict[str | int, _Place] = {}
        for key, (key_line, value_node) in self._entries(node).items():
            data[key], place = self._value(value_node)
            inside[key] = _Place(key_line, place.inside)
        return data, _Place(line, inside)

    def _entries(self, node: MappingNode) -> dict[str, tuple[int, Node]]:
        """Keys of a mapping with their lines and value nodes, after merging; own keys win, then earlier merges."""
        own: dict[str, tuple[int, Node]] = {}
        merges: list[Node] = []
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _TAG + "merge"
            key = "<<" if is_merge else self._key(key_node)
            line = key_node.start_mark.line + 1
            if (first := seen.get(repr(is_merge) + key)) is not None:
                raise self._error(
                    key_node,
                    f"duplicate key {key!r}, first on line {first}",
                    "merge several with `<<: [*a, *b]`" if is_merge else "remove one of the two",
                )
            seen[repr(is_merge) + key] = line
            if is_merge:
                merges.append(value_node)
            else:
                own[key] = (line, value_node)
        merged: dict[str, tuple[int, Node]] = {}
        for merge in merges:
            for source in merge.value if isinstance(merge, SequenceNode) else [merge]:
                merged = self._merge_source(source) | merged
        return merged | own

    def _merge_source(self, source: Node) -> dict[str, tuple[int, Node]]:
        if not isinstance(source, MappingNode):
            raise self._error(source, "`<<` can only merge mappings", "point it at an anchor that holds a mapping")
        self._enter(source)
        self._count += len(source.value)
        entries = self._entries(source)
        self._open.discard(id(source))
        return entries

    def _enter(self, node: Node) -> None:
        if id(node) in self._open:
            raise self._error(node, "an alias refers to the value that contains it", "remove the circular alias")
        self._open.add(id(node))
        self._count += 1
        if self._count > MAX_NODES:
            raise self._error(node, f"more than {MAX_NODES} values once the aliases are expanded", _SMALLER)
        if len(self._open) > MAX_DEPTH:
            raise self._error(node, f"nested deeper than {MAX_DEPTH} levels once the aliases are expanded", _SMALLER)

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise self._error(node, "a key must be a string, not a list or mapping")
        value = self._scalar(node)
        if not isinstance(value, str):
            raise self._error(
                node, f"a key must be a string, got {node.value!r} ({type(value).__name__})", f'write "{node.value}"'
            )
        return value

    def _scalar(self, node: Node) -> Any:
        if node.tag not in _SCALAR_TAGS:
            raise self._tag_error(node)
        try:
            return cast("Any", self._loader).construct_object(node)
        except (ValueError, LookupError, OverflowError):
            raise self._error(node, f"{kind_of(node.value)} is not a valid {node.tag.removeprefix(_TAG)}") from None

    def _expect_tag(self, node: Node, name: str) -> None:
        if node.tag != _TAG + name:
            raise self._tag_error(node)

    def _tag_error(self, node: Node) -> SchemaValidateError:
        tag = "!!" + node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
        return self._error(node, f"tag {tag} is not allowed", "recipes hold plain values only")

    def _error(self, node: Node, what: str, remedy: str | None = None) -> SchemaValidateError:
        mark = node.start_mark
        return SchemaValidateError(what, where=f"{self._path}:{mark.line + 1}:{mark.column + 1}", remedy=remedy)

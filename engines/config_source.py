"""A YAML file as plain values that remember their line. Hostile files cost bounded time and memory.

Only what YAML 1.1's safe schema can say is read; duplicate keys, merge keys and aliases that expand
without end are problems, not surprises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from engines.config_errors import ConfigError, Problem

MAX_BYTES = 1 << 20
MAX_VALUES = 10_000  # after aliases are expanded
_TAG = "tag:yaml.org,2002:"
BROKEN = object()  # a value that could not be read; its problem is already listed


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar (bool, int, float, str, None, ...), or a list of Values, and where it stands."""

    value: object
    where: str


@dataclass(slots=True)
class Section:
    """A mapping whose keys are strings."""

    where: str
    entries: dict[str, Value | Section] = field(default_factory=dict)


Node = Value | Section


def read_yaml(path: Path) -> tuple[Section, list[Problem]]:
    """The file's top-level mapping, and what is wrong inside it (those entries are left out).

    Raises ConfigError when the file cannot be read as a mapping at all.
    """
    text = _read_text(path)
    root = _compose(path, text)
    if root is None:
        raise ConfigError([Problem(f"{path}:1", "", "the file is empty", remedy="write at least modelName")])
    tree = _Tree(path)
    node = tree.convert(root, "")
    if isinstance(node, Section):
        return node, tree.problems
    wrong = f"the top level is {describe(node)}, not a mapping"
    raise ConfigError([*tree.problems, Problem(node.where, "", wrong, remedy="write `key: value` lines")])


def describe(node: Node) -> str:
    """What a node is, in words and short."""
    if isinstance(node, Section):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "empty"
    if isinstance(node.value, int) and node.value.bit_length() > 256:
        return "a very large integer"
    names = {bool: "the boolean", int: "the integer", float: "the number", str: "the text"}
    text = repr(node.value) if not isinstance(node.value, bool) else str(node.value).lower()
    return f"{names.get(type(node.value), 'a ' + type(node.value).__name__)} {_shorten(text)}"


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _read_text(path: Path) -> str:
    remedy = "give a readable model-config.yaml"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
        raise ConfigError([Problem(f"{path}:1", "", wrong, remedy=remedy)]) from error
    if len(data) > MAX_BYTES:
        wrong = f"the file is larger than {MAX_BYTES} bytes"
        raise ConfigError([Problem(f"{path}:1", "", wrong, remedy=remedy)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem(f"{path}:{line}", "", "the file is not UTF-8", remedy="save it as UTF-8")
        raise ConfigError([problem]) from error


def _compose(path: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        wrong = f"not valid YAML: {error.problem or error.context}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        wrong = f"not valid YAML: {error.reason}"
    except RecursionError:
        line, wrong = 1, "nested too deeply"
    remedy = "correct the syntax at this line (indentation, colons, quotes, brackets)"
    raise ConfigError([Problem(f"{path}:{line}", "", wrong, remedy=remedy)])


class _Tree:
    """Turns composed nodes into Values, counting what aliases expand to."""

    def __init__(self, path: Path) -> None:
        self.problems: list[Problem] = []
        self._path = path
        self._count = 0
        self._open: set[int] = set()  # nodes being converted: an alias to one of them has no end
        self._loader = yaml.SafeLoader("")

    def convert(self, node: yaml.Node, key: str) -> Node:
        where = self._where(node)
        self._count += 1
        if self._count > MAX_VALUES or id(node) in self._open:
            wrong = f"anchors and aliases expand to more than {MAX_VALUES} values"
            raise ConfigError([Problem(where, key, wrong, remedy="write the values out")])
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
            wrong = f"the tag {_shorten(node.tag)!r} is not read"
            self.problems.append(Problem(where, key, wrong, remedy="remove it"))
            return Value(BROKEN, where)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return Section(where, dict(self._entries(node, key)))
            if isinstance(node, yaml.SequenceNode):
                items = [self.convert(item, key) for item in node.value]
                is_broken = any(isinstance(item, Value) and item.value is BROKEN for item in items)
                return Value(BROKEN if is_broken else items, where)
            return Value(self._scalar(node, key), where)
        finally:
            self._open.discard(id(node))

    def _entries(self, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, Node]]:
        first: dict[str, str] = {}
        for key_node, value_node in node.value:
            where = self._where(key_node)
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            tags = (_TAG + "str", _TAG + "int") if prefix else (_TAG + "str",)  # maxMemory's devices: 0, 1
            if name is None or key_node.tag not in tags or not name.isprintable() or len(name) > 100:
                self._key_problem(where, prefix, key_node)
                continue
            path = f"{prefix}.{name}" if prefix else name
            if name in first:
                wrong = f"set twice; the first is at {first[name]}"
                self.problems.append(Problem(where, path, wrong, remedy="keep one of them"))
                continue
            first[name] = where
            yield name, self.convert(value_node, path)

    def _key_problem(self, where: str, prefix: str, node: yaml.Node) -> None:
        if node.tag == _TAG + "merge":
            wrong, remedy = "merge keys (<<) are not read", "write the keys out"
        else:
            text = _shorten(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            wrong, remedy = f"the key {text!r} is not text", "use the documented key names"
        self.problems.append(Problem(where, prefix, wrong, remedy=remedy))

    def _scalar(self, node: yaml.Node, key: str) -> object:
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.MarkedYAMLError as error:
            wrong = str(error.problem)
        except (ValueError, OverflowError, TypeError, LookupError, AttributeError):
            # what PyYAML's constructors raise on a tag that does not suit its text
            wrong = f"not a value of its type: {_shorten(repr(node.value))}"
        remedy = "write a plain value, or quote it if it is text"
        self.problems.append(Problem(self._where(node), key, _shorten(wrong), remedy=remedy))
        return BROKEN

    def _where(self, node: yaml.Node) -> str:
        return f"{self._path}:{node.start_mark.line + 1}"

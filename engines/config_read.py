"""From a YAML tree to checked settings: each key known, of its type, within its bounds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from engines.config_errors import A_SLIP, ConfigError, Problem, nearest
from engines.config_schema import FREE_FORM, SECTIONS, TOP, Key, Kind
from engines.config_source import BROKEN, Node, Section, Value, describe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-./:]*")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


@dataclass(slots=True)
class Settings:
    """Checked values by dotted key, where each stands, and what was found on the way.

    Typed getters return None (or the default) for a key that is absent."""

    file: str
    values: dict[str, object] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def has(self, key: str) -> bool:
        """Was the key given, right or wrong?"""
        return key in self.places

    def where(self, key: str) -> str:
        """Where the key stands, or where its section does, or the file's first line."""
        return self.places.get(key) or self.places.get(key.partition(".")[0]) or f"{self.file}:1"

    def integer(self, key: str) -> int | None:
        return cast("int | None", self.values.get(key))

    def number(self, key: str) -> float | None:
        return cast("float | None", self.values.get(key))

    def text(self, key: str) -> str | None:
        return cast("str | None", self.values.get(key))

    def flag(self, key: str, *, default: bool = False) -> bool:
        return self.values.get(key, default) is True

    def texts(self, key: str) -> tuple[str, ...] | None:
        return cast("tuple[str, ...] | None", self.values.get(key))

    def integers(self, key: str) -> tuple[int, ...] | None:
        return cast("tuple[int, ...] | None", self.values.get(key))

    def problem(self, key: str, wrong: str, *, allowed: str = "", near: str = "", remedy: str = "") -> None:
        self.problems.append(Problem(self.where(key), key, wrong, allowed, near, remedy))

    def warn(self, key: str, text: str) -> None:
        self.warnings.append(f"{self.where(key)}: {key}: {text}")

    def check(self) -> None:
        """Raise ConfigError with everything found so far, if anything was, in file order."""
        if self.problems:
            raise ConfigError(sorted(self.problems, key=lambda p: _line(p.where)))


def _line(where: str) -> int:
    line = where.rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def warning_line(warning: str) -> int:
    """The line that a warning names, to sort by."""
    return _line(warning.partition(": ")[0])


def read_settings(tree: Section, problems: list[Problem], file: str) -> Settings:
    """Check every entry of the tree against the schema."""
    settings = Settings(file, problems=list(problems))
    for name, node in tree.entries.items():
        settings.places[name] = node.where
        if name in SECTIONS:
            _read_section(settings, name, node)
        elif name in TOP:
            _read_key(settings, name, TOP[name], node)
        else:
            _unknown(settings, name, _homes(name), [*TOP, *SECTIONS])
    return settings


def _read_section(settings: Settings, section: str, node: Node) -> None:
    if isinstance(node, Value):
        if node.value is not None and node.value is not BROKEN:
            allowed = "a mapping of " + ", ".join(SECTIONS[section])
            settings.problem(
                section, f"is {describe(node)}", allowed=allowed, remedy="indent its keys under it"
            )
        return
    schema = SECTIONS[section]
    for name, entry in node.entries.items():
        path = f"{section}.{name}"
        settings.places[path] = entry.where
        if name in schema:
            _read_key(settings, path, schema[name], entry)
        elif section in FREE_FORM:
            _free(settings, path, name, schema)
        else:
            _unknown(settings, path, _homes(name), list(schema))


def _free(settings: Settings, path: str, name: str, schema: Mapping[str, Key]) -> None:
    """A key that a handler of the user's may have read; but a slip in one of ours would act unseen."""
    if slip := nearest(name, schema, A_SLIP):
        settings.problem(path, "unknown key", near=slip, remedy=f"write it as {slip}, or remove the key")
        return
    near = nearest(name, schema)
    hint = f"; did you mean {near!r}?" if near else ""
    settings.warn(path, f"has no effect: no handler code runs here{hint}")


def _homes(name: str) -> list[str]:
    """The dotted keys under which this name is known."""
    found = [f"{section}.{name}" for section, schema in SECTIONS.items() if name in schema]
    return [name, *found] if name in TOP else found


def _unknown(settings: Settings, path: str, homes: list[str], known: list[str]) -> None:
    near = homes[0] if homes else nearest(path.rpartition(".")[2], known)
    remedy = f"write it as {near}" if homes else "correct the name or remove the key"
    allowed = "" if near else ", ".join(known)
    settings.problem(path, "unknown key", allowed=allowed, near=near, remedy=remedy)


def _read_key(settings: Settings, path: str, key: Key, node: Node) -> None:
    if isinstance(node, Value) and node.value is BROKEN:
        return
    try:
        value = _parse(key, node)
    except _Wrong as wrong:
        near = (
            nearest(node.value, key.choices)
            if key.choices and isinstance(node, Value) and isinstance(node.value, str)
            else ""
        )
        if near:
            remedy = f"write `{path.rpartition('.')[2]}: {near}`"
            settings.problem(path, str(wrong), allowed=key.allowed(), near=near, remedy=remedy)
        else:
            settings.problem(path, str(wrong), remedy=f"give {_one_of(key)}{key.allowed()}")
        return
    settings.values[path] = value
    if _is_harmless(value, key):
        return
    if key.refused:
        wrong_value = f"{describe(node)} cannot be served: {key.refused}"
        settings.problem(path, wrong_value, remedy=key.remedy)
    elif key.ignored:
        settings.warn(path, f"has no effect: {key.ignored}")


def _one_of(key: Key) -> str:
    return "one of " if key.choices else ""


def _is_harmless(value: object, key: Key) -> bool:
    return any(value == one and type(value) is type(one) for one in key.harmless)


class _Wrong(Exception):  # noqa: N818  a value, not a failure
    pass


def _parse(key: Key, node: Node) -> object:
    """The value of a node as its key wants it. Raises _Wrong."""
    if key.kind is Kind.ANY:
        return node.value if isinstance(node, Value) else node
    if isinstance(node, Section):
        raise _Wrong(f"is {describe(node)}")
    return _PARSERS[key.kind](key, node)


def _integer(key: Key, node: Value) -> int:
    if type(node.value) is not int:
        raise _Wrong(f"is {describe(node)}")
    return cast(int, _within(key, node, node.value))


def _number(key: Key, node: Value) -> float:
    number = node.value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number:
        raise _Wrong(f"is {describe(node)}")
    return float(_within(key, node, number))


def _within(key: Key, node: Value, number: float) -> float:
    assert key.low is not None
    too_low = number <= key.low if key.above else number < key.low
    if too_low or (key.high is not None and number > key.high):
        raise _Wrong(f"is {describe(node)}, out of bounds")
    return number


def _boolean(key: Key, node: Value) -> bool:
    if not isinstance(node.value, bool):
        raise _Wrong(f"is {describe(node)}")
    return node.value


def _text(key: Key, node: Value) -> str:
    text = node.value
    if not isinstance(text, str) or not text or not text.isprintable():
        raise _Wrong(f"is {describe(node)}")
    if not key.choices:
        return text
    if text.casefold() not in key.choices:
        raise _Wrong(f"is {describe(node)}")
    return key.choices[text.casefold()]


def _name(key: Key, node: Value) -> str:
    text = _text(key, node)
    if not _NAME.fullmatch(text):
        raise _Wrong(f"is {describe(node)}")
    return text


def _bytes(key: Key, node: Value) -> int:
    if type(node.value) is int:
        return cast(int, _within(key, node, node.value))
    match = _SIZE.fullmatch(node.value.strip()) if isinstance(node.value, str) else None
    if not match:
        raise _Wrong(f"is {describe(node)}")
    unit = (match[2] or "").lower().removesuffix("b")
    return int(_within(key, node, float(match[1]) * (_UNITS | _BINARY_UNITS)[unit]))


def parse_bytes(node: Value) -> int | None:
    """A size above 0, or None if the node is not one."""
    try:
        return _bytes(Key(Kind.BYTES, 1, 1 << 50), node)
    except _Wrong:
        return None


def _items(node: Value) -> Iterator[Value]:
    for item in node.value if isinstance(node.value, list) else [node]:
        if not isinstance(item, Value):
            raise _Wrong("holds a mapping")
        yield item


def _texts(key: Key, node: Value) -> tuple[str, ...]:
    texts = tuple(_text(key, item) for item in _items(node))
    if not texts:
        raise _Wrong("is an empty list")
    return texts


def _integers(key: Key, node: Value) -> tuple[int, ...]:
    if not isinstance(node.value, list):
        raise _Wrong(f"is {describe(node)}")
    integers = tuple(_integer(key, item) for item in _items(node))
    if not integers:
        raise _Wrong("is an empty list")
    if len(set(integers)) != len(integers):
        raise _Wrong("names one twice")
    return integers


def _counts(key: Key, node: Value) -> str | tuple[int, ...]:
    """One of the key's choices, or numbers that may repeat."""
    if not isinstance(node.value, list):
        return _text(key, node)
    if not node.value:
        raise _Wrong("is an empty list")
    return tuple(_integer(key, item) for item in _items(node))


_PARSERS: Mapping[Kind, Callable[[Key, Value], object]] = {
    Kind.INT: _integer,
    Kind.NUMBER: _number,
    Kind.BOOL: _boolean,
    Kind.TEXT: _text,
    Kind.NAME: _name,
    Kind.BYTES: _bytes,
    Kind.TEXTS: _texts,
    Kind.INTS: _integers,
    Kind.COUNTS: _counts,
}

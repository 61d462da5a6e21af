"""JSON in a text that is still coming: strings, values, and objects that call functions."""

from __future__ import annotations

import json
import re

from gateway.answer.events import Output
from gateway.answer.reader import Reader, Steps

_ARGUMENTS = ("arguments", "parameters")
_PLAIN = re.compile(r'[^"\\]*')
_OPENING = re.compile(r"[{\[]*")
_INSIDE = re.compile(r'[^"{}\[\]]*')
_SCALAR = re.compile(r'[^"{}\[\],\s]*')


def read_string(reader: Reader) -> Steps[str | None]:
    """A string, decoded. None if what is next is none."""
    if not (yield from reader.literal('"')):
        return None
    raw = ['"']
    while char := (yield from _string_part(reader, raw)):
        if char == '"':
            return _decoded("".join(raw))
    return None


def read_value(reader: Reader) -> Steps[bool]:
    """A value, by its quotes and brackets alone. False if the text ends within it."""
    depth = 0
    while char := (yield from reader.peek()):
        if char == '"':
            if not (yield from _skip_string(reader)):
                return False
        elif char in "{[":
            depth += len((yield from reader.run(_OPENING)))
            continue
        elif char in "}]":
            if depth == 0:
                return True
            depth -= 1
            yield from reader.char()
        elif depth:
            yield from reader.run(_INSIDE)
        elif not (yield from reader.run(_SCALAR)):
            return True
        if depth == 0:
            return True
    return False


def read_arguments(reader: Reader, out: Output, name: str) -> Steps[bool]:
    """An object, of a call of `name`. Whether it is one, of a known function: then the call has gone to
    `out`."""
    if (yield from reader.peek()) != "{" or not out.may_call(name):
        return False
    out.call(name)
    with reader.into(out.arguments):
        yield from read_value(reader)
    return True


def read_call(reader: Reader, out: Output, *, needs_arguments: bool = False) -> Steps[bool]:
    """{"name": ..., "arguments": {...}}, in any order; "parameters" are arguments, too. Whether it is a
    call of a known function: then it has gone to `out`, as it came."""
    return (yield from _Call(reader, out, needs_arguments).read())


class _Call:
    """One such object. A call begins with the first arguments after its name, and is not taken back."""

    def __init__(self, reader: Reader, out: Output, needs_arguments: bool) -> None:
        self._reader, self._out, self._needs_arguments = reader, out, needs_arguments
        self._name: str | None = None
        self._early: str | None = None  # arguments that came before the name
        self._has_begun = False

    def read(self) -> Steps[bool]:
        reader = self._reader
        if not (yield from reader.literal("{")):
            return False
        while True:
            yield from reader.space()
            key = yield from read_string(reader)
            yield from reader.space()
            if key is None or not (yield from reader.literal(":")):
                return self._has_begun
            yield from reader.space()
            if not (yield from self._member(key)):
                return self._has_begun
            yield from reader.space()
            if not (yield from reader.literal(",")):
                break
        if (yield from reader.literal("}")):
            self._end()
        return self._has_begun

    def _member(self, key: str) -> Steps[bool]:
        if key == "name" and self._name is None:
            self._name = yield from read_string(self._reader)
            return self._out.may_call(self._name)
        if key in _ARGUMENTS and not self._has_begun and self._early is None:
            return (yield from self._arguments())
        return (yield from read_value(self._reader))

    def _arguments(self) -> Steps[bool]:
        """An object; some models write it as a string, JSON within JSON."""
        first = yield from self._reader.peek()
        if first == '"':
            text = yield from read_string(self._reader)
            if text is not None and self._name is not None:
                self._begin(text)
            self._early = text
            return text is not None
        if first != "{":
            return False
        if self._name is None:
            early: list[str] = []
            with self._reader.also_into(early.append):
                is_whole = yield from read_value(self._reader)
            self._early = "".join(early)
            return is_whole
        self._begin("")
        with self._reader.into(self._out.arguments):
            return (yield from read_value(self._reader))

    def _begin(self, arguments: str) -> None:
        assert self._name is not None
        self._has_begun = True
        self._out.call(self._name)
        if arguments:
            self._out.arguments(arguments)

    def _end(self) -> None:
        """The object is whole: a name with arguments before it is a call, and one without may be."""
        if self._has_begun or self._name is None:
            return
        if self._early is not None:
            self._begin(self._early)
        elif not self._needs_arguments:
            self._begin("{}")


def _string_part(reader: Reader, raw: list[str]) -> Steps[str]:
    """Up to and with the next quote or backslash, which it returns; a backslash with what it escapes."""
    raw.append((yield from reader.run(_PLAIN)))
    char = yield from reader.char()
    raw.append(char)
    if char == "\\":
        raw.append((yield from reader.char()))
    return char


def _skip_string(reader: Reader) -> Steps[bool]:
    yield from reader.char()
    while char := (yield from _string_part(reader, [])):
        if char == '"':
            return True
    return False


def _decoded(raw: str) -> str | None:
    try:
        text = json.loads(raw, strict=False)
        text.encode()
    except ValueError:  # a bad escape, or half of a surrogate pair
        return None
    return str(text)

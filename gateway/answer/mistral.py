"""Mistral: [TOOL_CALLS] and then [{"name": ..., "arguments": {...}}, ...], or, since its version 11, name
and arguments of one call for each: [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import ClassVar

from gateway.answer.events import Output
from gateway.answer.grammar import Calls, Function, call_rules, literal, one_or_some
from gateway.answer.json_text import read_arguments, read_call
from gateway.answer.reader import Reader, Steps
from gateway.answer.tool_format import attempt, content_until
from gateway.prompt.marks import Marks

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.-]*")
_MAX_NAME_CHARS = 64
_NUM_ID_CHARS = 9  # the templates refuse any other number


class Mistral:
    MARKS: ClassVar[tuple[str, ...]] = (_CALLS, _ID, _ARGUMENTS)

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._calls, self._id, self._arguments = map(marks.spell, self.MARKS)

    def read(self, reader: Reader, out: Output) -> Steps[None]:
        while (yield from content_until(reader, out, self._calls)):
            yield from attempt(reader, out, self._read_calls)

    def _read_calls(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(self._calls)
        yield from reader.space()
        if (yield from reader.peek()) == "[":
            return (yield from self._read_list(reader, out))
        return (yield from self._read_named(reader, out))

    def _read_list(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal("[")
        yield from reader.space()
        if not (yield from read_call(reader, out)):
            return False
        is_call = True
        while is_call:
            yield from reader.space()
            if (yield from reader.peek()) != ",":
                yield from reader.literal("]")
                break
            is_call = yield from attempt(reader, out, self._read_next)
        return True

    def _read_next(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(",")
        yield from reader.space()
        return (yield from read_call(reader, out))

    def _read_named(self, reader: Reader, out: Output) -> Steps[bool]:
        name = yield from reader.run(_NAME, _MAX_NAME_CHARS)
        if (yield from reader.literal(self._id, self._arguments)) == self._id:
            yield from reader.run(_NAME, _MAX_NAME_CHARS)
            yield from reader.literal(self._arguments)
        yield from reader.space()
        return (yield from read_arguments(reader, out, name))

    def grammar(self, functions: Sequence[Function], *, many: bool) -> Calls:
        """The list: every version reads it."""
        return Calls(
            opening=self._marks.grammar(_CALLS),
            text="",
            calls=f'" "? "[" {one_or_some("call", literal(", "), many=many)} "]"',
            rules=call_rules(functions, "arguments"),
        )

    def id_for_template(self, id: str) -> str:
        return hashlib.sha256(id.encode()).hexdigest()[:_NUM_ID_CHARS]

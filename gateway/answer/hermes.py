"""Hermes, Qwen and many others: <tool_call>{"name": ..., "arguments": {...}}</tool_call> for each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gateway.answer.events import Output
from gateway.answer.grammar import Calls, Function, call_rules
from gateway.answer.json_text import read_call
from gateway.answer.reader import Reader, Steps
from gateway.answer.tool_format import attempt, content_until
from gateway.prompt.marks import Marks

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    MARKS: ClassVar[tuple[str, ...]] = (_OPEN, _CLOSE)

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._open, self._close = marks.spell(_OPEN), marks.spell(_CLOSE)

    def read(self, reader: Reader, out: Output) -> Steps[None]:
        while (yield from content_until(reader, out, self._open)):
            yield from attempt(reader, out, self._read_call)

    def _read_call(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(self._open)
        yield from reader.space()
        if not (yield from read_call(reader, out)):
            return False
        yield from reader.space()
        yield from reader.literal(self._close)
        return True

    def grammar(self, functions: Sequence[Function], *, many: bool) -> Calls:
        open, close = self._marks.grammar(_OPEN), self._marks.grammar(_CLOSE)
        one = rf'"\n" call "\n" {close}'
        return Calls(
            opening=open,
            text="",
            calls=one + (rf' ("\n" {open} {one})*' if many else ""),
            rules=call_rules(functions, "arguments"),
        )

    def id_for_template(self, id: str) -> str:
        return id

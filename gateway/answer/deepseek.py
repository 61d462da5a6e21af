"""DeepSeek: calls between tags that are tokens of their own, in one of two forms.

V3 and R1, with the call's kind and a fence:

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    ARGUMENTS
    ```<｜tool▁call▁end｜>

V3.1: <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from gateway.answer.events import Output
from gateway.answer.grammar import Calls, Function, json_rule, literal, one_or_some
from gateway.answer.json_text import read_arguments
from gateway.answer.reader import Reader, Steps
from gateway.answer.tool_format import attempt, content_until
from gateway.prompt.marks import Marks

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_KIND = "function"
_FENCE, _FENCE_END = "\n```json\n", "\n```"
_NAME = re.compile(r"[\w.-]*")
_MAX_NAME_CHARS = 64


class DeepSeek:
    """V3.1's."""

    MARKS: ClassVar[tuple[str, ...]] = (_CALLS, _CALLS_END, _CALL, _SEPARATOR, _CALL_END)

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        spelled = map(marks.spell, self.MARKS)
        self._calls, self._calls_end, self._call, self._separator, self._call_end = spelled

    def read(self, reader: Reader, out: Output) -> Steps[None]:
        """Either form, whichever the model was made for."""
        while (yield from content_until(reader, out, self._calls)):
            if (yield from attempt(reader, out, self._read_first)):
                yield from self._read_more(reader, out)

    def _read_first(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(self._calls)
        yield from reader.space()
        return bool((yield from reader.literal(self._call))) and (yield from self._read_call(reader, out))

    def _read_more(self, reader: Reader, out: Output) -> Steps[None]:
        is_call = True
        while is_call:
            yield from reader.space()
            if (yield from reader.literal(self._call, self._calls_end)) != self._call:
                return
            is_call = yield from attempt(reader, out, self._read_call, before=self._call)

    def _read_call(self, reader: Reader, out: Output) -> Steps[bool]:
        """From behind the tag that begins it."""
        name = yield from reader.run(_NAME, _MAX_NAME_CHARS)
        if not (yield from reader.literal(self._separator)):
            return False
        if is_fenced := name == _KIND and not out.may_call(_KIND):
            name = yield from reader.run(_NAME, _MAX_NAME_CHARS)
            yield from reader.literal(_FENCE)
        yield from reader.space()
        if not (yield from read_arguments(reader, out, name)):
            return False
        yield from reader.space()
        if is_fenced:
            yield from reader.literal(_FENCE_END.strip())
        yield from reader.literal(self._call_end)
        return True

    def grammar(self, functions: Sequence[Function], *, many: bool) -> Calls:
        calls, calls_end, call, separator, call_end = map(self._marks.grammar, self.MARKS)
        one = [f"{call} {self._grammar_of_call(f, n, separator)} {call_end}" for n, f in enumerate(functions)]
        rules = [
            json_rule(f"arguments_{number}", function.schema) for number, function in enumerate(functions)
        ]
        return Calls(
            opening=calls,
            text="",
            calls=f"{one_or_some('call', self._between, many=many)} {calls_end}",
            rules=[f"call: {' | '.join(one)}", *rules],
        )

    _between = '""'

    def _grammar_of_call(self, function: Function, number: int, separator: str) -> str:
        return f"{literal(function.name)} {separator} arguments_{number}"

    def id_for_template(self, id: str) -> str:
        return id


class DeepSeekFenced(DeepSeek):
    """V3's and R1's."""

    _between = r'"\n"'

    def _grammar_of_call(self, function: Function, number: int, separator: str) -> str:
        before, after = literal(function.name + _FENCE), literal(_FENCE_END)
        return f"{literal(_KIND)} {separator} {before} arguments_{number} {after}"

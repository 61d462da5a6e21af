"""Llama 3.x: the answer is {"name": ..., "parameters": {...}}, or some with "; " between them; or they come
behind <|python_tag|>."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gateway.answer.events import Output
from gateway.answer.grammar import Calls, Function, call_rules, one_or_some
from gateway.answer.json_text import read_call
from gateway.answer.reader import Reader, Steps
from gateway.answer.tool_format import attempt, content_until
from gateway.prompt.marks import Marks

_TAG = "<|python_tag|>"


class LlamaJson:
    MARKS: ClassVar[tuple[str, ...]] = (_TAG,)

    def __init__(self, marks: Marks) -> None:
        self._marks, self._tag = marks, marks.spell(_TAG)

    def read(self, reader: Reader, out: Output) -> Steps[None]:
        """Without the tag only a whole answer is a call, and only with parameters: other JSON has names."""
        yield from attempt(reader, out, self._read_bare)
        while (yield from content_until(reader, out, self._tag)):
            yield from attempt(reader, out, self._read_tagged)

    def _read_bare(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.space()
        is_call = yield from read_call(reader, out, needs_arguments=True)
        if is_call:
            yield from self._read_more(reader, out)
        return is_call

    def _read_tagged(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(self._tag)
        yield from reader.space()
        is_call = yield from read_call(reader, out)
        if is_call:
            yield from self._read_more(reader, out)
        return is_call

    def _read_more(self, reader: Reader, out: Output) -> Steps[None]:
        """Calls behind the first one."""
        is_call = True
        while is_call:
            yield from reader.space()
            if (yield from reader.peek()) != ";":
                return
            is_call = yield from attempt(reader, out, self._read_next)

    def _read_next(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(";")
        yield from reader.space()
        return (yield from read_call(reader, out, needs_arguments=True))

    def grammar(self, functions: Sequence[Function], *, many: bool) -> Calls:
        return Calls(
            opening=None,
            text=r"/([^{\s](?s:.*))?/",
            calls=one_or_some("call", '"; "', many=many),
            rules=call_rules(functions, "parameters"),
            mark=self._marks.grammar(_TAG),
        )

    def id_for_template(self, id: str) -> str:
        return id

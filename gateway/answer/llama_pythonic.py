"""Llama's pythonic calls: the answer is a list, [get_weather(city="Oslo", days=3), now()].

Arguments are Python's literals and become JSON as they come. JSON's true, false and null are taken, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from gateway.answer.events import Output
from gateway.answer.grammar import Calls, Function, json_rule, literal, one_or_some, styled
from gateway.answer.python_text import read_literal
from gateway.answer.reader import Reader, Steps
from gateway.answer.tool_format import attempt, content_until
from gateway.prompt.marks import Marks

_START, _END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.-]*")
_MAX_NAME_CHARS = 64
_MAX_KEY_CHARS = 256


class LlamaPythonic:
    MARKS: ClassVar[tuple[str, ...]] = (_START, _END)

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._start, self._end = marks.spell(_START), marks.spell(_END)

    def read(self, reader: Reader, out: Output) -> Steps[None]:
        yield from attempt(reader, out, self._read_list)
        while (yield from content_until(reader, out, self._start)):
            yield from attempt(reader, out, self._read_tagged)

    def _read_tagged(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(self._start)
        return (yield from self._read_list(reader, out))

    def _read_list(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.space()
        if not (yield from reader.literal("[")) or not (yield from self._read_call(reader, out)):
            return False
        is_call = True
        while is_call:
            yield from reader.space()
            if (yield from reader.peek()) != ",":
                yield from self._read_end(reader)
                break
            is_call = yield from attempt(reader, out, self._read_next)
        return True

    def _read_end(self, reader: Reader) -> Steps[None]:
        yield from reader.literal("]")
        yield from reader.space()
        if (yield from reader.peek()) == self._end[0]:
            yield from reader.literal(self._end)

    def _read_next(self, reader: Reader, out: Output) -> Steps[bool]:
        yield from reader.literal(",")
        return (yield from self._read_call(reader, out))

    def _read_call(self, reader: Reader, out: Output) -> Steps[bool]:
        """name(key=literal, ...). It is certain that it is one with the first `=` or the closing `)`."""
        yield from reader.space()
        name = yield from reader.run(_NAME, _MAX_NAME_CHARS)
        if not out.may_call(name) or not (yield from reader.literal("(")):
            return False
        num_arguments = 0
        while True:
            yield from reader.space()
            if (yield from reader.literal(")")):
                break
            key = yield from self._read_key(reader)
            if not key:
                return num_arguments > 0
            if not num_arguments:
                out.call(name)
            out.arguments(f"{', ' if num_arguments else '{'}{json.dumps(key, ensure_ascii=False)}: ")
            num_arguments += 1
            if not (yield from read_literal(reader, out.arguments)):
                return True
            yield from reader.space()
            yield from reader.literal(",")
        if not num_arguments:
            out.call(name)
        out.arguments("}" if num_arguments else "{}")
        return True

    def _read_key(self, reader: Reader) -> Steps[str]:
        key = yield from reader.run(_NAME, _MAX_KEY_CHARS)
        yield from reader.space()
        return key if (yield from reader.literal("=")) else ""

    def grammar(self, functions: Sequence[Function], *, many: bool) -> Calls:
        """Each argument by its own schema, in the schema's order, the optional ones left out or not."""
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(functions)))}"]
        for number, function in enumerate(functions):
            rules += _rules_of_call(f"call_{number}", function)
        return Calls(
            opening=None,
            text=r"/([^\[\s](?s:.*))?/",
            calls=f'"[" {one_or_some("call", chr(34) + ", " + chr(34), many=many)} "]"',
            rules=rules,
            mark=self._marks.grammar(_START),
        )

    def id_for_template(self, id: str) -> str:
        return id


def _rules_of_call(rule: str, function: Function) -> list[str]:
    schema = function.schema
    properties = schema.get("properties")
    if not function.is_exact or not isinstance(properties, dict):
        return [
            f'{rule}: {literal(function.name + "(")} ({rule}_any (", " {rule}_any)*)? ")"',
            rf'{rule}_any: /[A-Za-z_]\w{{0,63}}/ "=" {rule}_value',
            json_rule(f"{rule}_value", styled({})),
        ]
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [f'{rule}: {literal(function.name + "(")} {rule}_first_0 ")"']
    for place, (key, inner) in enumerate(properties.items()):
        argument = f"{literal(key + '=')} {rule}_value_{place} {rule}_more_{place + 1}"
        is_needed = key in schema.get("required", ())
        first, more = ("" if is_needed else f" | {rule}_{kind}_{place + 1}" for kind in ("first", "more"))
        own = {**inner, **shared} if isinstance(inner, dict) else shared
        rules += [
            f"{rule}_first_{place}: {argument}{first}",
            f'{rule}_more_{place}: ", " {argument}{more}',
            json_rule(f"{rule}_value_{place}", styled(own, is_lenient=not function.is_strict)),
        ]
    return [*rules, *(f'{rule}_{kind}_{len(properties)}: ""' for kind in ("first", "more"))]

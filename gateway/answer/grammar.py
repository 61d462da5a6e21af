"""Grammars of answers, in llguidance's Lark: thoughts, text and calls of functions as a model writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As json.dumps writes it, and as models have read it; free white space would be a way to never end."""

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(NamedTuple):
    """A function that may be called. `is_exact`: its arguments are those of its schema."""

    name: str
    parameters: Mapping[str, Any] | None
    is_strict: bool = False
    is_exact: bool = True

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments. What the grammar does not know of a schema is an error only if it is strict."""
        if not self.is_exact:
            return styled(_ANY_OBJECT)
        schema = _NO_ARGUMENTS if self.parameters is None else {"type": "object", **self.parameters}
        return styled(schema, is_lenient=not self.is_strict)


def styled(schema: Mapping[str, Any], *, is_lenient: bool = False) -> dict[str, Any]:
    return {**schema, "x-guidance": {**_JSON_STYLE, "lenient": is_lenient}}


class Calls(NamedTuple):
    """How a format's calls are written, in Lark."""

    calls: str  # the expression for one call, or some
    rules: Sequence[str]  # that it needs
    text: str  # a regular expression, in Lark: text in which no call begins
    follow_text: bool  # whether calls may come behind text


class Thoughts(NamedTuple):
    """What may come before an answer, and the rules that it needs."""

    expression: str = ""
    rules: Sequence[str] = ()


def thoughts_between(open: str, close: str, *, is_open: bool | None) -> Thoughts:
    """Thoughts between two literals. `is_open`: the prompt has opened them; None: the model may."""
    if is_open is False:
        return Thoughts()
    body = rf"THOUGHT {close} /\n{{0,2}}/"
    rules = [f"thoughts: {body}" if is_open else f"thoughts: ({open} {body})?"]
    return Thoughts("thoughts", [*rules, f"THOUGHT: {text_without(close)}"])


def answer_grammar(calls: Calls, thoughts: Thoughts, *, required: bool) -> str:
    """Thoughts and calls; if these are not required, text or both."""
    answer = "calls" if required else "TEXT calls?" if calls.follow_text else "calls | TEXT"
    lines = [
        f"start: {thoughts.expression} answer",
        f"answer: {answer}",
        f"calls: {calls.calls}",
        *([] if required else [f"TEXT: {calls.text}"]),
        *calls.rules,
        *thoughts.rules,
    ]
    return "\n".join(lines)


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    return f"{name}: %json {json.dumps(schema, ensure_ascii=False)}"


def text_without(mark: str) -> str:
    """Any text that does not contain `mark`, a literal of a Lark grammar; a control token is in no text."""
    if not mark.startswith('"'):
        return "/(?s:.*)/"
    escaped = re.escape(json.loads(mark)).replace("/", r"\/")
    return f"/(?s:.*)/ & ~/(?s:.*{escaped}.*)/"


def one_or_some(expression: str, separator: str, *, many: bool) -> str:
    return f"{expression} ({separator} {expression})*" if many else expression


def call_rules(functions: Sequence[Function], key: str) -> list[str]:
    """The rule `call` for an object {"name": ..., KEY: ...}, and those of the arguments."""
    heads = [literal(f'{{"name": {literal(function.name)}, "{key}": ') for function in functions]
    choices = [f'{head} arguments_{number} "}}"' for number, head in enumerate(heads)]
    rules = [json_rule(f"arguments_{number}", function.schema) for number, function in enumerate(functions)]
    return [f"call: {' | '.join(choices)}", *rules]

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

    opening: str | None  # the literal by which they are known in a text; None: they are the whole answer,
    text: str  # and a text by this expression is none
    calls: str  # the expression for one or some, behind the opening
    rules: Sequence[str]  # that it needs
    mark: str = ""  # the literal that tells whole answers from other JSON, where that may come too


class Thoughts(NamedTuple):
    """What may come before an answer."""

    expression: str = ""
    rules: Sequence[str] = ()
    opening: str | None = None  # the literal that no other answer begins with


NO_THOUGHTS = Thoughts()
_TEXT = "/(?s:.*)/"


def thoughts_between(open: str, close: str, *, is_open: bool | None) -> Thoughts:
    """Thoughts between two literals. `is_open`: the prompt has opened them; None: the model may."""
    if is_open is False:
        return NO_THOUGHTS
    rules = [rf"thoughts_end: {_up_to(close, 'thoughts')} /\n{{0,2}}/", *_up_to_rules(close, "thoughts")]
    if is_open:
        return Thoughts("thoughts_end", rules)
    return Thoughts(f"({open} thoughts_end)?", rules, open)


def answer_grammar(
    thoughts: Thoughts, calls: Calls | None, *, required: bool = False, content: str | None = None
) -> str:
    """Thoughts, and then calls; if these are not required, also an answer by another grammar, `content`, or
    without one text, behind which calls may come."""
    lines = [f"start: {thoughts.expression} answer", *thoughts.rules]
    if calls is not None:
        lines += [f"calls: {calls.calls}", *calls.rules]
    if calls is not None and (required or content is not None):
        choices = [f"{calls.opening or ('' if required else calls.mark)} calls"]
    elif calls is not None:
        lines += _text_and_calls(calls, thoughts.opening)
        choices = ["text_and_calls"]
    else:
        choices = []
    if content is None or required:
        return "\n".join([*lines, f"answer: {choices[0]}"])
    return _with_content("\n".join([*lines, f"answer: {' | '.join([*choices, '@content'])}"]), content)


def _text_and_calls(calls: Calls, not_first: str | None) -> list[str]:
    """Text, calls or both, not beginning with one literal."""
    others = "" if not_first is None or not not_first.startswith('"') else f" & ~/{_regex(not_first)}(?s:.*)/"
    if calls.opening is None:
        return ["text_and_calls: calls | TEXT", f"TEXT: {calls.text}{others}"]
    return [
        f"text_and_calls: TEXT | {_up_to(calls.opening, 'before')} calls",
        f"TEXT: {_TEXT}{others}",
        *_up_to_rules(calls.opening, "before", others),
    ]


def _up_to(mark: str, name: str) -> str:
    """Text up to and with a literal, the first of its kind: a control token ends a text by itself."""
    return name if mark.startswith('"') else f"{name} {mark}"


def _up_to_rules(mark: str, name: str, others: str = "") -> list[str]:
    if not mark.startswith('"'):
        return [f"{name}: {name.upper()}", f"{name.upper()}: {_TEXT}{others}"]
    return [f"{name}[lazy]: {name.upper()}", f"{name.upper()}: /(?s:.*){_regex(mark)}/{others}"]


def _regex(literal: str) -> str:
    """For a literal of Lark."""
    return re.escape(str(json.loads(literal))).replace("/", r"\/")


def _with_content(lark: str, content: str) -> str:
    """Both grammars in llguidance's JSON, in which one refers to the other by its name."""
    given: list[dict[str, Any]] = [{"lark_grammar": content}]
    if content.startswith("{"):
        given = json.loads(content)["grammars"]
    first, *others = given
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**first, "name": "content"}, *others]})


def without_ids(grammar: str) -> str:
    """The grammar with one token for all control tokens, which can be checked without a vocabulary."""
    return re.sub(r"<\[\d+\]>", "<[0]>", grammar)


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    return f"{name}: %json {json.dumps(schema, ensure_ascii=False)}"


def one_or_some(expression: str, separator: str, *, many: bool) -> str:
    return f"{expression} ({separator} {expression})*" if many else expression


def call_rules(functions: Sequence[Function], key: str) -> list[str]:
    """The rule `call` for an object {"name": ..., KEY: ...}, and those of the arguments."""
    heads = [literal(f'{{"name": {literal(function.name)}, "{key}": ') for function in functions]
    choices = [f'{head} arguments_{number} "}}"' for number, head in enumerate(heads)]
    rules = [json_rule(f"arguments_{number}", function.schema) for number, function in enumerate(functions)]
    return [f"call: {' | '.join(choices)}", *rules]

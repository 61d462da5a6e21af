"""Compiles what answers must look like, in a process of its own: `python -m gateway.grammar_process`.

A question is {"kind", "source"}, its answer {"grammar": of llguidance} or {"refused": why not}. Only what
llguidance follows to the letter passes; it refuses the rest itself, and here its refusal gets its place in a
schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from engines.bounds import GRAMMAR_LIMITS
from gateway.helper_process import answer_questions

JSON_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}
"""For JSON: no endless white space, which models fall into; as much as indents need."""

NUM_STEPS = 8
"""Of a text that is written on trial."""

_LIMITS = LLParserLimits(**GRAMMAR_LIMITS, verbose_errors=False)
_BYTES = LLTokenizer("byte")
_ALL_BYTES = (1 << 256) - 1
_HELD = ("additionalProperties", "additionalItems", "items")  # keywords that hold a schema,
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")  # a list of them,
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # or some by name

Schema = dict[str, Any]


class Refused(ValueError):  # noqa: N818
    """What was asked for cannot be followed, and why."""


def make(kind: str, source: str) -> str:
    """The grammar, of which text can be written. Raises Refused."""
    grammar = _MAKERS[kind](source)
    if (problem := _problem(grammar)) is not None:
        raise Refused(_placed(json.loads(source), problem) if kind == "json_schema" else _plain(problem))
    return grammar


def _problem(grammar: str) -> str | None:
    """What llguidance has against it."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=_LIMITS)
    if is_error:
        return messages[0].partition("\n  while processing")[0]
    matcher = LLMatcher(_BYTES, grammar, log_level=0, limits=_LIMITS)
    if "unknown special token" in matcher.get_error():  # the engine knows those of the model
        return None
    return _problem_of_text(matcher)


def _problem_of_text(matcher: LLMatcher) -> str | None:
    """What is found when the beginning of a text is written."""
    for _ in range(NUM_STEPS):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") if not matcher.is_error() else 0
        if matcher.is_error():
            why = matcher.get_error().partition("\n")[0]
            return f"it is too large to follow, or no text can match it ({why})"
        if not allowed & _ALL_BYTES:
            return None
        matcher.consume_token((allowed & _ALL_BYTES).bit_length() - 1)
    return None


def _of_schema(source: str) -> str:
    schema = json.loads(source)
    for path, part in _all_parts(schema):
        least, required = part.get("minProperties"), part.get("required", [])
        has_free = isinstance(least, int) and isinstance(required, list) and least > len(required) + 1
        if has_free:  # llguidance does not tell whether one of these comes twice
            raise Refused(
                f"'minProperties' is supported up to one more than what is 'required', at {_shown(path)}"
            )
    return _schema_grammar(schema)


def _schema_grammar(schema: Schema) -> str:
    return json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": JSON_OPTIONS}}]})


def _of_choice(source: str) -> str:
    return LLMatcher.grammar_from_regex("|".join(map(_literal, json.loads(source))))


def _literal(text: str) -> str:
    """As a regular expression."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


_MAKERS: dict[str, Callable[[str], str]] = {
    "json_schema": _of_schema,
    "regex": LLMatcher.grammar_from_regex,
    "choice": _of_choice,
    "grammar": lambda source: grammar_from("grammar", source),
    "llguidance": lambda source: source,
}


def _placed(schema: Schema, problem: str) -> str:
    """The problem and the innermost place in the schema that has it by itself."""
    shared: Schema = {key: schema[key] for key in ("$schema", "$defs", "definitions") if key in schema}
    path, part = "", schema
    while inner := next(
        (
            (f"{path}{step}", each)
            for step, each in _parts(part)
            if _problem(_schema_grammar({**shared, **each})) == problem
        ),
        None,
    ):
        path, part = inner
    return f"{_plain(problem)}, at {_shown(path)}"


def _shown(path: str) -> str:
    return f"'#{path}'"


def _parts(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The schemas that are directly in it, each with its step of a JSON pointer. Definitions come last: what
    is wrong in one of them is wrong in all that refer to it."""
    for key in _HELD:
        if isinstance(schema.get(key), dict):
            yield f"/{key}", schema[key]
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            yield from ((f"/{key}/{i}", each) for i, each in enumerate(schema[key]) if isinstance(each, dict))
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            for name, each in schema[key].items():
                if isinstance(each, dict):
                    yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", each


def _all_parts(schema: Schema) -> Iterator[tuple[str, Schema]]:
    pending = [("", schema)]
    while pending:
        path, part = pending.pop()
        yield path, part
        pending += [(path + step, each) for step, each in _parts(part)]


_WORDS = (
    (r'Unimplemented keys: \["(.*)"\]', r"unsupported keyword '\1'"),
    (r"oneOf constraints are not supported.*", "'oneOf' is supported where no two of its schemas can match"),
    (r"Unknown format: (.*)", r"unsupported format '\1'"),
    (r"Resource '(.*)' is not present.*", r"'$ref' leads out of the schema, to '\1'"),
)
"""llguidance's words, and ours for who wrote the request."""


def _plain(problem: str) -> str:
    for pattern, ours in _WORDS:
        if match := re.fullmatch(pattern, problem, re.DOTALL):
            return match.expand(ours).replace('", "', "', '")
    return " ".join(problem.split())[:500]


def _answer(question: Any) -> dict[str, str]:
    try:
        return {"grammar": make(question["kind"], question["source"])}
    except ValueError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    answer_questions(lambda job: _answer)

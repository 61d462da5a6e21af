"""Bodies are bounded before they are parsed, and mean one thing only."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocol import json_body
from gateway.protocol.json_body import MalformedBody, parse_object

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.sampled_from('a"\\[]{}:,/\n\u00e9\U0001f986') | st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=30,
)


def _depth(value: Any) -> int:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(_depth, inner), default=0)
    return 0


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=6), st.booleans())
def test_every_object_is_parsed_as_python_does_and_measured_exactly(
    value: dict[str, Any], ensure_ascii: bool
) -> None:
    body = json.dumps(value, ensure_ascii=ensure_ascii).encode()
    assert parse_object(body) == value
    structure = json_body._structure(body)
    assert json_body._depth(structure) == _depth(value)
    assert set(structure) <= set(b"[]{}:, truefalsn0123456789+-.eE")


@pytest.mark.parametrize("opening", [b'{"a":', b'{"a":[', b'{"\\\\":[{"a":'])
def test_nesting_may_be_so_deep_and_no_deeper(opening: bytes) -> None:
    per_round = sum(opening.count(bracket) for bracket in (b"[", b"{"))
    closing = b"".join({"[": b"]", "{": b"}"}[char] for char in reversed(opening.decode()) if char in "[{")

    def nested(depth: int) -> bytes:
        rounds, rest = divmod(depth, per_round)
        return opening * rounds + b'{"a":' * rest + b"1" + b"}" * rest + closing * rounds

    assert _depth(parse_object(nested(json_body.MAX_DEPTH))) == json_body.MAX_DEPTH
    with pytest.raises(MalformedBody, match="nested more than 64 levels"):
        parse_object(nested(json_body.MAX_DEPTH + 1))
    assert parse_object(b'{"a": "' + b"[" * 1_000 + b'"}')["a"] == "[" * 1_000


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"a": [' + b"[]," * 65_536 + b"1]}", "lists and objects"),
        (b"{" + b"a:1," * 65_537 + b"b:1}", "keys"),
        (b'{"a": [' + b"1," * 2_097_153 + b"1]}", "values"),
        (b'{"a": [' + b'"",' * 262_144 + b"1]}", "strings"),
        (b'{"a": 1' + b"0" * 100 + b"}", "digits"),
        (b'{"a": 1.' + b"0" * 101 + b"}", "digits"),
    ],
)
def test_there_is_a_limit_to_everything_that_a_body_can_have_many_of(body: bytes, what: str) -> None:
    with pytest.raises(MalformedBody, match=f"more than [0-9]+ {what}"):
        parse_object(body)


def test_a_million_token_ids_and_a_long_text_are_allowed() -> None:
    ids = list(range(1_000_000))
    assert parse_object(json.dumps({"prompt": ids}).encode())["prompt"] == ids
    text = 'say "\\[[{{" \n' * 200_000
    assert parse_object(json.dumps({"prompt": text}).encode())["prompt"] == text


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 1}',
        b'{"b": {"a": 1, "a": 2}}',
        b'{"b": [0, {"a": 1, "\\u0061": 2}]}',
        b'{"b": {}, "c": [{"": 1}, {"": 1, "": 2}]}',
    ],
)
def test_a_key_may_be_once_in_an_object(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="a key twice in one object"):
        parse_object(body)


def test_a_key_may_be_in_many_objects() -> None:
    body = b'{"a": {"a": [{"a": 1}, {"a": ":"}]}, "b": {"a": null}}'
    assert parse_object(body) == json.loads(body)


def test_nothing_of_a_body_is_kept_when_it_is_done_with() -> None:
    body = b'{"model": "demo", "prompt": "a secret", "metadata": {"to whom": "a friend"}}'

    def strings(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [string for pair in value.items() for part in pair for string in strings(part)]
        return [value]

    first, second = strings(parse_object(body)), strings(parse_object(body))
    assert first == second
    assert not {id(string) for string in first} & {id(string) for string in second}, "read anew each time"

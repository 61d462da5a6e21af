"""What answers must look like, from the request's field to the engine's grammar; hostile ones hurt nobody."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from llguidance import LLMatcher, LLTokenizer

from gateway.grammar import MAX_KEPT, Grammars, Kind
from gateway.protocol import bounds
from gateway.protocol.common import GenerationParams, InvalidField
from gateway.protocol.structured import Shape
from tests.fakes import FakeGroup
from tests.gateway.serving import client_of, make_app, make_group

pytestmark = pytest.mark.anyio
BYTES = LLTokenizer("byte")
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "demo", "prompt": "hi"}
Schema = dict[str, Any]


def accepts(grammar: str, text: str) -> bool:
    """Whether it is a whole text of the grammar."""
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


async def grammar_of(kind: Kind, source: object, grammars: Grammars | None = None) -> str:
    text = source if isinstance(source, str) else json.dumps(source)
    shape = Shape(kind, text, "it")  # type: ignore[arg-type]
    params = await (grammars or Grammars()).constrain(GenerationParams(), shape)
    assert params.grammar is not None
    return params.grammar


def object_of(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


AWKWARD = ["a", "ab", 'q"\\', "\n\t\x01\x7f", "é€😀", "</x>", "<|end|>", "a/b", "x | y", "{", "/[a]/"]


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("json_schema", {"type": "object"}, ["{}", '{"a": [1, null]}', "{ }"], ["", "[]", "{} ", "{", " {}"]),
        (
            "json_schema",
            object_of(a={"type": "integer"}),
            ['{"a": 1}', "{\n\n}"],
            ['{"a": 1.5}', '{"a": "x"}'],
        ),
        (
            "json_schema",
            {"type": "object", "x-guidance": {"item_separator": ";"}},
            ['{"a":1,"b":2}'],
            ['{"a":1;"b":2}'],
        ),
        (
            "json_schema",
            {"enum": AWKWARD},
            [json.dumps(text, ensure_ascii=False) for text in AWKWARD[:3]],
            ['"b"'],
        ),
        ("regex", "[a-z]{2,3}-\\d+", ["ab-1", "abc-99"], ["a-1", "ab-", "ab-1 "]),
        ("regex", "^(yes|no)$", ["yes", "no"], ["maybe", "yesno"]),
        ("regex", "a/b", ["a/b"], ["a\\/b"]),
        ("choice", AWKWARD, AWKWARD, ["b", "abc", ""]),
        ("grammar", 'start: "a" b+\nb: /[0-9]/', ["a1", "a12"], ["a", "1"]),
        ("grammar", 'root ::= "a" [0-9]+', ["a1", "a12"], ["a", "1"]),
        ("llguidance", 'start: %json {"const": 5}', ["5"], ["6"]),
    ],
)
async def test_what_can_be_followed(kind: Kind, source: object, good: list[str], bad: list[str]) -> None:
    grammar = await grammar_of(kind, source)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


async def test_white_space_in_json_has_an_end() -> None:
    grammar = await grammar_of("json_schema", {"type": "object"})
    assert accepts(grammar, '{\n        "a": 1}')
    assert not accepts(grammar, "{" + " " * 100 + "}")


DEEP: Schema = {"type": "string"}
for _ in range(50):
    DEEP = {"type": "array", "items": DEEP}
IMPOSSIBLE: list[tuple[Kind, object, str]] = [
    ("json_schema", object_of(a={"not": {}}), "unsupported keyword 'not', at '#/properties/a'"),
    (
        "json_schema",
        object_of(a={"items": {"anyOf": [{"type": "null"}, {"if": True, "uniqueItems": True}]}}),
        "unsupported keyword 'if', 'uniqueItems', at '#/properties/a/items/anyOf/1'",
    ),
    ("json_schema", {"allOf": [object_of(), {"contains": {}}]}, "'contains', at '#/allOf/1'"),
    ("json_schema", {"$ref": "#/$defs/x", "$defs": {"x": {"propertyNames": {}}}}, "at '#/$defs/x'"),
    ("json_schema", object_of(**{"a/b~": {"type": "text"}}), "Invalid type: text, at '#/properties/a~1b~0'"),
    ("json_schema", object_of(a={"type": "string", "format": "zip"}), "unsupported format 'zip', at"),
    ("json_schema", object_of(a={"type": "string", "pattern": "(?=x)"}), "at '#/properties/a'"),
    (
        "json_schema",
        object_of(a={"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]}),
        "'oneOf'",
    ),
    ("json_schema", {"type": "object", "minProperties": 2}, "'minProperties'"),
    ("json_schema", {"type": "object", "minProperties": "2"}, "minProperties"),
    ("json_schema", {"type": "object", "required": 2}, "required"),
    ("json_schema", {"type": "object", "required": ["a"], "properties": {"a": False}}, "property 'a'"),
    ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "'not'"),
    ("json_schema", object_of(a={"$ref": "https://example.com/s.json"}), "leads out of the schema"),
    ("json_schema", object_of(a={"$ref": "file:///etc/passwd"}), "leads out of the schema"),
    ("json_schema", object_of(a={"$ref": "#/$defs/none"}), "'/$defs/none' does not exist"),
    ("json_schema", {"$ref": "#"}, "no text can match it"),
    ("json_schema", {"allOf": [{"$ref": "#"}], "type": "object"}, "circular"),
    ("regex", "(?<=a)b", "look-around"),
    ("regex", "(a)\\1", "backreferences"),
    ("regex", "[", "unclosed"),
    ("grammar", "start: missing", "unknown name"),
    ("grammar", "start: start", "no text can match it"),
    ("grammar", "root ::= missing", "missing"),
    ("grammar", '{"grammars": [{"json_schema": {}}]}', "Lark"),
    ("llguidance", '{"grammars": []}', ""),
]


@pytest.mark.parametrize(("kind", "source", "why"), IMPOSSIBLE)
async def test_what_cannot_is_refused_with_its_place(kind: Kind, source: object, why: str) -> None:
    with pytest.raises(InvalidField) as refused:
        await grammar_of(kind, source)
    assert refused.value.param == "it"
    assert str(refused.value).startswith("'it' cannot be followed: ")
    assert why in str(refused.value)
    assert len(str(refused.value)) < 700


def _alternatives(count: int) -> Schema:
    pair = [[object_of(**{f"k{i}": {"const": value}}) for value in (1, 2)] for i in range(count)]
    return {"allOf": [{"anyOf": each} for each in pair]}


def _references(count: int, link: Callable[[Schema], Schema]) -> Schema:
    defs: Schema = {f"a{i}": link({"$ref": f"#/$defs/a{i - 1}"}) for i in range(1, count)}
    return {"$ref": f"#/$defs/a{count - 1}", "$defs": {"a0": {"type": "string"}, **defs}}


HOSTILE: dict[str, tuple[Kind, object]] = {
    "deep": ("json_schema", DEEP),
    "wide": ("json_schema", object_of(**{f"p{i}": {"type": "string"} for i in range(4_000)})),
    "many values": ("json_schema", {"enum": [f"value {i}" for i in range(15_000)]}),
    "alternatives": ("json_schema", _alternatives(40)),
    "references": ("json_schema", _references(60, lambda ref: object_of(x=ref, y=ref))),
    "intersections": ("json_schema", _references(40, lambda ref: {"allOf": [ref, ref]})),
    "recursion": ("json_schema", {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    "patterns": ("json_schema", {"patternProperties": {f".*{chr(97 + i)}.{{20}}$": {} for i in range(20)}}),
    "items": ("json_schema", {"type": "array", "minItems": 10**9, "maxItems": 10**9}),
    "length": ("json_schema", {"type": "string", "minLength": 10**9}),
    "numbers": ("json_schema", {"type": "integer", "minimum": -(10**90), "maximum": 10**90}),
    "multiples": ("json_schema", {"type": "integer", "multipleOf": 999_999_937}),
    "catastrophic": ("regex", "(a+)+$|((a|b)*a(a|b){500})*"),
    "repeats": ("regex", "(((a{500}){500}){500}){500}"),
    "later repeats": ("regex", "[xy](((a{500}){500}){500}){500}"),
    "stars": ("regex", "x*" * 3_000),
    "parentheses": ("regex", "(" * 20_000 + ")" * 20_000),
    "choices": ("choice", [f"c{i}" for i in range(10_000)]),
    "doubling": (
        "grammar",
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"',
    ),
    "ambiguous": ("grammar", 'start: a\na: a a a a | a a | "x" | ""'),
    "nested": ("grammar", "start: " + "(" * 3_000 + '"a"' + ")" * 3_000),
    "nested GBNF": ("grammar", "root ::= " + "(" * 3_000),
}


async def test_hostile_ones_are_refused_or_harmless(model_dir: Path) -> None:
    """Each with the same patience for all, while others are served: none waits longer than it takes to make
    its own, and the event loop is never held."""
    group = make_group(model_dir)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.process_time()
            await asyncio.sleep(0)
            longest = max(longest, time.process_time() - before)
            await asyncio.sleep(0.001)

    async with client_of(make_app(model_dir, group)) as client:
        watching = asyncio.create_task(watch())
        statuses: dict[str, int] = {}
        for name, (kind, source) in HOSTILE.items():
            field = {"json_schema": "json"}.get(kind, kind)
            body = {**PROMPT, "structured_outputs": {field: source}}
            hostile, other = await asyncio.gather(
                client.post("/v1/completions", json=body), client.post("/v1/completions", json=PROMPT)
            )
            statuses[name] = hostile.status_code
            assert other.status_code == 200
            if hostile.status_code == 400:
                assert hostile.json()["error"]["param"] == f"structured_outputs.{field}"
        watching.cancel()
    assert set(statuses.values()) == {200, 400}, statuses
    assert longest < 0.25
    sent = {request.grammar for request in group.requests} - {""}
    assert len(sent) == list(statuses.values()).count(200)
    for grammar in sent:  # what was let through costs the engine little
        matcher, started = LLMatcher(BYTES, grammar), time.process_time()
        for _ in range(20):
            allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << 256) - 1)
            if matcher.is_error() or not allowed:
                break
            matcher.consume_token(allowed.bit_length() - 1)
        assert time.process_time() - started < 2.0, grammar[:200]


def helper_processes() -> set[int]:
    children = psutil.Process().children()
    return {child.pid for child in children if "gateway.grammar_process" in child.cmdline()}


async def test_one_that_kills_the_helper_is_refused_and_the_next_is_served() -> None:
    grammars, before = Grammars(), helper_processes()
    await grammar_of("regex", "first", grammars)
    [pid] = helper_processes() - before
    os.kill(pid, signal.SIGSTOP)  # so that the question is there when it dies
    asking = asyncio.create_task(grammar_of("regex", "second", grammars))
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(InvalidField, match="too much memory"):
        await asking
    assert accepts(await grammar_of("regex", "third", grammars), "third")
    assert len(helper_processes() - before) == 1


async def test_time_is_bounded() -> None:
    wide = object_of(**{f"p{i}": {"type": "string"} for i in range(3_000)})
    with pytest.raises(InvalidField, match=r"more than 0\.05 s"):
        await grammar_of("json_schema", wide, Grammars(seconds=0.05))


async def test_answers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, questions = Grammars(), []
    ask = grammars._helper.ask

    async def counted(question: Any) -> dict[str, Any]:
        questions.append(question)
        return await ask(question)

    monkeypatch.setattr(grammars._helper, "ask", counted)
    first = await asyncio.gather(*(grammar_of("regex", "a+", grammars) for _ in range(20)))
    assert len(set(first)) == len(questions) == 1
    for _ in range(2):
        with pytest.raises(InvalidField):
            await grammar_of("regex", "[", grammars)
    assert len(questions) == 2
    for i in range(MAX_KEPT):
        grammars._keep(bytes([i >> 8, i & 255]), {"grammar": "x" * 100_000})
    assert 0 < len(grammars._kept) < MAX_KEPT
    assert sum(len(each["grammar"]) for each in grammars._kept.values()) == grammars._num_kept_chars


PERSON = object_of(name={"type": "string"})
WRITTEN: list[tuple[Schema, str | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
    ({"response_format": {"type": "json_object"}}, "{}"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON}}}, "{}"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a-B_9", "schema": PERSON, "strict": True, "description": "d"},
            }
        },
        '{"name": "x"}',
    ),
    ({"structured_outputs": {"json": PERSON}}, "{}"),
    ({"structured_outputs": {"json": json.dumps(PERSON), "disable_fallback": True}}, "{}"),
    ({"structured_outputs": {"json_object": True}}, "{}"),
    ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": False}}, "aa"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "b"),
    ({"structured_outputs": {"grammar": 'start: "x"'}}, "x"),
    ({"guided_json": PERSON}, "{}"),
    ({"guided_json": json.dumps(PERSON), "guided_decoding_backend": "auto"}, "{}"),
    ({"guided_regex": "a+"}, "aa"),
    ({"guided_choice": ["a", "b"]}, "b"),
    ({"guided_grammar": 'start: "x"'}, "x"),
]


@pytest.mark.parametrize(("fields", "text"), WRITTEN, ids=str)
@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", PROMPT)])
async def test_every_way_to_ask(
    model_dir: Path, group: FakeGroup, fields: Schema, text: str | None, path: str, body: Schema
) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        response = await client.post(f"/v1/{path}", json={**body, **fields, "n": 2})
    assert response.status_code == 200, response.text
    grammars = [request.grammar for request in group.requests]
    if text is None:
        assert grammars == ["", ""]
    else:
        assert len(set(grammars)) == 1
        assert len(grammars) == 2
        assert accepts(grammars[0], text)


def schema_format(**more: object) -> Schema:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, **more}}}


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
            "only",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "Missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "Missing",
        ),
        (schema_format(name="a b"), "response_format.json_schema.name", "pattern"),
        (schema_format(name="x" * 65), "response_format.json_schema.name", "pattern"),
        (schema_format(schema=[]), "response_format.json_schema.schema", "dict"),
        (schema_format(schema={"not": {}}), "response_format.json_schema.schema", "'not', at '#'"),
        (schema_format(strict=1), "response_format.json_schema.strict", "boolean"),
        (
            schema_format(schema={"enum": ["x" * bounds.MAX_SHAPE_CHARS]}),
            "response_format.json_schema.schema",
            "at most",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "the schema is not valid JSON"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "at least 1"),
        (
            {"structured_outputs": {"regex": "x" * (bounds.MAX_SHAPE_CHARS + 1)}},
            "structured_outputs.regex",
            "at most",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        (
            {"structured_outputs": {"choice": ["x"] * (bounds.MAX_SHAPE_CHOICES + 1)}},
            "structured_outputs.choice",
            "at most",
        ),
        ({"structured_outputs": {"choice": ["x" * 100_000] * 3}}, "structured_outputs.choice", "at most"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "one of them"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag", "not supported"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "whitespace_pattern", "not supported"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "unclosed"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "one of them"),
        (
            {"guided_whitespace_pattern": "x", "guided_regex": "a"},
            "guided_whitespace_pattern",
            "not supported",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "not allowed with 'guided_regex'"),
        ({"guided_choice": ["a"], "min_tokens": 2}, "min_tokens", "not allowed with 'guided_choice'"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", PROMPT)])
async def test_what_is_wrong_is_a_400_at_once(
    model_dir: Path, group: FakeGroup, fields: Schema, param: str, why: str, path: str, body: Schema
) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        response: httpx.Response = await client.post(f"/v1/{path}", json={**body, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert why in error["message"]
    assert group.requests == []

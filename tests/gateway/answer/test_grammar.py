"""The grammars of calls: what a model may write under them is what the format reads, and nothing else."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from gateway.answer.formats import FORMATS
from gateway.answer.grammar import Function, without_ids
from gateway.answer.reasoning import Tags
from tests.gateway.answer.reading import format_of, read

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Function("get_weather", CITY)
NOW = Function("now", None)
TOKENIZER = LLTokenizer("byte")

ONE = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama-json": '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
    "llama-pythonic": '[get_weather(city="Oslo")]',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]',
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama-json": ONE["llama-json"] + '; {"name": "now", "parameters": {}}',
    "llama-pythonic": '[get_weather(city="Oslo"), now()]',
    "mistral": ONE["mistral"][:-1] + ', {"name": "now", "arguments": {}}]',
    "deepseek-v3": ONE["deepseek-v3"].removesuffix("<｜tool▁calls▁end｜>")
    + "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "deepseek-v3.1": ONE["deepseek-v3.1"].removesuffix("<｜tool▁calls▁end｜>")
    + "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}


def accepts(grammar: str, text: str) -> bool:
    """Whether the text is one of the grammar's, whole."""
    assert LLMatcher.validate_grammar(grammar) == ""
    matcher = LLMatcher(TOKENIZER, grammar)
    for byte in text.encode():
        if not matcher.consume_token(byte):
            return False
    return matcher.is_accepting()


def grammar(
    name: str,
    *functions: Function,
    required: bool = True,
    many: bool = True,
    tags: Tags | None = None,
    is_thinking: bool | None = None,
    content: str | None = None,
) -> str:
    format = format_of(name, tags)
    return format.grammar(
        functions or (WEATHER, NOW), required=required, many=many, is_thinking=is_thinking, content=content
    )


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls(name: str) -> None:
    required = grammar(name)
    for text, calls in ((ONE[name], 1), (TWO[name], 2)):
        assert accepts(required, text), text
        answer = read(format_of(name), [text], ("get_weather", "now"))
        assert len(answer.calls) == calls
        assert answer.content == ""
    for text in ("", "Hello.", ONE[name].replace("get_weather", "nobody"), ONE[name].replace("city", "town")):
        assert not accepts(required, text), text
    assert not accepts(required, ONE[name].replace('"Oslo"', "3"))
    assert not accepts(grammar(name, many=False), TWO[name])
    assert not accepts(grammar(name, NOW), ONE[name])


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_may_be_made(name: str) -> None:
    """Text, or calls, which are then of those that are allowed, with what their schemas ask for."""
    free = grammar(name, required=False)
    for text in ("", "Hello.", "It is [so] that {x} < y.", ONE[name], TWO[name]):
        assert accepts(free, text), text
    if "llama" not in name:  # whose calls are whole answers
        assert accepts(free, "I look.\n" + ONE[name])
        assert not accepts(free, "I look.\n" + ONE[name].replace("get_weather", "nobody"))
    assert not accepts(free, ONE[name].replace("get_weather", "nobody"))
    assert not accepts(free, ONE[name].replace('"Oslo"', "3"))
    loose = Function("get_weather", CITY, is_exact=False)
    assert accepts(grammar(name, loose, required=False), ONE[name].replace('"Oslo"', "3"))


@pytest.mark.parametrize("name", FORMATS)
def test_thoughts_come_first(name: str) -> None:
    tags = Tags("<think>", "</think>")
    thinking = f"Hm, {ONE[name]}?\n</think>\n\n{ONE[name]}"
    assert accepts(grammar(name, tags=tags, is_thinking=True), thinking)
    assert not accepts(grammar(name, tags=tags, is_thinking=True), ONE[name])
    assert accepts(grammar(name, tags=tags), f"<think>{thinking}")
    assert accepts(grammar(name, tags=tags), ONE[name])
    assert not accepts(grammar(name, tags=tags, is_thinking=False), f"<think>{thinking}")
    free = grammar(name, tags=tags, required=False)
    assert accepts(free, f"<think>{thinking}")
    assert accepts(free, "<think>\nHm.\n</think>\n\nHello.")
    assert accepts(free, "Hello.")
    assert not accepts(free, f"<think>{thinking}".replace('"Oslo"', "3"))


@pytest.mark.parametrize("name", FORMATS)
def test_content_by_a_grammar_of_its_own(name: str) -> None:
    """A response_format: what the model says when it calls nothing."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    content = json.dumps({"grammars": [{"json_schema": schema | {"additionalProperties": False}}]})
    both = grammar(name, required=False, content=content, tags=Tags("<think>", "</think>"))
    assert json.loads(both)["grammars"][1]["name"] == "content"
    assert accepts(both, '{"a":1}')
    assert accepts(both, '<think>x</think>\n{"a":1}')
    mark = {"llama-json": "<|python_tag|>", "llama-pythonic": "<|python_start|>"}.get(name, "")
    assert accepts(both, mark + ONE[name])
    assert read(format_of(name), [mark + ONE[name]], ("get_weather",)).calls
    assert not accepts(both, "Hello.")
    lark = grammar(name, required=False, content='start: "yes" | "no"')
    assert accepts(lark, "yes")
    assert not accepts(lark, "maybe")


def test_optional_arguments_of_pythonic_calls() -> None:
    free = grammar("llama-pythonic", Function("f", {"properties": {k: {"type": "integer"} for k in "abc"}}))
    for arguments in ("", "a=1", "b=2", "c=3", "a=1, c=3", "b=2, c=3", "a=1, b=2, c=3"):
        assert accepts(free, f"[f({arguments})]"), arguments
    for arguments in (", ", "a=1,", "c=3, a=1", "a=1, a=1", "d=1", "a=x"):
        assert not accepts(free, f"[f({arguments})]"), arguments


def test_control_tokens_are_ids() -> None:
    format = format_of("mistral", control=True)
    written = format.grammar([NOW], required=True, many=False, is_thinking=False, content=None)
    assert "<[0]>" in written  # Plain's id of the first mark
    assert "TOOL_CALLS" not in written
    assert without_ids("a: <[17]> <[0]>") == "a: <[0]> <[0]>"


def test_lenient_only_where_it_is_not_strict() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {}}}}
    assert LLMatcher.validate_grammar(grammar("hermes", Function("f", odd))) == ""
    assert LLMatcher.validate_grammar(grammar("hermes", Function("f", odd, is_strict=True))) != ""

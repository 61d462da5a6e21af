"""Every format of tool calls: each text whole, character by character and cut at random gives the same."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from engines import config_schema
from gateway.answer import formats, reasoning
from gateway.answer.reader import Reader
from tests.gateway.answer.reading import cuts, format_of, read, spelled

NAMES = ("get_weather", "now", "function")
OSLO = '{"city": "Oslo"}'
Calls = list[tuple[str, str]]

HERMES: list[tuple[str, str, Calls]] = [
    ("Hello.", "Hello.", []),
    ("", "", []),
    (" \n", " \n", []),
    (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "",
        [("get_weather", OSLO)],
    ),
    (
        'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n',
        "Let me see.",
        [("get_weather", OSLO)],
    ),
    (
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
        '<tool_call>{"arguments":  {"a" : [1, {"b": "}"}]}, "name": "get_weather"}</tool_call> Done.',
        "Done.",
        [("now", "{}"), ("get_weather", '{"a" : [1, {"b": "}"}]}')],
    ),
    ('<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    (
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\u00e4\\"}"}</tool_call>',
        "",
        [("now", '{"a": "ä"}')],
    ),
    ('<tool_call>{"id": 7, "name": "now", "arguments": {}, "x": [{}]}</tool_call>', "", [("now", "{}")]),
    ('<tool_call>{"name": "now", "arguments": {"a": "<tool_call>"}}', "", [("now", '{"a": "<tool_call>"}')]),
    ('<tool_call>{"name": "now", "arguments": {"a": [1', "", [("now", '{"a": [1')]),
    ('<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None, []),  # not one of the tools
    ("Write <tool_call> like this: <tool_call>{...}</tool_call>.", None, []),
    ("<tool_call>", None, []),
    ("<tool_call> \n ", None, []),
    ("<tool_ca", None, []),
    ("a < b <t <tool <tool_call", None, []),
    ('<tool_call>{"name": "now"', None, []),
    ('<tool_call>{"name": "now", "arguments": 3}</tool_call>', None, []),
    ('<tool_call>{"name": "now", "arguments": "\\ud800"}</tool_call>', None, []),
    ('<tool_call>{"name": ["now"], "arguments": {}}</tool_call>', None, []),
    ('<tool_call>{"arguments": {"a": 1}}</tool_call>', None, []),
    (
        '<tool_call>{"name": "nobody"}</tool_call><tool_call>{"name": "now"}</tool_call>',
        '<tool_call>{"name": "nobody"}</tool_call>',
        [("now", "{}")],
    ),
    ('<tool_call>[<tool_call>{"name": "now"}</tool_call>', "<tool_call>[", [("now", "{}")]),
    ('<tool_<tool_call>{"name": "now"}</tool_call>', "<tool_", [("now", "{}")]),
]  # type: ignore[list-item]

LLAMA_JSON = [
    ("Hello.", None, []),
    ('{"name": "get_weather", "parameters": {"city": "Oslo"}}', "", [("get_weather", OSLO)]),
    (' {"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}', "",
     [("get_weather", OSLO)]),
    ('{"name": "now", "parameters": {}}; {"name": "get_weather", "arguments": {"city": "Oslo"}}', "",
     [("now", "{}"), ("get_weather", OSLO)]),
    ('<|python_tag|>{"name": "now", "parameters": {}}', "", [("now", "{}")]),
    ('I look.<|python_tag|>{"name": "now"}', "I look.", [("now", "{}")]),
    ('{"name": "now"}', None, []),  # JSON of another kind
    ('{"name": "Ann", "parameters": {}}', None, []),
    ('{"name": "now", "age": 7}', None, []),
    ('See {"name": "now", "parameters": {}}', None, []),
    ('{"name": "now", "parameters": {}}; and more', "; and more", [("now", "{}")]),
    ("<|python_tag|>print(1)", None, []),
    ("{", None, []),
    ("{{{{", None, []),
]  # fmt: skip

LLAMA_PYTHONIC = [
    ("Hello [1, 2].", None, []),
    ('[get_weather(city="Oslo")]', "", [("get_weather", OSLO)]),
    ("[get_weather(city='Oslo', days=3), now()]", "",
     [("get_weather", '{"city": "Oslo", "days": 3}'), ("now", "{}")]),
    ("<|python_start|>[now( )]<|python_end|>", "", [("now", "{}")]),
    ("Look: <|python_start|>[now(a=1,)]<|python_end|> ok", "Look:ok", [("now", '{"a": 1}')]),
    (
        "[now(a=[1, 2.5, -3,], b={'x': None, \"y\": (True, False)}, c=[], d={}, e=true, f=.5, g=0x10, h=())]",
        "",
        [("now", '{"a": [1, 2.5, -3], "b": {"x": null, "y": [true, false]}, "c": [], "d": {}, "e": true, '
                 '"f": 0.5, "g": 16, "h": []}')],
    ),
    (r"""[now(a='it\'s "q"\n\x41\u00e4\U0001F986\d', b="\\")]""", "",
     [("now", '{"a": "it\'s \\"q\\"\\n\\u0041\\u00e4🦆\\\\d", "b": "\\\\"}')]),
    ("[nobody()]", None, []),
    ("[now]", None, []),
    ("[now(1)]", None, []),
    ("[now(x)]", None, []),
    ("[", None, []),
    ("[[[[", None, []),
    ("[now(), nobody()]", ", nobody()]", [("now", "{}")]),
]  # fmt: skip

MISTRAL = [
    ("Hello.", None, []),
    ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]', "", [("get_weather", OSLO)]),
    ('[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "abcdefghi"}, {"name": "get_weather", "arguments": '
     '{"city": "Oslo"}}]', "", [("now", "{}"), ("get_weather", OSLO)]),
    ('[TOOL_CALLS]get_weather{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}', "",
     [("get_weather", OSLO), ("now", "{}")]),
    ('[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Oslo"}', "", [("get_weather", OSLO)]),
    ('Wait. [TOOL_CALLS] [{"name": "now", "arguments": {}}] ok', "Wait.ok", [("now", "{}")]),
    ("[TOOL_CALLS]", None, []),
    ("[TOOL_CALLS] []", None, []),
    ("[TOOL_CALLS]nobody{}", None, []),
    ('[TOOL_CALLS][{"name": "nobody", "arguments": {}}]', None, []),
    ('[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "nobody"}]', ', {"name": "nobody"}]',
     [("now", "{}")]),
    ("[TOOL_CALLS]" + "x" * 200, None, []),
    ("[TOOL_CALL] [TOOL", None, []),
]  # fmt: skip

_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"
_V31 = "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
_AROUND = "<｜tool▁calls▁begin｜>%s<｜tool▁calls▁end｜>"
DEEPSEEK = [
    ("Hello.", None, []),
    (_AROUND % (_V3 % ("get_weather", OSLO)), "", [("get_weather", OSLO)]),
    ("Now." + _AROUND % (_V3 % ("now", "{}") + "\n" + _V3 % ("get_weather", OSLO)), "Now.",
     [("now", "{}"), ("get_weather", OSLO)]),
    (_AROUND % (_V31 % ("get_weather", OSLO) + _V31 % ("now", "{}")), "",
     [("get_weather", OSLO), ("now", "{}")]),
    (_AROUND % (_V31 % ("nobody", OSLO)), None, []),
    (_AROUND % "", None, []),
    ("<｜tool▁calls▁begin｜> or <｜tool▁call", None, []),
    (_AROUND % (_V31 % ("now", "{}") + _V31 % ("nobody", "{}")),
     _V31 % ("nobody", "{}") + "<｜tool▁calls▁end｜>",
     [("now", "{}")]),
]  # fmt: skip

TABLE = {
    "hermes": HERMES,
    "llama-json": LLAMA_JSON,
    "llama-pythonic": LLAMA_PYTHONIC,
    "mistral": MISTRAL,
    "deepseek-v3": DEEPSEEK,
    "deepseek-v3.1": DEEPSEEK,
}


def test_every_format_is_in_the_table() -> None:
    assert set(TABLE) == set(formats.FORMATS)


@pytest.mark.parametrize("control", [False, True], ids=["marks-are-text", "marks-are-control-tokens"])
@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [(name, *case) for name, cases in TABLE.items() for case in cases],
)
def test_an_answer_in_any_pieces(
    name: str, text: str, content: str | None, calls: Calls, control: bool
) -> None:
    """A content of None is the whole text, unchanged; what a control token stands for is not shown."""
    format = format_of(name, control=control)
    names = NAMES if "function<" not in text else NAMES[:-1]
    shown = text if content is None else content
    if control:
        for mark in format.tools.MARKS:
            shown = shown.replace(mark, "")
            calls = [(called, arguments.replace(mark, "")) for called, arguments in calls]
    for pieces in cuts(spelled(format, text)):
        answer = read(format, pieces, names)
        assert [tuple(call) for call in answer.calls] == calls, pieces
        assert answer.content == shown, pieces


@pytest.mark.parametrize("name", TABLE)
def test_arguments_come_as_they_are_written(name: str) -> None:
    """A call has begun, and each character of its arguments is out, before the next one is there."""
    format = format_of(name)
    text, _, [(called, arguments)] = next(
        case for case in TABLE[name] if len(case[2]) == 1 and case[2][0][1] == OSLO
    )
    so_far, seen = "", []
    for char in text:
        so_far += char
        reader_so_far = read_open(format, so_far)
        seen.append(reader_so_far)
    grown = [calls for calls in seen if calls]
    assert grown[0][0][0] == called
    lengths = [len(calls[0][1]) for calls in grown]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= len('"Oslo"'), "in pieces"
    assert grown[-1][0][1] == arguments


def read_open(format: Any, text: str) -> list[list[str]]:
    """The calls so far, of an answer that goes on."""
    from gateway.answer.answer import AnswerReader
    from tests.gateway.answer.reading import Answer

    reader, answer = AnswerReader(format, NAMES[:-1]), Answer()
    for event in reader.feed(text):
        answer.add(event)
    return answer.calls


def _num_steps(format: Any, pieces: list[str]) -> int:
    """Lines of the reading package that run: what the time is proportional to, whatever the machine."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if "/gateway/answer/" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        read(format, pieces, NAMES)
    finally:
        sys.settrace(None)
    return count


HOSTILE = {
    "braces": "{" * 100,
    "brackets": "[" * 100,
    "nested": '{"a":[' * 20,
    "calls unclosed": '<tool_call>{"name": "now", "arguments": {"a": [' * 3,
    "marks": "<tool_call>" * 10 + "[TOOL_CALLS]" * 10 + "<|python_tag|>" * 10 + "<｜tool▁calls▁begin｜>" * 5,
    "marks begun": "<tool_cal<tool_cal[TOOL_CALL[TOOL<|python_ta<｜tool▁calls▁begin",
    "quotes": '<tool_call>{"' * 10,
    "backslashes": '{"name": "' + "\\" * 100,
    "spaces": " \n" * 60,
    "names": "now(" * 30,
    "pythonic": "[now(a=" + "[" * 60 + "'" + "\\" * 40,
    "early arguments": '{"parameters": {"a": ' + '"x", "b": ' * 20,
}


BEGUN = {
    "hermes": '<tool_call>{"name": "now", "arguments": {"a": ',
    "llama-json": '{"name": "now", "parameters": {"a": ',
    "llama-pythonic": "[now(a=[",
    "mistral": "[TOOL_CALLS]now{",
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{",
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", TABLE)
def test_hostile_texts_take_linear_time(name: str, hostile: str) -> None:
    """Twice the text, about twice the steps; and as much text copied. In pieces and whole."""
    format = format_of(name)
    prefix = BEGUN[name]
    for begun in ("", prefix):
        short, long = (begun + HOSTILE[hostile] * times for times in (2, 4))
        for cut in (list, lambda text: [text]):
            few, many = _num_steps(format, cut(short)), _num_steps(format, cut(long))
            assert many <= 2.5 * few + 200, (begun, few, many)


@pytest.mark.parametrize("name", TABLE)
def test_long_texts_are_not_copied_over_and_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader keeps unread is never more than a mark, so what it copies is the text itself."""
    most = 0
    feed = Reader.feed

    def watched(self: Reader, text: str) -> None:
        nonlocal most
        most = max(most, len(self._text) - self._at)
        feed(self, text)

    monkeypatch.setattr(Reader, "feed", watched)
    format = format_of(name)
    for text in ("{" * 2**18, '{"parameters": {"a": "' + "x" * 2**18, "[" * 2**16, "<tool_call>" * 2**10):
        pieces = [text[start : start + 64] for start in range(0, len(text), 64)]
        assert read(format, pieces, NAMES).content == text
    assert most < 32


def test_formats_are_detected() -> None:
    hermes = '{% if tools %}<tools>{% endif %}<tool_call>\\n{"name": '
    assert formats.detect(hermes) == "hermes"
    assert formats.detect("<tool_call>\\n<function=") is None
    assert formats.detect('{"name": function name, "parameters": dictionary') == "llama-json"
    assert formats.detect("[func_name1(params_name1=params_value1)]") == "llama-pythonic"
    assert formats.detect("{{ '[TOOL_CALLS] [' }}") == "mistral"
    assert formats.detect("<｜tool▁sep｜>' + name + '\\n```json") == "deepseek-v3"
    assert formats.detect("<｜tool▁sep｜>") == "deepseek-v3.1"
    assert formats.detect("{{ messages[0].content }}") is None


def test_pythonic_arguments_are_json() -> None:
    format = format_of("llama-pythonic")
    for pieces in cuts("[now(a={'k': [1, (2,), 'x\\ty']}, b=1_000, c=1e3, d=-.5)]"):
        [[_, arguments]] = read(format, pieces, NAMES).calls
        assert json.loads(arguments) == {"a": {"k": [1, [2], "x\ty"]}, "b": 1000, "c": 1000.0, "d": -0.5}


def test_the_configuration_knows_the_same_names() -> None:
    tools, thoughts = {"auto", "none", *formats.FORMATS}, {"auto", "none", *reasoning.FORMATS}
    assert set(config_schema.TOOL_FORMATS) == tools
    assert set(config_schema.REASONING_FORMATS) == thoughts

"""Python's literals in a text that is still coming, told as JSON."""

from __future__ import annotations

import json
import re

from gateway.answer.reader import Reader, Sink, Steps

_WORD = re.compile(r"[\w.+-]*")
_MAX_WORD_CHARS = 400
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_CONSTANTS = {
    "None": "null",
    "True": "true",
    "False": "false",
    "null": "null",
    "true": "true",
    "false": "false",
}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_PLAIN = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_ESCAPES = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "0": "\0",
    "\n": "",
    **{char: char for char in "'\"\\/"},
}
_NUM_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = re.compile(r"[0-9a-fA-F]*")


def read_literal(reader: Reader, emit: Sink) -> Steps[bool]:
    """One literal, handed on as it comes. False if it is none: what came before the mistake is out then."""
    open_brackets: list[str] = []
    while True:
        yield from reader.space()
        opening = yield from reader.peek()
        if opening in _CLOSING and opening:
            yield from reader.char()
            emit("{" if opening == "{" else "[")
            open_brackets.append(opening)
            has_value = (yield from _at_next(reader)) != _CLOSING[opening]
            if has_value:
                if opening == "{" and not (yield from _read_key(reader, emit)):
                    return False
                continue
        elif not (yield from _read_scalar(reader, emit)):
            return False
        after = yield from _read_after(reader, emit, open_brackets)
        if after != ",":
            return after == "end"


def _read_after(reader: Reader, emit: Sink, open_brackets: list[str]) -> Steps[str]:
    """What follows a value: brackets that close, and then "," if another value comes, "end", or "" for what
    does not belong there."""
    while open_brackets:
        opening = open_brackets[-1]
        has_comma = bool((yield from _at_next(reader)) == "," and (yield from reader.char()))
        following = yield from _at_next(reader)
        if following == _CLOSING[opening]:
            yield from reader.char()
            emit("}" if opening == "{" else "]")
            open_brackets.pop()
        elif not has_comma:
            return ""
        else:
            emit(", ")
            return "," if opening != "{" or (yield from _read_key(reader, emit)) else ""
    return "end"


def _at_next(reader: Reader) -> Steps[str]:
    """The next character that is not white space, unread."""
    yield from reader.space()
    return (yield from reader.peek())


def _read_key(reader: Reader, emit: Sink) -> Steps[bool]:
    if (yield from _at_next(reader)) not in _PLAIN or not (yield from _read_string(reader, emit)):
        return False
    yield from reader.space()
    emit(": ")
    return bool((yield from reader.literal(":")))


def _read_scalar(reader: Reader, emit: Sink) -> Steps[bool]:
    if (yield from reader.peek()) in _PLAIN:
        return (yield from _read_string(reader, emit))
    word = yield from reader.run(_WORD, _MAX_WORD_CHARS)
    told = _CONSTANTS.get(word) or _number(word)
    emit(told or "")
    return told is not None


def _number(word: str) -> str | None:
    if _JSON_NUMBER.fullmatch(word):
        return word
    if not word.lstrip("+-")[:1].isdigit() and not word.lstrip("+-").startswith("."):
        return None  # nan and inf among others
    for convert in (lambda: int(word, 0), lambda: float(word)):
        try:
            return json.dumps(convert(), allow_nan=False)
        except ValueError:
            continue
    return None


def _read_string(reader: Reader, emit: Sink) -> Steps[bool]:
    quote = yield from reader.char()
    emit('"')
    with reader.into(lambda text: emit(_inner(text))):
        while True:
            yield from reader.run(_PLAIN[quote])
            with reader.into(_drop):
                char = yield from reader.char()
                if char == "\\":
                    emit((yield from _read_escape(reader)))
                    continue
            if char == quote:
                emit('"')
            return bool(char)


def _read_escape(reader: Reader) -> Steps[str]:
    """What is behind a backslash, as it is written in a JSON string."""
    char = yield from reader.char()
    if char in _NUM_DIGITS:
        digits = yield from reader.run(_HEX, _NUM_DIGITS[char])
        return _code_point(char, digits)
    if char in _ESCAPES:
        return _inner(_ESCAPES[char])
    return _inner("\\" + char)


def _code_point(kind: str, digits: str) -> str:
    number = int(digits or "0", 16)
    if len(digits) < _NUM_DIGITS[kind] or number > 0x10FFFF:
        return _inner(f"\\{kind}{digits}")
    return f"\\u{number:04x}" if number <= 0xFFFF else _inner(chr(number))


def _inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _drop(text: str) -> None:
    """Quotes and escapes are told in another way."""

"""Reads answers in pieces, for the tests of this package."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gateway.answer.answer import AnswerFormat, AnswerReader
from gateway.answer.events import Arguments, CallStart, Content, Event, Reasoning
from gateway.answer.formats import FORMATS
from gateway.answer.reasoning import Tags
from gateway.prompt.marks import Marks


class Plain:
    """A tokenizer to which every mark in `control` is a control token, and its own id the place in it."""

    def __init__(self, control: Sequence[str] = ()) -> None:
        self._control = list(control)

    def control_id(self, text: str) -> int | None:
        return self._control.index(text) if text in self._control else None


def format_of(tools: str | None = None, tags: Tags | None = None, *, control: bool = False) -> AnswerFormat:
    """With `control`, every mark is a control token; else each is its text."""
    kind = FORMATS[tools] if tools else None
    texts = (*(kind.MARKS if kind else ()), *(tags or ()))
    marks = Marks(Plain(texts if control else ()), texts)
    return AnswerFormat(marks, kind(marks) if kind else None, tags)


def spelled(format: AnswerFormat, text: str) -> str:
    """The text as it is decoded from a model's own tokens."""
    for mark in (*(format.tools.MARKS if format.tools else ()), *(format.tags or ())):
        text = text.replace(mark, format.marks.spell(mark))
    return text


@dataclass
class Answer:
    """What an answer consists of, put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # [name, arguments]

    def add(self, event: Event) -> None:
        match event:
            case Content(text):
                assert not self.calls or not text.isspace()
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallStart(number, id, name):
                assert number == len(self.calls)
                assert id.startswith("call_")
                self.calls.append([name, ""])
            case Arguments(number, text):
                assert number == len(self.calls) - 1
                self.calls[number][1] += text


def read(
    format: AnswerFormat,
    pieces: Sequence[str],
    names: Collection[str] = (),
    is_thinking: bool | None = None,
) -> Answer:
    reader, answer = AnswerReader(format, names, is_thinking), Answer()
    for piece in pieces:
        for event in reader.feed(piece):
            answer.add(event)
    for event in reader.end():
        answer.add(event)
    assert reader.num_calls == len(answer.calls)
    return answer


def cuts(text: str, num_random: int = 6) -> Iterator[list[str]]:
    """The text whole, character by character, and cut at random places."""
    yield [text]
    yield list(text)
    draw = random.Random(text)
    for _ in range(num_random):
        places = sorted(draw.sample(range(len(text) + 1), min(len(text), draw.randrange(1, 9))))
        bounds = [0, *places, len(text)]
        yield [text[start:end] for start, end in pairwise(bounds)]

"""What a model thinks before it answers: the text between two tags, at the beginning of its answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.answer.reader import Reader, Sink, Steps

_NEWLINES = re.compile(r"\n*")


class Tags(NamedTuple):
    open: str
    close: str


FORMATS = {
    "think": Tags("<think>", "</think>"),
    "thinking": Tags("<thinking>", "</thinking>"),
    "thought": Tags("<thought>", "</thought>"),
    "reasoning": Tags("<reasoning>", "</reasoning>"),
    "seed": Tags("<seed:think>", "</seed:think>"),
    "mistral": Tags("[THINK]", "[/THINK]"),
    "cohere": Tags("<|START_THINKING|>", "<|END_THINKING|>"),
}
"""By the name that `reasoningFormat` has for them."""


def detect(template: str) -> str | None:
    """The format of a model with this chat template: the one whose tags the template has."""
    return next((name for name, tags in FORMATS.items() if tags.close in template), None)


def state_of(prompt: str, tags: Tags) -> bool | None:
    """Whether the answer begins within the tags (a template may open them in the prompt), or has them behind
    it. None: it may open them itself."""
    end = prompt.rstrip()
    if end.endswith(tags.close):
        return False
    return True if end.endswith(tags.open) else None


def is_open_in(text: str, tags: Tags) -> bool:
    """Whether a text that is gone on with ends within the tags."""
    return text.rfind(tags.open) > text.rfind(tags.close)


class Thoughts:
    """Splits an answer in two. White space beside the tags belongs to neither."""

    def __init__(self, tags: Tags, *, is_open: bool, reasoning: Sink, content: Sink) -> None:
        self._tags, self._reasoning, self._content = tags, reasoning, content
        self.has_begun = self.is_open = is_open

    def read(self, reader: Reader) -> Steps[None]:
        if not self.is_open:
            held: list[str] = []
            with reader.into(held.append):
                yield from reader.space()
                self.has_begun = self.is_open = bool((yield from reader.literal(self._tags.open)))
            if not self.is_open:
                self._content("".join(held))
        if self.is_open:
            yield from self._read_thoughts(reader)
        with reader.into(self._content):
            yield from reader.rest()

    def _read_thoughts(self, reader: Reader) -> Steps[None]:
        yield from reader.run(_NEWLINES)
        with reader.into(_WithoutLastNewlines(self._reasoning)):
            yield from reader.until(self._tags.close)
        self.is_open = not (yield from reader.literal(self._tags.close))
        yield from reader.run(_NEWLINES)


class _WithoutLastNewlines:
    """Hands text on; line breaks wait until something follows."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held: list[str] = []

    def __call__(self, text: str) -> None:
        shown = text.rstrip("\n")
        if shown:
            self._sink("".join([*self._held, shown]))
            self._held.clear()
        if len(shown) < len(text):
            self._held.append(text[len(shown) :])

"""Text that is still coming, read from its start.

Whatever reads it is a generator: it yields when it needs more text, so it can be left in the midst of
anything, and reads like a parser of whole texts. Each character is read once, and what is kept unread is
never longer than a mark: the time is linear, however the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""Reading something: yields when the text does not suffice, returns what has been read."""

Sink = Callable[[str], None]
_SPACE = re.compile(r"\s*")


class Reader:
    """What has come and is not yet read. All that is read goes to the sink that `into` has set."""

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._is_whole = False
        self._sink: Sink = _drop

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def end(self) -> None:
        """Nothing more will come."""
        self._is_whole = True

    @contextmanager
    def into(self, sink: Sink) -> Iterator[None]:
        """What is read in this context goes to `sink`, and nowhere else."""
        previous, self._sink = self._sink, sink
        try:
            yield
        finally:
            self._sink = previous

    @contextmanager
    def also_into(self, sink: Sink) -> Iterator[None]:
        """What is read in this context goes to `sink` beside where it goes anyway."""
        previous = self._sink

        def both(text: str) -> None:
            previous(text)
            sink(text)

        with self.into(both):
            yield

    def peek(self) -> Steps[str]:
        """The next character, unread; empty at the end of the text."""
        while self._at == len(self._text):
            if self._is_whole:
                return ""
            yield
        return self._text[self._at]

    def char(self) -> Steps[str]:
        """The next character; empty at the end of the text."""
        return self._take(self._at + 1) if (yield from self.peek()) else ""

    def literal(self, *texts: str) -> Steps[str]:
        """The one of `texts` that is next, or "". Reads as much as agrees with any; none begins another."""
        for place in range(max(map(len, texts))):
            char = yield from self.peek()
            texts = tuple(text for text in texts if char and text[place] == char)
            if not texts:
                return ""
            self._take(self._at + 1)
            if len(texts[0]) == place + 1:
                return texts[0]
        return ""

    def run(self, pattern: re.Pattern[str], most: int | None = None) -> Steps[str]:
        """All characters of one kind that are next, `[...]*`; no more than `most`."""
        taken: list[str] = []
        room = most
        while (yield from self.peek()):
            end = len(self._text) if room is None else min(len(self._text), self._at + room)
            found = pattern.match(self._text, self._at, end)
            assert found is not None, "a run may be empty"
            taken.append(self._take(found.end()))
            if room is not None:
                room -= len(taken[-1])
            if self._at < len(self._text) or room == 0:
                break
        return "".join(taken)

    def space(self) -> Steps[str]:
        return (yield from self.run(_SPACE))

    def until(self, *marks: str) -> Steps[str]:
        """Reads up to the first of the marks, which it returns unread; empty at the end of the text."""
        pattern = re.compile("|".join(map(re.escape, marks)))  # re keeps it
        while True:
            if found := pattern.search(self._text, self._at):
                self._take(found.start())
                return found[0]
            if self._is_whole:
                self._take(len(self._text))
                return ""
            begun = max(_overlap(self._text, self._at, mark) for mark in marks)
            self._take(len(self._text) - begun)
            yield

    def rest(self) -> Steps[None]:
        """All that still comes."""
        while (yield from self.peek()):
            self._take(len(self._text))

    def _take(self, end: int) -> str:
        taken, self._at = self._text[self._at : end], end
        if taken:
            self._sink(taken)
        return taken


class Reading:
    """A reader and what reads it, driven by text."""

    def __init__(self, read: Callable[[Reader], Steps[None]]) -> None:
        self._reader = Reader()
        self._steps = read(self._reader)

    def feed(self, text: str) -> None:
        self._reader.feed(text)
        next(self._steps, None)

    def end(self) -> None:
        self._reader.end()
        next(self._steps, None)


def _drop(text: str) -> None:
    """Where nobody wants to know."""


def _overlap(text: str, start: int, mark: str) -> int:
    """The length of the longest end of `text` from `start` that `mark` begins with, `mark` itself apart."""
    place = text.find(mark[0], max(start, len(text) - len(mark) + 1))
    while place >= 0:
        if mark.startswith(text[place:]):
            return len(text) - place
        place = text.find(mark[0], place + 1)
    return 0

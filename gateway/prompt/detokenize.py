"""Token ids to text as they come: no half characters, no part of a stop string.

The pieces of a stream, put together, are the text of the whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_HELD_CHARS = 16
"""A UTF-8 character has at most four bytes: a longer run of U+FFFD is not one underway, but garbage."""
MAX_SILENT_TOKENS = 64
"""Tokens that show nothing are kept as context for the next one up to here, then forgotten."""


class Decoder(Protocol):
    """What makes text of tokens."""

    def decode(self, ids: list[int]) -> str: ...

    def text_of(self, id: int) -> str | None:
        """The text of one token, if it is the same whatever stands beside it. None: ask `decode`."""


class Detokenizer:
    """The text of one sequence.

    Decodes a short window again at each step, because a token's text can depend on its neighbours
    (a leading space, the bytes of a character), and shows what the window has grown by. A window
    starts with the tokens shown last, as context, so its cost does not grow with the answer. A token whose
    text depends on nothing does without.
    """

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        """`context`: the ids before the first one, if the text continues theirs."""
        self._decode, self._text_of = decoder.decode, decoder.text_of
        self._window = list(context)
        self._num_context = len(self._window)
        self._shown = len(self._decode(self._window)) if self._window else 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now. Empty while a character is underway."""
        if len(ids) == 1 and len(self._window) == self._num_context:  # as nearly always
            text = self._text_of(ids[0])
            if text is not None:
                return text
        self._window += ids
        text = self._decode(self._window)
        stable = text.rstrip(REPLACEMENT)
        is_whole = len(stable) == len(text) or len(text) - len(stable) > MAX_HELD_CHARS
        if not is_whole:
            new = stable[self._shown :]
            self._shown = max(self._shown, len(stable))
            return new
        new = text[self._shown :]
        if new:
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._shown = len(self._decode(self._window))
        elif len(self._window) - self._num_context > MAX_SILENT_TOKENS:
            del self._window[self._num_context :]
        return new

    def flush(self) -> str:
        """What was held back at the end: U+FFFD for the character that never became whole."""
        text = self._decode(self._window)
        new = text[self._shown :]
        self._shown = len(text)
        return new


class StopStrings:
    """Ends a text before the first stop string, which may be spread over many tokens."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the text ends behind the stop string."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(what can be shown, whether a stop string was met). After a stop nothing more may be pushed."""
        text = self._held + text
        places = [(place, len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            place, length, self.found = min(places)
            return text[: place + length * self._include], True
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was held back: the beginning of a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, `stop` itself apart."""
    place = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while place >= 0:
        if stop.startswith(text[place:]):
            return len(text) - place
        place = text.find(stop[0], place + 1)
    return 0

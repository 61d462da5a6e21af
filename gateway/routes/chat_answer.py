"""One choice of a chat, as it comes: what its text consists of, and why it has ended."""

from __future__ import annotations

from gateway.answer.answer import AnswerReader
from gateway.answer.events import Event
from gateway.choice import ChoiceDelta


class ChoiceAnswer:
    """Reads a choice's deltas, one after another, each once."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self.finish_reason: str | None = None  # "stop", also where it ends with calls; "length"
        self.stop_string: str | None = None  # that has ended it
        self.num_reasoning_tokens = 0

    @property
    def has_thought(self) -> bool:
        return self._reader.has_thought

    @property
    def num_calls(self) -> int:
        return self._reader.num_calls

    def read(self, delta: ChoiceDelta) -> list[Event]:
        """What is new."""
        reader, thoughts = self._reader, self._reader.thoughts
        before = None if thoughts is None else (thoughts.is_open, thoughts.has_begun)
        events = reader.feed(delta.text)
        if delta.finish_reason is not None:
            events += reader.end()
            self.finish_reason, self.stop_string = delta.finish_reason, delta.stop_string
        if thoughts is not None and before != (False, thoughts.has_begun):
            self.num_reasoning_tokens = delta.num_tokens
        return events

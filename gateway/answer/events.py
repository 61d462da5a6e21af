"""What an answer consists of, as it comes."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from itertools import groupby
from typing import NamedTuple

from gateway.prompt.marks import hide_marks


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """A call of a function has begun; `number` counts the answer's calls from 0."""

    number: int
    id: str
    name: str


class Arguments(NamedTuple):
    """More of a call's arguments: JSON, as the model wrote it."""

    number: int
    text: str


Event = Content | Reasoning | CallStart | Arguments


class Output:
    """Where a tool format's reader puts what it reads. White space beside a call is no content."""

    def __init__(self, names: Collection[str]) -> None:
        """`names`: the functions that may be called."""
        self._names = names
        self._events: list[Event] = []
        self._spaces: list[str] = []
        self._is_beside_call = False
        self.num_calls = 0

    def take(self) -> list[Event]:
        """What is new, in as few events as say it."""
        events, self._events = self._events, []
        if len(events) == 1 and not isinstance(events[0], CallStart):  # as nearly always
            return events if events[0].text else []
        joined = [_joined(list(group)) for _, group in groupby(events, _kind)]
        return [event for event in joined if isinstance(event, CallStart) or event.text]

    def may_call(self, name: str | None) -> bool:
        return name in self._names

    def reasoning(self, text: str) -> None:
        self._events.append(Reasoning(hide_marks(text)))

    def only(self, text: str) -> list[Event]:
        """What is new where nothing but content can be."""
        text = hide_marks(text)
        return [Content(text)] if text else []

    def plain(self, text: str) -> None:
        """Content in which no call can be."""
        self._events.append(Content(hide_marks(text)))

    def content(self, text: str) -> None:
        text = hide_marks(text)
        shown = text.rstrip()
        if shown:
            self._show(shown)
        if len(shown) < len(text):
            self._spaces.append(text[len(shown) :])

    def call(self, name: str) -> None:
        self._spaces.clear()
        self._is_beside_call = True
        self._events.append(CallStart(self.num_calls, new_call_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Of the last call."""
        self._events.append(Arguments(self.num_calls - 1, hide_marks(text)))

    def end(self) -> None:
        if not self._is_beside_call:
            self._show("")

    def _show(self, text: str) -> None:
        spaces, self._spaces = "".join(self._spaces), []
        text = text.lstrip() if self._is_beside_call else spaces + text
        self._is_beside_call = False
        if text:
            self._events.append(Content(text))


def _kind(event: Event) -> tuple[type, object]:
    """Events in a row that are equal in this are one. A call's start is of no kind but its own."""
    return type(event), event.id if isinstance(event, CallStart) else None


def _joined(events: list[Event]) -> Event:
    first = events[0]
    if len(events) == 1 or isinstance(first, CallStart):
        return first
    return first._replace(text="".join(event.text for event in events if not isinstance(event, CallStart)))


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"

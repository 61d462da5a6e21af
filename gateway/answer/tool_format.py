"""How a model writes calls of functions: what every format of it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from gateway.answer.events import Output
from gateway.answer.grammar import Calls, Function
from gateway.answer.reader import Reader, Steps
from gateway.prompt.marks import Marks


class ToolFormat(Protocol):
    """One format, for one model's marks."""

    MARKS: ClassVar[tuple[str, ...]]
    """What its reader needs to see of the model's tokens, control tokens though they may be."""

    def __init__(self, marks: Marks) -> None: ...

    def read(self, reader: Reader, out: Output) -> Steps[None]:
        """A whole answer into content and calls. What turns out to be no call is content, unchanged."""

    def grammar(self, functions: Sequence[Function], *, many: bool) -> Calls:
        """Of calls as `read` reads them; `many`: of more than one."""

    def id_for_template(self, id: str) -> str:
        """A call's id as the model's template wants it; equal ids stay equal."""


def content_until(reader: Reader, out: Output, mark: str) -> Steps[bool]:
    """Content, up to the mark; whether there is one."""
    with reader.into(out.content):
        return bool((yield from reader.until(mark)))


def attempt(
    reader: Reader, out: Output, read: Callable[[Reader, Output], Steps[bool]], before: str = ""
) -> Steps[bool]:
    """Tries to read a call. If it was none, what was read is content, `before` in front of it."""
    held = [before]
    with reader.into(held.append):
        is_call = yield from read(reader, out)
    if not is_call:
        out.content("".join(held))
    return is_call

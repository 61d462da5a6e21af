"""The short way of a token: what its group has sent goes to its client within the same turn of the loop.

Text otherwise goes up through a request's generators and down through the application's layers, and a task
wakes for each token. While all of these wait for the group, and the
client takes what it is sent, nothing can be overtaken, and the group's connection hands tokens past them.
The first one, the last one, those of choices whose tokens are looked into, and errors go the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gateway.choice import ChoiceDelta

PUSH = "sluice.push"
"""Where a request's scope has its Push, among the extensions."""

Shape = Callable[[list[ChoiceDelta]], bytes]
"""What a client is sent of them; may be nothing."""


class Push(Protocol):
    """The end of an answer that is being streamed, past the application's layers."""

    @property
    def is_open(self) -> bool:
        """The answer has begun and not ended, and its client has room for more."""

    def write(self, data: bytes) -> None: ...


class Direct:
    """Shows what is new of an answer's only choice, while it `is_open`."""

    def __init__(self, push: Push, shape: Shape) -> None:
        self._push, self._shape = push, shape

    @property
    def is_open(self) -> bool:
        return self._push.is_open

    def show(self, delta: ChoiceDelta) -> None:
        if data := self._shape([delta]):
            self._push.write(data)

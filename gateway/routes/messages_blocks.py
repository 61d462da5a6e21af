"""An answer as Anthropic's content blocks: one after another, each begins, grows and ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

import msgspec
from pydantic_core import from_json

from gateway.answer.events import Arguments, CallStart, Content, Event, Reasoning
from gateway.protocol.anthropic_response import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputJsonDelta,
    SignatureDelta,
    TextBlock,
    TextBlockDelta,
    ThinkingBlock,
    ThinkingBlockDelta,
    ToolUseBlock,
)

BlockEvent = BlockStart | BlockDelta | BlockStop


class BlockWriter:
    """The events of a stream's blocks, from those of an answer. Thoughts that are not shown: an empty one."""

    def __init__(self, *, shows_thoughts: bool = True) -> None:
        self._shows_thoughts = shows_thoughts
        self._num_blocks = 0
        self._open: type[ContentBlock] | None = None
        self._thoughts = sha256()

    def write(self, events: Iterable[Event]) -> Iterator[BlockEvent]:
        for event in events:
            match event:
                case Content(text):
                    yield from self._in(TextBlock)
                    yield self._delta(TextBlockDelta(text))
                case Reasoning(text):
                    yield from self._in(ThinkingBlock)
                    self._thoughts.update(text.encode())
                    if self._shows_thoughts:
                        yield self._delta(ThinkingBlockDelta(text))
                case CallStart(_, id, name):
                    yield from self.end()
                    yield self._begin(ToolUseBlock(f"toolu_{id.removeprefix('call_')}", name, {}))
                case Arguments(_, text):
                    yield self._delta(InputJsonDelta(text))

    def end(self) -> Iterator[BlockEvent]:
        """Of the block that is open. Thoughts are signed with a digest: clients send no others back."""
        if self._open is ThinkingBlock:
            yield self._delta(SignatureDelta(self._thoughts.hexdigest()))
        if self._open is not None:
            yield BlockStop(self._num_blocks - 1)
        self._open = None

    def _in(self, kind: type[TextBlock] | type[ThinkingBlock]) -> Iterator[BlockEvent]:
        if self._open is not kind:
            yield from self.end()
            yield self._begin(kind())

    def _begin(self, block: ContentBlock) -> BlockStart:
        self._open = type(block)
        self._num_blocks += 1
        return BlockStart(self._num_blocks - 1, block)

    def _delta(
        self, delta: TextBlockDelta | ThinkingBlockDelta | SignatureDelta | InputJsonDelta
    ) -> BlockDelta:
        return BlockDelta(self._num_blocks - 1, delta)


class BlockReader:
    """Puts blocks together from their events."""

    def __init__(self) -> None:
        self._blocks: list[ContentBlock] = []
        self._pieces: list[list[str]] = []

    def add(self, events: Iterable[BlockEvent]) -> None:
        for event in events:
            match event:
                case BlockStart(_, block):
                    self._blocks.append(block)
                    self._pieces.append([])
                case BlockDelta(_, SignatureDelta(signature)):
                    self._blocks[-1] = msgspec.structs.replace(self._blocks[-1], signature=signature)
                case BlockDelta(_, TextBlockDelta(text) | ThinkingBlockDelta(text) | InputJsonDelta(text)):
                    self._pieces[-1].append(text)

    def blocks(self) -> list[ContentBlock]:
        return [
            _with(block, "".join(pieces)) for block, pieces in zip(self._blocks, self._pieces, strict=True)
        ]


def _with(block: ContentBlock, text: str) -> ContentBlock:
    match block:
        case TextBlock():
            return TextBlock(text)
        case ThinkingBlock(_, signature):
            return ThinkingBlock(text, signature)
        case ToolUseBlock(id, name):
            return ToolUseBlock(id, name, _input(text))


def _input(arguments: str) -> dict[str, Any]:
    """An object: as far as it came, if the answer ended within it. What a model wrote that is none goes where
    Anthropic's documentation has clients put such input."""
    try:
        value = from_json(arguments or "{}", allow_partial=True, allow_inf_nan=False, cache_strings="none")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}

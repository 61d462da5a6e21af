"""The messages of Anthropic's requests: turns of content blocks, and the chat that they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field

from gateway.protocol import anthropic_fields, bounds
from gateway.protocol.common import InvalidField, RequestPart
from gateway.protocol.messages import ChatMessage, FunctionCall, TextPart, ToolCall

Role = Literal["user", "assistant", "system"]
_Id = Annotated[str, Field(min_length=1, max_length=bounds.MAX_LABEL_CHARS)]
_KINDS = ("text", "thinking", "tool_use", "tool_result")


def _as_blocks(value: object, kinds: Sequence[str] = _KINDS) -> object:
    """A string is one block of text. Blocks of other kinds are refused with a message of their own."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        found = [block.get("type") for block in value if isinstance(block, dict)]
        if other := [str(kind)[:40] for kind in found if kind not in kinds]:
            if other[0] == "redacted_thinking":
                raise ValueError("only the server that wrote 'redacted_thinking' can read it: leave it out")
            raise ValueError(f"this model reads text only; a block of type {other[0]!r} is not allowed here")
    return value


def _as_text(value: object) -> object:
    return _as_blocks(value, ("text",))


class TextBlock(RequestPart):
    rules = anthropic_fields.TEXT

    type: Literal["text"]
    text: str


_TextBlocks = Annotated[list[TextBlock], Field(max_length=bounds.MAX_CONTENT_PARTS, fail_fast=True)]
Text = Annotated[_TextBlocks, BeforeValidator(_as_text, json_schema_input_type=str | _TextBlocks)]
"""A string, or blocks of text."""


class Block(RequestPart):
    """What a turn consists of: each kind has fields of its own."""

    rules = anthropic_fields.BLOCK

    type: Literal["text", "thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    id: _Id | None = None
    name: _Id | None = None
    input: dict[str, Any] | None = None
    tool_use_id: _Id | None = None
    content: Text | None = None


_Blocks = Annotated[list[Block], Field(max_length=bounds.MAX_CONTENT_PARTS, fail_fast=True)]


class Turn(RequestPart):
    role: Role
    content: Annotated[_Blocks, BeforeValidator(_as_blocks, json_schema_input_type=str | _Blocks)]


_NEEDS = {
    "text": {"text"},
    "thinking": {"thinking"},
    "tool_use": {"id", "name", "input"},
    "tool_result": {"tool_use_id"},
}
_MAY_HAVE = _NEEDS | {"tool_result": {"tool_use_id", "content"}}
_ROLES_OF = {
    "text": ("user", "assistant", "system"),
    "thinking": ("assistant",),
    "tool_use": ("assistant",),
    "tool_result": ("user",),
}
_FIELDS = ("text", "thinking", "id", "name", "input", "tool_use_id", "content")


def _check_turns(turns: list[Turn]) -> list[Turn]:
    for place, turn in enumerate(turns):
        for number, block in enumerate(turn.content):
            _check_block(block, turn.role, f"messages[{place}].content[{number}]")
    _check_calls(turns)
    return turns


Turns = Annotated[
    list[Turn],
    Field(min_length=1, max_length=bounds.MAX_MESSAGES, fail_fast=True),
    AfterValidator(_check_turns),
]


def _check_block(block: Block, role: Role, param: str) -> None:
    """Raises InvalidField."""
    if role not in _ROLES_OF[block.type]:
        raise InvalidField(
            f"{param}.type", f"'{param}': messages with role '{role}' have no block of type '{block.type}'."
        )
    given = {name for name in _FIELDS if getattr(block, name) is not None}
    if missing := sorted(_NEEDS[block.type] - given):
        name = f"{param}.{missing[0]}"
        raise InvalidField(name, f"Missing required parameter: '{name}'.")
    if other := sorted(given - _MAY_HAVE[block.type]):
        name = f"{param}.{other[0]}"
        raise InvalidField(name, f"'{name}' is not allowed in a block of type '{block.type}'.")


def _check_calls(turns: Sequence[Turn]) -> None:
    """Each tool_use is answered by a tool_result at the beginning of the user's turn behind it, and by one.
    Raises InvalidField."""
    unanswered: set[str] = set()
    for _, blocks in _merged(turns):
        is_beginning = True
        for block in blocks:
            if block.type != "tool_result":
                is_beginning = False
            elif block.tool_use_id not in unanswered or not is_beginning:
                raise InvalidField(
                    "messages",
                    f"The 'tool_result' of {block.tool_use_id!r} must be the only one, at the beginning of"
                    " the user's message that follows the assistant's message with that 'tool_use'.",
                )
            else:
                unanswered.remove(block.tool_use_id)
        if unanswered:
            break
        called = [block.id for block in blocks if block.type == "tool_use" and block.id is not None]
        unanswered = set(called)
        if len(unanswered) < len(called):
            raise InvalidField("messages", "Each 'tool_use' of a message needs an 'id' of its own.")
    if unanswered:
        raise InvalidField(
            "messages",
            "Each 'tool_use' must have a 'tool_result' at the beginning of the user's message behind it."
            f" These have none: {', '.join(sorted(unanswered))[:500]}",
        )


def as_chat(system: Sequence[TextBlock], turns: Sequence[Turn]) -> list[ChatMessage]:
    """Turns of one role in a row are one; results of tools become messages of their own."""
    begins: list[tuple[Role, list[Block]]] = [
        ("system", [Block.model_construct(type="text", text=block.text) for block in system])
    ]
    told = [*(begins if system else []), *((turn.role, turn.content) for turn in turns)]
    return [message for role, blocks in _joined(told) for message in _as_messages(role, blocks)]


def _merged(turns: Sequence[Turn]) -> Iterator[tuple[Role, list[Block]]]:
    return _joined((turn.role, turn.content) for turn in turns)


def _joined(turns: Iterable[tuple[Role, list[Block]]]) -> Iterator[tuple[Role, list[Block]]]:
    for role, same in groupby(turns, lambda turn: turn[0]):
        yield role, [block for _, blocks in same for block in blocks]


def _as_messages(role: Role, blocks: Sequence[Block]) -> Iterator[ChatMessage]:
    """All of it has been checked."""
    texts = [_part(block.text) for block in blocks if block.type == "text"]
    if role == "assistant":
        calls = [_call(block) for block in blocks if block.type == "tool_use"]
        thoughts = [block.thinking or "" for block in blocks if block.type == "thinking"]
        yield ChatMessage.model_construct(
            role="assistant",
            content=texts or (None if calls else [_part("")]),
            tool_calls=calls or None,
            reasoning_content="\n".join(thoughts) or None,
        )
        return
    results = [block for block in blocks if block.type == "tool_result"]
    for block in results:
        content = [_part(part.text) for part in block.content or ()]
        yield ChatMessage.model_construct(
            role="tool", content=content or [_part("")], tool_call_id=block.tool_use_id
        )
    if texts or not results:
        yield ChatMessage.model_construct(role=role, content=texts or [_part("")])


def _part(text: str | None) -> TextPart:
    return TextPart.model_construct(type="text", text=text or "")


def _call(block: Block) -> ToolCall:
    arguments = msgspec.json.encode(block.input).decode()
    function = FunctionCall.model_construct(name=block.name or "", arguments=arguments)
    return ToolCall.model_construct(id=block.id or "", type="function", function=function)

"""The items that a response is asked with: messages, calls of functions and their results, thoughts; and the
chat that they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gateway.protocol import bounds, responses_fields
from gateway.protocol.common import InvalidField, RequestPart
from gateway.protocol.messages import ChatMessage, FunctionCall, TextPart, ToolCall, as_parts

Kind = Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"]
_as_parts = partial(as_parts, kinds=("input_text", "output_text", "refusal", "reasoning_text"))
_Label = Annotated[str, Field(max_length=bounds.MAX_LABEL_CHARS)]


class Part(RequestPart):
    """Text, whoever wrote it."""

    rules = responses_fields.PART

    type: Literal["input_text", "output_text", "refusal", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None

    @property
    def written(self) -> str:
        return self.text or self.refusal or ""


_Parts = Annotated[list[Part], Field(max_length=bounds.MAX_CONTENT_PARTS, fail_fast=True)]
Parts = Annotated[_Parts | None, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts | None)]


class Item(RequestPart):
    """Without a type it is a message."""

    rules = responses_fields.ITEM

    type: Kind | None = None
    id: _Label | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts = None
    call_id: _Label | None = None
    name: _Label | None = None
    arguments: str | None = None
    output: Parts = None

    @property
    def kind(self) -> Kind:
        return self.type or "message"

    @property
    def written(self) -> str:
        """The parts as one text."""
        return "\n".join(part.written for part in self.content or self.output or ())


def _as_item(value: object) -> object:
    """Items of other kinds are refused with a message of their own."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is not None and not (isinstance(kind, str) and kind in _NEEDS):
        raise ValueError(f"items of type {str(kind)[:40]!r} are not supported, only {', '.join(_NEEDS)}")
    return value


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_NEEDS: dict[Kind, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
    "item_reference": ("id",),
}
_MAY_HAVE: dict[Kind, tuple[str, ...]] = {
    "message": ("id",),
    "function_call": ("id",),
    "function_call_output": ("id", "name"),
    "reasoning": ("id", "content"),
    "item_reference": (),
}


def _check_items(items: list[Item]) -> list[Item]:
    """What a kind does not allow or needs. Raises InvalidField."""
    for place, item in enumerate(items):
        _check_fields(item, f"input[{place}]")
        for field in ("content", "output"):
            for number, part in enumerate(getattr(item, field) or ()):
                _check_part(part, item, f"input[{place}].{field}[{number}]")
    return items


def _check_fields(item: Item, param: str) -> None:
    needs = _NEEDS[item.kind]
    for field in Item.model_fields:
        has_it = getattr(item, field) is not None
        if field in needs and not has_it:
            raise InvalidField(f"{param}.{field}", f"Missing required parameter: '{param}.{field}'.")
        if has_it and field not in (*needs, *_MAY_HAVE[item.kind], "type"):
            raise InvalidField(f"{param}.{field}", f"Items of type '{item.kind}' have no '{field}'.")


def _check_part(part: Part, item: Item, param: str) -> None:
    field, other = ("refusal", "text") if part.type == "refusal" else ("text", "refusal")
    if getattr(part, field) is None:
        raise InvalidField(f"{param}.{field}", f"Missing required parameter: '{param}.{field}'.")
    if getattr(part, other) is not None:
        raise InvalidField(f"{param}.{other}", f"Parts of type '{part.type}' have no '{other}'.")
    is_thought = item.kind == "reasoning"
    if (part.type == "reasoning_text") != is_thought or (part.type == "refusal" and item.role != "assistant"):
        what = f"of role '{item.role}'" if item.role else f"of type '{item.kind}'"
        raise InvalidField(f"{param}.type", f"Items {what} have no part of type '{part.type}'.")


_Item = Annotated[Item, BeforeValidator(_as_item, json_schema_input_type=Item)]
_Items = Annotated[list[_Item], Field(max_length=bounds.MAX_MESSAGES, fail_fast=True)]
Items = Annotated[
    _Items,
    BeforeValidator(_as_items, json_schema_input_type=str | _Items),
    AfterValidator(_check_items),
]


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[ChatMessage]:
    """The chat that they are. Instructions and the system's messages that begin the conversation are one
    message, because many templates have a place for one. Raises InvalidField."""
    chat = _Chat()
    rest = list(items)
    if instructions is not None:
        system = [instructions]
        while rest and rest[0].role in ("system", "developer"):
            system.append(rest.pop(0).written)
        chat.messages.append(ChatMessage(role="system", content=_text(*system)))
    for item in rest:
        chat.add(item)
    chat.end()
    return chat.messages


class _Chat:
    """Messages, made of items one after another."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._turn = _AssistantTurn()
        self._unanswered: list[str] = []  # ids of calls in the last assistant's message

    def add(self, item: Item) -> None:
        if item.kind == "function_call_output":
            self._end_turn()
            self._answer(item)
        elif item.role is None or item.role == "assistant":
            self._check_answered()
            if self._turn.is_complete_before(item):
                self._end_turn()
            self._turn.add(item)
        else:
            self.end()
            self.messages.append(ChatMessage(role=item.role, content=_text(item.written)))

    def end(self) -> None:
        self._end_turn()
        self._check_answered()

    def _end_turn(self) -> None:
        if not self._turn.is_empty:
            self.messages.append(self._turn.message())
            self._unanswered = [call.id for call in self._turn.calls]
            self._turn = _AssistantTurn()

    def _answer(self, item: Item) -> None:
        """Errors have OpenAI's words, here and below."""
        id = item.call_id or ""
        if id not in self._unanswered:
            raise InvalidField(
                "input", f"No tool call found for function call output with call_id {id[:100]}."
            )
        self._unanswered.remove(id)
        self.messages.append(ChatMessage(role="tool", tool_call_id=id, content=_text(item.written)))

    def _check_answered(self) -> None:
        if self._unanswered:
            raise InvalidField(
                "input", f"No tool output found for function call {self._unanswered[0][:100]}."
            )


class _AssistantTurn:
    """Thoughts, text and calls in a row: to a chat template one message."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._texts: list[str] = []
        self._thoughts: list[str] = []

    @property
    def is_empty(self) -> bool:
        return not (self.calls or self._texts or self._thoughts)

    def is_complete_before(self, item: Item) -> bool:
        """Text behind text is a turn of its own; but results come directly behind the message of their calls,
        so what is between the two belongs to it."""
        return bool(self._texts) and not self.calls and item.kind != "function_call"

    def add(self, item: Item) -> None:
        if item.kind == "function_call":
            function = FunctionCall(name=item.name or "", arguments=item.arguments or "")
            self.calls.append(ToolCall(id=item.call_id or "", type="function", function=function))
        elif item.kind == "reasoning":
            self._thoughts += [item.written] if item.written else []
        else:
            self._texts.append(item.written)

    def message(self) -> ChatMessage:
        return ChatMessage(
            role="assistant",
            content=_text(*self._texts) if self._texts or not self.calls else None,
            tool_calls=self.calls or None,
            reasoning_content="\n".join(self._thoughts) or None,
        )


def _text(*texts: str) -> list[TextPart]:
    return [TextPart(type="text", text=text) for text in texts or ("",)]

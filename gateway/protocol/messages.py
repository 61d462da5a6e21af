"""The messages of a chat, and what a chat template gets of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gateway.protocol import bounds, fields
from gateway.protocol.common import InvalidField, RequestPart
from gateway.protocol.json_body import MalformedBody, parse_object

Role = Literal["developer", "system", "user", "assistant", "tool", "function"]
_Label = Annotated[str, Field(max_length=bounds.MAX_LABEL_CHARS)]


class TextPart(RequestPart):
    """A refusal is text that an assistant has written, too."""

    rules = fields.TEXT_PART

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @property
    def written(self) -> str:
        return self.text or self.refusal or ""


def as_parts(value: object, kinds: Sequence[str] = ("text", "refusal")) -> object:
    """A string is one part of the first kind. Parts of others are refused with a message of their own."""
    if isinstance(value, str):
        return [{"type": kinds[0], "text": value}]
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of text parts")
    given = [part.get("type") for part in value if isinstance(part, dict)]
    if other := [kind for kind in given if kind not in kinds]:
        raise ValueError(
            f"this model reads text only; a content part of type {str(other[0])[:40]!r} is not allowed"
        )
    return value


_Parts = Annotated[list[TextPart], Field(min_length=1, max_length=bounds.MAX_CONTENT_PARTS, fail_fast=True)]


class FunctionCall(RequestPart):
    rules = fields.FUNCTION_CALL

    name: _Label
    arguments: str


class ToolCall(RequestPart):
    rules = fields.TOOL_CALL

    id: _Label
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(RequestPart):
    rules = fields.MESSAGE

    role: Role
    content: Annotated[
        _Parts | None, BeforeValidator(as_parts, json_schema_input_type=str | _Parts | None)
    ] = None
    name: Annotated[str, Field(max_length=1_000)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=bounds.MAX_TOOLS, fail_fast=True)] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: _Label | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    @property
    def calls(self) -> Sequence[ToolCall]:
        """Those of tools, and the older one of a function, which is a call whose id is the name."""
        if self.function_call is not None:
            return (ToolCall(id=self.function_call.name, type="function", function=self.function_call),)
        return self.tool_calls or ()

    @property
    def written(self) -> str | None:
        """The parts as one text."""
        return self.refusal if self.content is None else "\n".join(part.written for part in self.content)


def _check_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    """What a role does not allow or needs, and calls and their results. Raises InvalidField."""
    for place, message in enumerate(messages):
        _check_fields(message, f"messages[{place}]")
        for number, part in enumerate(message.content or ()):
            _check_part(part, message.role, f"messages[{place}].content[{number}]")
    _check_calls(messages)
    return messages


Messages = Annotated[
    list[ChatMessage],
    Field(min_length=1, max_length=bounds.MAX_MESSAGES, fail_fast=True),
    AfterValidator(_check_messages),
]

_ROLES_OF = {
    "tool_calls": ("assistant",),
    "function_call": ("assistant",),
    "refusal": ("assistant",),
    "reasoning_content": ("assistant",),
    "tool_call_id": ("tool",),
}
_NEEDS = {"tool": ("content", "tool_call_id"), "function": ("name",), "assistant": ()}


def _check_fields(message: ChatMessage, param: str) -> None:
    for field, roles in _ROLES_OF.items():
        if message.role not in roles and getattr(message, field) not in (None, [], ""):
            raise InvalidField(f"{param}.{field}", f"Messages with role '{message.role}' have no '{field}'.")
    for field in _NEEDS.get(message.role, ("content",)):
        if getattr(message, field) is None:
            raise _missing(f"{param}.{field}")
    if message.role == "assistant" and message.written is None and not message.calls:
        raise _missing(f"{param}.content")


def _check_part(part: TextPart, role: Role, param: str) -> None:
    if part.type == "refusal" and role != "assistant":
        raise InvalidField(f"{param}.type", f"Messages with role '{role}' have no part of type 'refusal'.")
    if getattr(part, part.type) is None:
        raise _missing(f"{param}.{part.type}")


def _missing(param: str) -> InvalidField:
    return InvalidField(param, f"Missing required parameter: '{param}'.")


def _check_calls(messages: Sequence[ChatMessage]) -> None:
    """Every tool message answers a call of the assistant's message before it, and each call is answered
    before the conversation goes on. Raises InvalidField, with OpenAI's words."""
    called: set[str] = set()
    unanswered: set[str] = set()
    for place, message in enumerate(messages):
        if message.tool_call_id is None:
            _check_answered(unanswered)
            called = {call.id for call in message.tool_calls or ()}
            unanswered = set(called)
        elif message.tool_call_id in called:
            unanswered.discard(message.tool_call_id)
        else:
            raise InvalidField(
                f"messages[{place}].role",
                "Invalid parameter: messages with role 'tool' must be a response to a preceding message with"
                " 'tool_calls', by its 'tool_call_id'.",
            )
    _check_answered(unanswered)


def _check_answered(unanswered: set[str]) -> None:
    if unanswered:
        raise InvalidField(
            "messages",
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
            " 'tool_call_id'. The following tool_call_ids did not have response messages:"
            f" {', '.join(sorted(unanswered))[:500]}",
        )


def for_template(
    messages: Sequence[ChatMessage], id_for_template: Callable[[str], str] = str
) -> list[dict[str, Any]]:
    """As chat templates know messages: the content one string, developers called system, functions tools,
    and the arguments of calls objects. `id_for_template` changes calls' ids."""
    names = {call.id: call.function.name for message in messages for call in message.calls}
    return [dict(_for_template(message, names, id_for_template)) for message in messages]


def _for_template(
    message: ChatMessage, names: dict[str, str], id_for_template: Callable[[str], str]
) -> Iterator[tuple[str, Any]]:
    yield "role", {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if message.written is not None:  # templates write null out, and know what to do without
        yield "content", message.written
    if message.calls:
        yield "tool_calls", [_call_for_template(call, id_for_template) for call in message.calls]
    if message.reasoning_content:
        yield "reasoning_content", message.reasoning_content
        yield "thinking", message.reasoning_content  # some templates' name for it
    if message.role in ("tool", "function"):
        call_id = message.tool_call_id or message.name or ""
        yield "tool_call_id", id_for_template(call_id)
        yield "name", message.name or names.get(call_id, "")
    elif message.name is not None:
        yield "name", message.name


def _call_for_template(call: ToolCall, id_for_template: Callable[[str], str]) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _parsed(call.function.arguments)}
    return {"id": id_for_template(call.id), "type": "function", "function": function}


def _parsed(arguments: str) -> dict[str, object] | str:
    """An object; what is none, a model's own mistake, stays as it was written."""
    try:
        return parse_object(arguments.encode())
    except MalformedBody:
        return arguments

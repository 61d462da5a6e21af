"""A response: the object, and the items in it and those that it was asked with."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from gateway.protocol.chat_response import ChatTokenLogprob
from gateway.protocol.common import Usage
from gateway.protocol.responses import ResponseRequest
from gateway.protocol.responses_items import Item, Part

_PREFIXES = {
    "response": "resp",
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


def new_id(kind: str) -> str:
    """Of a response, or an item of that kind."""
    return f"{_PREFIXES[kind]}_{secrets.token_hex(24)}"


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[()] = ()
    logprobs: list[ChatTokenLogprob] = []


class InputText(msgspec.Struct, frozen=True, tag_field="type", tag="input_text"):
    text: str


class RefusalText(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    role: str
    content: list[OutputText | InputText | RefusalText]
    status: str = "completed"


class FunctionCallItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str = "completed"


class FunctionCallOutputItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call_output"):
    id: str
    call_id: str
    output: str
    status: str = "completed"


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningText]
    summary: tuple[()] = ()
    status: str = "completed"


OutputItem = MessageItem | FunctionCallItem | ReasoningItem
InputItem = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


class ResponseFailure(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: str


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # what is written to the prefix cache costs nothing


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """Beside what was made of a request it has the request's fields, defaults filled in."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str  # in_progress, completed, incomplete or failed
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None


class ResponseDeleted(msgspec.Struct, frozen=True):
    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


def begun(body: ResponseRequest, *, is_stored: bool) -> ResponseObject:
    """The response to a request, before anything has come of it."""
    format = body.text and body.text.format
    choice = body.tool_choice or "auto"
    effort = None if body.reasoning is None else body.reasoning.effort
    return ResponseObject(
        id=new_id("response"),
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": effort, "summary": None},
        store=is_stored,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": _as_given(format) if format else {"type": "text"}, "verbosity": "medium"},
        tool_choice=choice if isinstance(choice, str) else _as_given(choice),
        tools=[{"parameters": None, "strict": False} | _as_given(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
    )


def _as_given(part: Any) -> dict[str, Any]:
    given: dict[str, Any] = part.model_dump(by_alias=True, exclude_none=True)
    return given


def usage_of(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
        usage.total_tokens,
    )


def told(item: Item) -> InputItem:
    """An item that came with a request, as it is listed: with an id, and text where any was written short."""
    id = item.id or new_id(item.kind)
    match item.kind:
        case "function_call":
            return FunctionCallItem(id, item.call_id or "", item.name or "", item.arguments or "")
        case "function_call_output":
            return FunctionCallOutputItem(id, item.call_id or "", item.written)
        case "reasoning":
            return ReasoningItem(id, [ReasoningText(part.written) for part in item.content or ()])
    text = OutputText if item.role == "assistant" else InputText
    return MessageItem(id, item.role or "user", [_told(part, text) for part in item.content or ()])


def _told(part: Part, text: type[OutputText] | type[InputText]) -> OutputText | InputText | RefusalText:
    return RefusalText(part.written) if part.type == "refusal" else text(part.written)

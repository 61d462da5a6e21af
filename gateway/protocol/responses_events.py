"""The events of a response's stream. Each has its number, from 0."""

from __future__ import annotations

import msgspec

from gateway.protocol.chat_response import ChatTokenLogprob
from gateway.protocol.responses_object import OutputItem, OutputText, ReasoningText, ResponseObject


class StreamEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = -1  # until it is sent

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


class ResponseCreated(StreamEvent, tag="response.created"):
    response: ResponseObject


class ResponseInProgress(StreamEvent, tag="response.in_progress"):
    response: ResponseObject


class ResponseCompleted(StreamEvent, tag="response.completed"):
    response: ResponseObject


class ResponseIncomplete(StreamEvent, tag="response.incomplete"):
    response: ResponseObject


class ResponseFailed(StreamEvent, tag="response.failed"):
    response: ResponseObject


class ItemAdded(StreamEvent, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class ItemDone(StreamEvent, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class _OfItem(StreamEvent):
    item_id: str
    output_index: int


class PartAdded(_OfItem, tag="response.content_part.added"):
    part: OutputText | ReasoningText
    content_index: int = 0


class PartDone(_OfItem, tag="response.content_part.done"):
    part: OutputText | ReasoningText
    content_index: int = 0


class TextDelta(_OfItem, tag="response.output_text.delta"):
    delta: str
    logprobs: list[ChatTokenLogprob]
    content_index: int = 0


class TextDone(_OfItem, tag="response.output_text.done"):
    text: str
    logprobs: list[ChatTokenLogprob]
    content_index: int = 0


class ReasoningDelta(_OfItem, tag="response.reasoning_text.delta"):
    delta: str
    content_index: int = 0


class ReasoningDone(_OfItem, tag="response.reasoning_text.done"):
    text: str
    content_index: int = 0


class ArgumentsDelta(_OfItem, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(_OfItem, tag="response.function_call_arguments.done"):
    arguments: str
    name: str


class ErrorDetails(msgspec.Struct, frozen=True):
    type: str
    code: str | None
    message: str
    param: str | None


class StreamError(StreamEvent, tag="error"):
    """What it says stands in it twice, as its documents have it and as it is sent by OpenAI: SDKs raise what
    `error` says."""

    code: str | None
    message: str
    param: str | None
    error: ErrorDetails


RESPONSE_EVENTS: tuple[type[StreamEvent], ...] = (
    ResponseCreated,
    ResponseInProgress,
    ItemAdded,
    PartAdded,
    TextDelta,
    TextDone,
    ReasoningDelta,
    ReasoningDone,
    PartDone,
    ArgumentsDelta,
    ArgumentsDone,
    ItemDone,
    ResponseCompleted,
    ResponseIncomplete,
    ResponseFailed,
    StreamError,
)
"""In the order of a stream."""

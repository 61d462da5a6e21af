"""POST /v1/chat/completions: the request, the response, the chunks of a stream."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import BeforeValidator, Field

from gateway.protocol import bounds, fields
from gateway.protocol.common import (
    GenerationParams,
    InvalidField,
    RequestPart,
    TokenInfo,
    Usage,
)
from gateway.protocol.structured import StructuredRequest


class TextPart(RequestPart):
    rules = fields.TEXT_PART

    type: Literal["text"]
    text: str


def _as_parts(value: object) -> object:
    """A string is one part. Parts of other kinds are refused with a message of their own."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of text parts")
    kinds = [part.get("type") for part in value if isinstance(part, dict)]
    if other := [kind for kind in kinds if kind != "text"]:
        raise ValueError(
            f"this model reads text only; a content part of type {str(other[0])[:40]!r} is not allowed"
        )
    return value


class ChatMessage(RequestPart):
    rules = fields.MESSAGE

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(min_length=1, max_length=bounds.MAX_CONTENT_PARTS, fail_fast=True),
        BeforeValidator(_as_parts),
    ]
    name: Annotated[str, Field(max_length=1_000)] | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know messages: the content one string, developers called system."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "\n".join(part.text for part in self.content)}
        return message if self.name is None else message | {"name": self.name}


class ChatCompletionRequest(StructuredRequest):
    rules = fields.CHAT

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=bounds.MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: (
        Annotated[int, Field(ge=bounds.MAX_TOKENS.min, le=bounds.MAX_TOKENS.max)] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=bounds.TOP_LOGPROBS.min, le=bounds.TOP_LOGPROBS.max)] | None = None

    def params(self) -> GenerationParams:
        """Raises InvalidField."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatResponseMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Empty in the chunk that ends a choice."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    refusal: msgspec.UnsetType | None = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """`usage` is absent unless asked for; then null, but in the last chunk, whose choices are empty."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    system_fingerprint: str | None
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


ROLE_DELTA = Delta(role="assistant", content="", refusal=None)


def chat_logprobs(tokens: list[TokenInfo] | None) -> ChatLogprobs | None:
    """Chat's shape of log-probabilities."""
    if tokens is None:
        return None
    return ChatLogprobs([_token_logprob(info) for info in tokens])


def _token_logprob(info: TokenInfo) -> ChatTokenLogprob:
    top = [TopLogprob(_text(token), logprob, list(token)) for token, logprob in info.top]
    return ChatTokenLogprob(_text(info.token), info.logprob, list(info.token), top)


def _text(token: bytes) -> str:
    return token.decode(errors="replace")

"""POST /v1/chat/completions: the response, and the chunks of a stream."""

from __future__ import annotations

import msgspec

from gateway.protocol.common import TokenInfo, Usage


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


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str  # as the model wrote them


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: FunctionCall
    type: str = "function"


class ChatResponseMessage(msgspec.Struct, frozen=True):
    """`content` is null beside calls. What is unset is left out."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    annotations: tuple[()] = ()
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: FunctionCall | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET


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


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The name comes with the first one of a call, and empty arguments."""

    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Id and type come with the first one of a call."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Empty in the chunk that ends a choice."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    refusal: msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: tuple[ToolCallDelta, ...] | msgspec.UnsetType = msgspec.UNSET
    function_call: FunctionDelta | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, gc=False):
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


TEXT_ROLE = Delta(role="assistant", content="", refusal=None)
OTHER_ROLE = Delta(role="assistant", content=None, refusal=None)
"""The first of a choice: text follows, or something else."""


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

"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

from __future__ import annotations

import secrets
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from sse_starlette.event import ServerSentEvent
from starlette.responses import Response

from gateway.anthropic_errors import anthropic_body
from gateway.choice import ChoiceDelta
from gateway.conversation import chat_prompt, template_of
from gateway.prompts import require_ready
from gateway.protocol.anthropic import CountTokensRequest, MessagesRequest
from gateway.protocol.anthropic_response import (
    Message,
    MessageDelta,
    MessageEvent,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    Stop,
    StopReason,
    TokensCount,
)
from gateway.protocol.common import InvalidField, encoder, parse_body
from gateway.router import ServedModel
from gateway.routes.chat_start import Chat, conversation_of, start_chat
from gateway.routes.common import gateway_of, json_response
from gateway.routes.messages_blocks import BlockReader, BlockWriter
from gateway.sse import Chunks, DescribeError, direct_to, event, open_stream, unless_gone

router = APIRouter()

VERSIONS = ("2023-06-01", "2026-10-21")
"""Of the header anthropic-version: what is served is the same in both."""


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    body = parse_body(await request.body(), MessagesRequest)
    model_of(request, body)
    chat = await start_chat(request, body)
    if body.stream:
        settings, chunks = gateway_of(request).settings, _chunks(chat, body, request)
        return await open_stream(chunks, request.receive, settings, _error_describer(request), _PING)
    return json_response(await unless_gone(request.receive, _message(chat, body)))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    body = parse_body(await request.body(), CountTokensRequest)
    model = model_of(request, body)
    require_ready(model)
    prompt = await chat_prompt(model, conversation_of(model, body, body.tool_use()))
    return json_response(TokensCount(len(prompt.ids)))


def model_of(request: Request, body: CountTokensRequest) -> ServedModel:
    """The model, which can do what is asked of it beside answering. Raises InvalidField, ModelNotFound,
    NoChatTemplate."""
    version = request.headers.get("anthropic-version", VERSIONS[0])
    if version not in VERSIONS:
        raise InvalidField(
            None, f"anthropic-version: {version[:40]!r} is not known here; send one of {', '.join(VERSIONS)}."
        )
    model = gateway_of(request).router.find(body.model)
    body.check_thinking(template_of(model).variables, has_thoughts=model.answer.tags is not None)
    return model


async def _message(chat: Chat, body: MessagesRequest) -> Message:
    [answer] = chat.answers
    writer, reader = BlockWriter(shows_thoughts=body.shows_thoughts), BlockReader()
    async with aclosing(chat.generation.events()) as batches:
        async for batch in batches:
            for delta in batch:
                reader.add(writer.write(answer.read(delta)))
    reader.add(writer.end())
    stop = _stop(chat, body)
    return Message(
        id=_new_id(),
        model=body.model,
        content=reader.blocks(),
        stop_reason=stop.stop_reason,
        stop_sequence=stop.stop_sequence,
        usage=MessageUsage.of(chat.usage()),
    )


async def _chunks(chat: Chat, body: MessagesRequest, request: Request) -> Chunks:
    """The events of a stream. The first one waits for a token: then it is known what was in the cache."""
    [answer] = chat.answers
    writer, has_begun = BlockWriter(shows_thoughts=body.shows_thoughts), False

    def shape(batch: list[ChoiceDelta]) -> bytes:
        nonlocal has_begun
        events = [_start(chat, body)] if not has_begun else []
        has_begun = True
        for delta in batch:
            events += writer.write(answer.read(delta))
        return b"".join(map(_event, events))

    async with aclosing(chat.generation.events(direct_to(request.scope, shape))) as batches:
        async for batch in batches:
            if data := shape(batch):
                yield data
    usage = MessageUsage.of(chat.usage())
    yield b"".join(map(_event, (*writer.end(), MessageDelta(_stop(chat, body), usage), MessageStop())))


def _start(chat: Chat, body: MessagesRequest) -> MessageEvent:
    usage = MessageUsage.of(chat.usage())
    message = Message(
        id=_new_id(), model=body.model, content=[], stop_reason=None, stop_sequence=None, usage=usage
    )
    return MessageStart(message)


def _stop(chat: Chat, body: MessagesRequest) -> Stop:
    """Why a message has ended. One that ended before it had as many tokens as it might have has filled the
    model's context."""
    [answer] = chat.answers
    reason: StopReason = "end_turn"
    if answer.stop_string is not None:
        reason = "stop_sequence"
    elif answer.finish_reason == "length":
        is_full = chat.usage().completion_tokens < body.max_tokens
        reason = "model_context_window_exceeded" if is_full else "max_tokens"
    elif answer.num_calls:
        reason = "tool_use"
    return Stop(reason, answer.stop_string)


def _event(content: MessageEvent) -> bytes:
    return event(encoder.encode(content), str(content.__struct_config__.tag))


_PING = ServerSentEvent(event="ping", data=msgspec.json.encode(Ping()).decode(), sep="\n")


def _error_describer(request: Request) -> DescribeError:
    gateway, request_id = gateway_of(request), request.state.request_id
    return lambda error: event(anthropic_body(gateway.error_of(request, error), request_id), "error")


def _new_id() -> str:
    return f"msg_{secrets.token_hex(12)}"

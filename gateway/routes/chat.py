"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.choice import ChoiceDelta
from gateway.protocol.chat import ChatCompletionRequest
from gateway.protocol.chat_response import ChatChunk, ChatChunkChoice, ChatCompletion
from gateway.protocol.common import encoder, parse_body
from gateway.routes.chat_choice import ChoiceReader
from gateway.routes.chat_start import Chat, start_chat
from gateway.routes.common import Answer, gateway_of, json_response, new_answer
from gateway.sse import DONE, Chunks, direct_to, event, open_stream, unless_gone

router = APIRouter()

_NO_CHOICES = b'"choices":[]'
"""In a chunk without any, where a choice goes: the rest of a chunk is the same for all of an answer. No text
within can look so, for its quotes are escaped."""


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    gateway = gateway_of(request)
    body = parse_body(await request.body(), ChatCompletionRequest)
    chat = await start_chat(request, body)
    is_legacy = body.tool_use().is_legacy
    readers = [ChoiceReader(i, answer, is_legacy=is_legacy) for i, answer in enumerate(chat.answers)]
    answer = new_answer("chatcmpl", body.model, chat.generation.fingerprint)
    if body.stream:
        chunks = _chunks(chat, readers, body, answer, request)
        describe_error = gateway.error_describer(request)
        return await open_stream(chunks, request.receive, gateway.settings, describe_error)
    return json_response(await unless_gone(request.receive, _completion(chat, readers, answer)))


async def _completion(chat: Chat, readers: Sequence[ChoiceReader], answer: Answer) -> ChatCompletion:
    async with aclosing(chat.generation.events()) as batches:
        async for batch in batches:
            for delta in batch:
                readers[delta.index].add(delta)
    return ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[reader.choice() for reader in readers],
        usage=chat.usage(),
        system_fingerprint=answer.fingerprint,
    )


async def _chunks(
    chat: Chat,
    readers: Sequence[ChoiceReader],
    body: ChatCompletionRequest,
    answer: Answer,
    request: Request,
) -> Chunks:
    """The events of a stream: each choice's role, what comes of it and its end; usage if it is asked for;
    [DONE]."""
    template = ChatChunk(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=(),
        system_fingerprint=answer.fingerprint,
        usage=None if body.include_usage else msgspec.UNSET,
    )

    before, after = encoder.encode(template).split(_NO_CHOICES)

    def chunk(choice: ChatChunkChoice) -> bytes:
        if body.continuous_usage:
            return with_usage(choice)
        return event(b'%b"choices":[%b]%b' % (before, encoder.encode(choice), after))

    def with_usage(*choices: ChatChunkChoice) -> bytes:
        return event(encoder.encode(msgspec.structs.replace(template, choices=choices, usage=chat.usage())))

    def shape(batch: list[ChoiceDelta]) -> bytes:
        return b"".join([chunk(choice) for delta in batch for choice in readers[delta.index].chunks(delta)])

    async with aclosing(chat.generation.events(direct_to(request.scope, shape))) as batches:
        async for batch in batches:
            if data := shape(batch):
                yield data
    yield (with_usage() if body.include_usage else b"") + DONE

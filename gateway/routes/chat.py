"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.choice import ChoiceDelta
from gateway.conversation import chat_prompt
from gateway.generation import Generation, collect
from gateway.prompt.conversation import Conversation
from gateway.prompts import require_ready
from gateway.protocol.chat import (
    ROLE_DELTA,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatResponseMessage,
    Delta,
    chat_logprobs,
)
from gateway.protocol.common import encoder, parse_body
from gateway.routes.common import Answer, gateway_of, json_response, new_answer, tenant_of
from gateway.sse import DONE, Chunks, event, open_stream, unless_gone

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    gateway = gateway_of(request)
    body = parse_body(await request.body(), ChatCompletionRequest)
    generation = await _start(request, body)
    answer = new_answer("chatcmpl", body.model, generation.fingerprint)
    if body.stream:
        chunks = _chunks(generation, body, answer)
        describe_error = gateway.error_describer(request)
        return await open_stream(chunks, request.receive, gateway.settings, describe_error)
    return json_response(await unless_gone(request.receive, _completion(generation, answer)))


async def _start(request: Request, body: ChatCompletionRequest) -> Generation:
    gateway = gateway_of(request)
    model = gateway.router.find(body.model)
    require_ready(model)
    params = await gateway.grammars.constrain(body.params(), body.shape())
    conversation = Conversation(messages=[message.for_template() for message in body.messages])
    prompt, _ = await chat_prompt(model, conversation)
    admission = gateway.admissions[model.name]
    return Generation(admission, [prompt], params, tenant_of(request), prompt_param="messages")


async def _completion(generation: Generation, answer: Answer) -> ChatCompletion:
    choices = [
        ChatChoice(
            index=index,
            message=ChatResponseMessage(choice.text),
            logprobs=chat_logprobs(choice.logprobs),
            finish_reason=choice.finish_reason,
        )
        for index, choice in enumerate(await collect(generation))
    ]
    return ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=choices,
        usage=generation.usage(),
        system_fingerprint=answer.fingerprint,
    )


async def _chunks(generation: Generation, body: ChatCompletionRequest, answer: Answer) -> Chunks:
    """The events of a stream: a role chunk a choice, text as it comes, ends, usage if asked for, [DONE]."""
    template = ChatChunk(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=(),
        system_fingerprint=answer.fingerprint,
        usage=None if body.include_usage else msgspec.UNSET,
    )

    def chunk(*choices: ChatChunkChoice, has_usage: bool = body.continuous_usage) -> bytes:
        usage = generation.usage() if has_usage else template.usage
        return event(encoder.encode(msgspec.structs.replace(template, choices=choices, usage=usage)))

    has_roles = False
    async with aclosing(generation.events()) as batches:
        async for batch in batches:
            events = [chunk(choice) for delta in batch for choice in _choices(delta)]
            if not has_roles:
                roles = [chunk(ChatChunkChoice(index, ROLE_DELTA)) for index in range(generation.num_choices)]
                events, has_roles = roles + events, True
            yield b"".join(events)
    yield (chunk(has_usage=True) if body.include_usage else b"") + DONE


def _choices(delta: ChoiceDelta) -> list[ChatChunkChoice]:
    """A chunk for the text and one of its own, with an empty delta, for the end: as OpenAI has it."""
    choices = []
    if delta.text or delta.logprobs:
        logprobs = chat_logprobs(delta.logprobs)
        choices.append(ChatChunkChoice(delta.index, Delta(content=delta.text), logprobs))
    if delta.finish_reason is not None:
        choices.append(ChatChunkChoice(delta.index, Delta(), None, delta.finish_reason))
    return choices

"""POST /v1/completions."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.choice import ChoiceDelta
from gateway.generation import Generation, collect
from gateway.prompts import completion_prompts, require_ready
from gateway.protocol.common import encoder, parse_body
from gateway.protocol.completions import Completion, CompletionChoice, CompletionRequest, completion_logprobs
from gateway.routes.common import Answer, gateway_of, json_response, new_answer, tenant_of
from gateway.sse import DONE, Chunks, event, open_stream, unless_gone

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    gateway = gateway_of(request)
    body = parse_body(await request.body(), CompletionRequest)
    generation = await _start(request, body)
    answer = new_answer("cmpl", body.model, generation.fingerprint)
    if body.stream:
        chunks = _chunks(generation, body, answer)
        describe_error = gateway.error_describer(request)
        return await open_stream(chunks, request.receive, gateway.settings, describe_error)
    return json_response(await unless_gone(request.receive, _completion(generation, body, answer)))


async def _start(request: Request, body: CompletionRequest) -> Generation:
    gateway = gateway_of(request)
    model = gateway.router.find(body.model)
    params = await gateway.grammars.constrain(body.params(), body.shape())
    require_ready(model)
    prompts = await completion_prompts(model, body.prompt)
    admission = gateway.admissions[model.name]
    return Generation(admission, prompts, params, tenant_of(request), prompt_param="prompt")


async def _completion(generation: Generation, body: CompletionRequest, answer: Answer) -> Completion:
    choices = [
        CompletionChoice(
            text=choice.text,
            index=index,
            logprobs=completion_logprobs(choice.logprobs, body.logprobs),
            finish_reason=choice.finish_reason,
        )
        for index, choice in enumerate(await collect(generation))
    ]
    return _message(answer, choices, generation)


def _message(
    answer: Answer, choices: list[CompletionChoice], usage_of: Generation | None = None
) -> Completion:
    return Completion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=choices,
        usage=msgspec.UNSET if usage_of is None else usage_of.usage(),
        system_fingerprint=answer.fingerprint,
    )


async def _chunks(generation: Generation, body: CompletionRequest, answer: Answer) -> Chunks:
    """The events of a stream: text as it comes, ends, usage if asked for, [DONE]."""
    usage_of = generation if body.continuous_usage else None

    def chunk(choice: CompletionChoice) -> bytes:
        message = _message(answer, [choice], usage_of)
        if body.include_usage and usage_of is None:
            message = msgspec.structs.replace(message, usage=None)
        return event(encoder.encode(message))

    async with aclosing(generation.events()) as batches:
        async for batch in batches:
            yield b"".join(chunk(choice) for delta in batch for choice in _choices(delta, body.logprobs))
    usage = event(encoder.encode(_message(answer, [], generation))) if body.include_usage else b""
    yield usage + DONE


def _choices(delta: ChoiceDelta, num_top: int | None) -> list[CompletionChoice]:
    """A chunk for the text and one of its own for the end."""
    choices = []
    if delta.text or delta.logprobs:
        logprobs = completion_logprobs(delta.logprobs, num_top)
        choices.append(CompletionChoice(delta.text, delta.index, logprobs))
    if delta.finish_reason is not None:
        choices.append(CompletionChoice("", delta.index, None, delta.finish_reason))
    return choices

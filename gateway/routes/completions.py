"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.choice import ChoiceDelta, CollectedChoice
from gateway.generation import Generation, collect
from gateway.prompts import Encoding, Prompt, completion_prompts, require_infill, require_ready
from gateway.protocol import bounds
from gateway.protocol.common import InvalidField, PromptReport, PromptToken, encoder, parse_body
from gateway.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    completion_logprobs,
    prompt_logprobs,
)
from gateway.router import ServedModel
from gateway.routes.common import Answer, gateway_of, json_response, new_answer, tenant_of
from gateway.scoring import LARGE_REPORT, PromptScoring
from gateway.sse import DONE, Chunks, direct_to, event, open_stream, unless_gone

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    gateway = gateway_of(request)
    body = parse_body(await request.body(), CompletionRequest)
    generation = await _start(request, body)
    answer = new_answer("cmpl", body.model, generation.fingerprint)
    if body.stream:
        chunks = _chunks(generation, body, answer, request)
        describe_error = gateway.error_describer(request)
        return await open_stream(chunks, request.receive, gateway.settings, describe_error)
    return json_response(await unless_gone(request.receive, _completion(generation, body, answer)))


async def _start(request: Request, body: CompletionRequest) -> Generation:
    gateway = gateway_of(request)
    model = gateway.router.find(body.model)
    params = await gateway.grammars.constrain(body.params(), body.shape())
    info = require_ready(model)
    encoding = _encoding(body, model, info.max_model_len)
    if encoding.infill is not None:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *encoding.infill.end_ids))
    prompts = await completion_prompts(model.tokenizer, body.prompt, encoding)
    scorings = []
    if body.echo or body.num_scored is not None:
        _check_report(prompts, body)
        scorings = [PromptScoring(prompt, model.tokenizer, body.num_scored) for prompt in prompts]
    return Generation(
        gateway.admissions[model.name],
        [prompt.ids for prompt in prompts],
        params,
        tenant_of(request),
        prompt_param="prompt",
        scorings=scorings,
    )


def _encoding(body: CompletionRequest, model: ServedModel, max_model_len: int) -> Encoding:
    """Raises InvalidField."""
    max_tokens = body.truncate_prompt_tokens
    if max_tokens == -1:
        wanted = 1 if body.max_tokens is None else body.max_tokens
        max_tokens = max(max_model_len - wanted, 1)
    return Encoding(
        add_special_tokens=body.add_special_tokens is not False,
        max_tokens=max_tokens,
        has_text=bool(body.echo) or body.num_scored is not None,
        infill=require_infill(model) if body.suffix else None,
        suffix=body.suffix or "",
    )


def _check_report(prompts: list[Prompt], body: CompletionRequest) -> None:
    """What is told of the prompts is told for each choice. Raises InvalidField."""
    n = body.n or 1
    if body.echo and (num_chars := n * sum(len(prompt.text) for prompt in prompts)) > bounds.MAX_ECHOED_CHARS:
        raise InvalidField(
            "echo", f"'echo' would be {num_chars} characters; at most {bounds.MAX_ECHOED_CHARS} are written"
        )
    num_tokens = n * sum(len(prompt.ids) for prompt in prompts)
    num_logprobs = 0 if body.num_scored is None else num_tokens * (1 + body.num_scored)
    if num_logprobs > bounds.MAX_PROMPT_LOGPROBS:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidField(
            param,
            f"'{param}' of {num_tokens} prompt tokens, each with {body.num_scored} others, are"
            f" {num_logprobs}; at most {bounds.MAX_PROMPT_LOGPROBS} are allowed in a request",
        )


async def _completion(generation: Generation, body: CompletionRequest, answer: Answer) -> Completion:
    collected = await collect(generation)

    def shape() -> list[CompletionChoice]:
        return [_choice(index, choice, body) for index, choice in enumerate(collected)]

    is_large = sum(_num_scores(choice.prompt) for choice in collected) >= LARGE_REPORT
    return _message(answer, await asyncio.to_thread(shape) if is_large else shape(), generation)


def _num_scores(prompt: PromptReport | None) -> int:
    if prompt is None or not prompt.tokens:
        return 0
    return len(prompt.tokens) * (1 + len(prompt.tokens[-1].top))


def _choice(index: int, choice: CollectedChoice, body: CompletionRequest) -> CompletionChoice:
    text, logprobs = _echoed(choice.prompt, body)
    scores = choice.prompt.tokens if choice.prompt is not None else None
    asked = body.prompt_logprobs
    return CompletionChoice(
        text=text + choice.text,
        index=index,
        logprobs=completion_logprobs(logprobs, choice.logprobs, body.logprobs),
        finish_reason=choice.finish_reason,
        prompt_logprobs=msgspec.UNSET if asked is None or scores is None else prompt_logprobs(scores, asked),
    )


def _echoed(prompt: PromptReport | None, body: CompletionRequest) -> tuple[str, Sequence[PromptToken]]:
    """What goes before a choice's own text and log-probabilities."""
    if prompt is None or not body.echo:
        return "", ()
    return prompt.text, prompt.tokens or ()


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


async def _chunks(
    generation: Generation, body: CompletionRequest, answer: Answer, request: Request
) -> Chunks:
    """The events of a stream: text as it comes, ends, usage if asked for, [DONE]."""
    usage_of = generation if body.continuous_usage else None

    def chunk(choice: CompletionChoice) -> bytes:
        message = _message(answer, [choice], usage_of)
        if body.include_usage and usage_of is None:
            message = msgspec.structs.replace(message, usage=None)
        return event(encoder.encode(message))

    def shape(batch: list[ChoiceDelta]) -> bytes:
        return b"".join([chunk(choice) for delta in batch for choice in _choices(delta, body)])

    async with aclosing(generation.events(direct_to(request.scope, shape))) as batches:
        async for batch in batches:
            echoes = [await _echo(delta.index, delta.prompt, body) for delta in batch if delta.prompt]
            yield b"".join(map(chunk, echoes)) + shape(batch)
    usage = event(encoder.encode(_message(answer, [], generation))) if body.include_usage else b""
    yield usage + DONE


async def _echo(index: int, prompt: PromptReport, body: CompletionRequest) -> CompletionChoice:
    """A chunk for the echoed prompt, before any other of its choice."""
    text, tokens = _echoed(prompt, body)
    shape = partial(completion_logprobs, tokens, None, body.logprobs)
    is_large = _num_scores(prompt) >= LARGE_REPORT
    return CompletionChoice(text, index, await asyncio.to_thread(shape) if is_large else shape())


def _choices(delta: ChoiceDelta, body: CompletionRequest) -> list[CompletionChoice]:
    """A chunk for the text and one of its own for the end."""
    choices = []
    if delta.text or delta.logprobs:
        logprobs = completion_logprobs((), delta.logprobs, body.logprobs)
        choices.append(CompletionChoice(delta.text, delta.index, logprobs))
    if delta.finish_reason is not None:
        choices.append(CompletionChoice("", delta.index, None, delta.finish_reason))
    return choices

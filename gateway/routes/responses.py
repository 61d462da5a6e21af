"""POST /v1/responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.answer.events import Content
from gateway.choice import ChoiceDelta
from gateway.errors import APIError
from gateway.prompt.template import TemplateRefused
from gateway.prompt.tokenizer import ControlTokenInText
from gateway.protocol.chat_response import chat_logprobs
from gateway.protocol.common import InvalidField, TokenInfo, encoder, parse_body
from gateway.protocol.responses import ResponseChat, ResponseRequest
from gateway.protocol.responses_events import (
    ErrorDetails,
    ResponseCompleted,
    ResponseCreated,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    StreamError,
    StreamEvent,
)
from gateway.protocol.responses_items import messages_of
from gateway.protocol.responses_object import (
    IncompleteDetails,
    ResponseFailure,
    ResponseObject,
    begun,
    usage_of,
)
from gateway.routes.chat_start import Chat, start_chat
from gateway.routes.common import gateway_of, json_response, tenant_of
from gateway.routes.responses_context import context_of, stored
from gateway.routes.responses_output import Output
from gateway.sequence_stream import ContextLengthExceeded
from gateway.sse import Chunks, direct_to, event, open_stream, unless_gone

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    gateway = gateway_of(request)
    store, owner = gateway.responses, tenant_of(request).name
    body = parse_body(await request.body(), ResponseRequest)
    context = context_of(store, owner, body)
    with _errors_of_input():
        chat = await start_chat(request, ResponseChat(body, messages_of(body.instructions, context.items)))
    underway = _Underway(chat, begun(body, is_stored=context.is_stored))

    def kept(response: ResponseObject) -> ResponseObject:
        """The response, which says whether it is."""
        is_kept = context.is_stored and store.put(owner, response.id, stored(response, context))
        return response if is_kept == response.store else msgspec.structs.replace(response, store=is_kept)

    if body.stream:
        stream = _Stream(underway)
        return await open_stream(
            stream.chunks(kept, request),
            request.receive,
            gateway.settings,
            lambda error: stream.failed(gateway.error_of(request, error)),
        )
    return json_response(kept(await unless_gone(request.receive, underway.run())))


@contextmanager
def _errors_of_input() -> Iterator[None]:
    """What a chat calls messages is called input here."""
    try:
        yield
    except (TemplateRefused, ControlTokenInText) as error:
        raise InvalidField("input", str(error)) from error
    except (InvalidField, ContextLengthExceeded) as error:
        if error.param == "messages":
            error.param = "input"
        raise


class _Underway:
    """A response that is being made."""

    def __init__(self, chat: Chat, begun: ResponseObject) -> None:
        self.chat, self.begun = chat, begun
        self._output = Output()
        self._logprobs: list[TokenInfo] = []  # that are not told yet

    async def run(self) -> ResponseObject:
        async with aclosing(self.chat.generation.events()) as batches:
            async for batch in batches:
                for delta in batch:
                    self.read(delta)
        self.end()
        return self.response()

    def read(self, delta: ChoiceDelta) -> list[StreamEvent]:
        """The events of what is new. Text has the log-probabilities of the tokens since what was before it;
        those of thoughts and calls are left out."""
        [answer] = self.chat.answers
        num_thoughts = answer.num_reasoning_tokens
        events = answer.read(delta)
        if answer.num_reasoning_tokens == num_thoughts:
            self._logprobs += delta.logprobs or ()
        told: list[StreamEvent] = []
        for one in events:
            tokens, self._logprobs = self._logprobs, []
            logprobs = chat_logprobs(tokens) if isinstance(one, Content) else None
            told += self._output.add(one, logprobs.content if logprobs else [])
        return told

    def end(self) -> list[StreamEvent]:
        """The events of the last item's end."""
        return list(self._output.end("completed" if self._is_complete else "incomplete"))

    def response(self) -> ResponseObject:
        """When all has been read."""
        is_complete = self._is_complete
        return msgspec.structs.replace(
            self.begun,
            status="completed" if is_complete else "incomplete",
            completed_at=int(time.time()) if is_complete else None,
            incomplete_details=None if is_complete else IncompleteDetails("max_output_tokens"),
            output=self._output.items,
            usage=usage_of(self.chat.usage()),
        )

    def failed(self, error: APIError) -> ResponseObject:
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status, "server_error")
        failure = ResponseFailure(code, error.error.message)
        return msgspec.structs.replace(
            self.begun, status="failed", error=failure, output=self._output.so_far()
        )

    @property
    def _is_complete(self) -> bool:
        return self.chat.answers[0].finish_reason == "stop"


class _Stream:
    """The events of a response, numbered."""

    def __init__(self, underway: _Underway) -> None:
        self._underway = underway
        self._num_sent = 0

    async def chunks(self, kept: Callable[[ResponseObject], ResponseObject], request: Request) -> Chunks:
        """The first ones come with the first of the answer: until then a failure has a status of its own.
        `kept` stores the response and gives it back, to be sent."""
        underway = self._underway
        begin: list[StreamEvent] = [
            ResponseCreated(response=underway.begun),
            ResponseInProgress(response=underway.begun),
        ]

        def shape(batch: list[ChoiceDelta]) -> bytes:
            events = begin + [event for delta in batch for event in underway.read(delta)]
            begin.clear()
            return self._written(*events)

        async with aclosing(underway.chat.generation.events(direct_to(request.scope, shape))) as batches:
            async for batch in batches:
                if data := shape(batch):
                    yield data
        last = underway.end()
        response = kept(underway.response())
        ended = ResponseCompleted if response.status == "completed" else ResponseIncomplete
        yield self._written(*last, ended(response=response))

    def failed(self, error: APIError) -> bytes:
        """The events that end a stream that has failed."""
        what = error.error
        details = ErrorDetails(what.type, what.code, what.message, what.param)
        told = StreamError(code=what.code, message=what.message, param=what.param, error=details)
        if not self._num_sent:
            return self._written(told)
        return self._written(ResponseFailed(response=self._underway.failed(error)), told)

    def _written(self, *events: StreamEvent) -> bytes:
        chunks = []
        for one in events:
            one.sequence_number = self._num_sent
            self._num_sent += 1
            chunks.append(event(encoder.encode(one), one.kind))
        return b"".join(chunks)

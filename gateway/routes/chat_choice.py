"""One choice of a chat: what comes of it, as OpenAI's chunks or as its message."""

from __future__ import annotations

import msgspec

from gateway.answer.events import Arguments, CallStart, Content, Event, Reasoning
from gateway.choice import ChoiceDelta
from gateway.protocol.chat_response import (
    OTHER_ROLE,
    TEXT_ROLE,
    ChatChoice,
    ChatChunkChoice,
    ChatResponseMessage,
    Delta,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    chat_logprobs,
)
from gateway.protocol.common import TokenInfo
from gateway.routes.chat_answer import ChoiceAnswer


class ChoiceReader:
    """Reads a choice's deltas: each to `chunks`, or all of them to `add` and then `choice`.

    `is_legacy`: a call is told in the older shape, as `function_call`."""

    def __init__(self, index: int, answer: ChoiceAnswer, *, is_legacy: bool) -> None:
        self._index, self._answer, self._is_legacy = index, answer, is_legacy
        self._logprobs: list[TokenInfo] | None = None  # that are not told yet
        self._has_role = False
        self._events: list[Event] = []
        self._finish_reason = ""

    def chunks(self, delta: ChoiceDelta) -> list[ChatChunkChoice]:
        """One for each thing that is new, before the first one the role, and one for the end. A token's
        log-probability is in the next one that there is."""
        events, reason = self._read(delta)
        if reason is None and self._logprobs is None and self._has_role and len(events) == 1:  # nearly always
            return [ChatChunkChoice(self._index, self._delta(events[0]))]
        chunks = [ChatChunkChoice(self._index, self._delta(event)) for event in events]
        if reason is not None:
            chunks.append(ChatChunkChoice(self._index, Delta(), None, reason))
        if not chunks:
            return []
        if self._logprobs:
            chunks[0] = msgspec.structs.replace(chunks[0], logprobs=chat_logprobs(self._logprobs))
            self._logprobs = []
        if not self._has_role:
            self._has_role = True
            is_text = not events or isinstance(events[0], Content)
            chunks.insert(0, ChatChunkChoice(self._index, TEXT_ROLE if is_text else OTHER_ROLE))
        return chunks

    def add(self, delta: ChoiceDelta) -> None:
        events, reason = self._read(delta)
        self._events += events
        self._finish_reason = reason or self._finish_reason

    def choice(self) -> ChatChoice:
        """Of all that was added."""
        return ChatChoice(self._index, self._message(), chat_logprobs(self._logprobs), self._finish_reason)

    def _read(self, delta: ChoiceDelta) -> tuple[list[Event], str | None]:
        """What is new, and why the choice has ended, if it has."""
        events, reason = self._answer.read(delta), delta.finish_reason
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += delta.logprobs
        if reason == "stop" and self._answer.num_calls:
            reason = "function_call" if self._is_legacy else "tool_calls"
        return events, reason

    def _delta(self, event: Event) -> Delta:
        if type(event) is Content:  # as nearly always
            return Delta(content=event.text)
        match event:
            case Reasoning(text):
                return Delta(reasoning_content=text)
            case CallStart(number, id, name):
                function = FunctionDelta(name=name, arguments="")
                call = ToolCallDelta(number, function, id, "function")
            case Arguments(number, text):
                function = FunctionDelta(arguments=text)
                call = ToolCallDelta(number, function)
        return Delta(function_call=function) if self._is_legacy else Delta(tool_calls=(call,))

    def _message(self) -> ChatResponseMessage:
        content, reasoning, calls = [], [], []
        arguments: dict[int, list[str]] = {}
        for event in self._events:
            match event:
                case Content(text):
                    content.append(text)
                case Reasoning(text):
                    reasoning.append(text)
                case CallStart(number):
                    calls.append(event)
                    arguments[number] = []
                case Arguments(number, text):
                    arguments[number].append(text)
        told = [ToolCall(call.id, FunctionCall(call.name, "".join(arguments[call.number]))) for call in calls]
        return ChatResponseMessage(
            "".join(content) if content or not told else None,
            tool_calls=told if told and not self._is_legacy else msgspec.UNSET,
            function_call=told[0].function if told and self._is_legacy else msgspec.UNSET,
            reasoning_content="".join(reasoning) if self._answer.has_thought else msgspec.UNSET,
        )

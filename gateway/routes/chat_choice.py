"""One choice of a chat: what comes of it, as OpenAI's chunks or as its message."""

from __future__ import annotations

import msgspec

from gateway.answer.answer import AnswerReader
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


class ChoiceReader:
    """Reads a choice's deltas: each to `chunks`, or all of them to `add` and then `choice`.

    `is_legacy`: a call is told in the older shape, as `function_call`."""

    def __init__(self, index: int, reader: AnswerReader, *, is_legacy: bool) -> None:
        self._index, self._reader, self._is_legacy = index, reader, is_legacy
        self._logprobs: list[TokenInfo] | None = None  # that are not told yet
        self._has_role = False
        self._events: list[Event] = []
        self._finish_reason = ""
        self.num_reasoning_tokens = 0

    def chunks(self, delta: ChoiceDelta) -> list[ChatChunkChoice]:
        """One for each thing that is new, before the first one the role, and one for the end. A token's
        log-probability is in the next one that there is."""
        events, reason = self._read(delta)
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
        reader, reason = self._reader, delta.finish_reason
        was_thinking, has_thought = reader.is_thinking, reader.has_thought
        events = reader.feed(delta.text)
        if reason is not None:
            events += reader.end()
        if was_thinking or reader.has_thought != has_thought:
            self.num_reasoning_tokens = delta.num_tokens
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += delta.logprobs
        if reason == "stop" and reader.num_calls:
            reason = "function_call" if self._is_legacy else "tool_calls"
        return events, reason

    def _delta(self, event: Event) -> Delta:
        match event:
            case Content(text):
                return Delta(content=text)
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
            reasoning_content="".join(reasoning) if self._reader.has_thought else msgspec.UNSET,
        )

"""The items of a response: what is read of an answer, as OpenAI's items and the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.answer.events import Arguments, CallStart, Content, Event, Reasoning
from gateway.protocol.chat_response import ChatTokenLogprob
from gateway.protocol.responses_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    StreamEvent,
    TextDelta,
    TextDone,
)
from gateway.protocol.responses_object import (
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    new_id,
)


class Output:
    """The items, the last of which may be underway."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []  # that have ended
        self._open: _Message | _Thoughts | _Call | None = None

    def add(self, event: Event, logprobs: list[ChatTokenLogprob]) -> Iterator[StreamEvent]:
        """The events of what is new; `logprobs`: of its tokens, if it is content."""
        item = self._open
        match event:
            case Content(text):
                if not isinstance(item, _Message):
                    yield from self._begin(item := _Message())
                yield from item.add(text, logprobs)
            case Reasoning(text):
                if not isinstance(item, _Thoughts):
                    yield from self._begin(item := _Thoughts())
                yield from item.add(text)
            case CallStart():
                yield from self._begin(_Call(event))
            case Arguments(_, text):
                assert isinstance(item, _Call), "arguments are of the last call, which nothing has ended"
                yield from item.add(text)

    def end(self, status: str = "completed") -> Iterator[StreamEvent]:
        """Of the item that is underway."""
        if self._open is not None:
            yield from self._open.end()
            item = self._open.item(status)
            yield ItemDone(output_index=self._open.index, item=item)
            self.items.append(item)
            self._open = None

    def so_far(self) -> list[OutputItem]:
        """The items; one that is underway, as it was cut off."""
        return self.items if self._open is None else [*self.items, self._open.item("incomplete")]

    def _begin(self, item: _Message | _Thoughts | _Call) -> Iterator[StreamEvent]:
        yield from self.end()
        self._open = item
        yield from item.begin(len(self.items))


class _Message:
    def __init__(self) -> None:
        self.index, self._id = 0, new_id("message")
        self._texts: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []

    def begin(self, index: int) -> Iterator[StreamEvent]:
        self.index = index
        yield ItemAdded(
            output_index=self.index, item=MessageItem(self._id, "assistant", [], status="in_progress")
        )
        yield PartAdded(item_id=self._id, output_index=self.index, part=OutputText(""))

    def add(self, text: str, logprobs: list[ChatTokenLogprob]) -> Iterator[StreamEvent]:
        self._texts.append(text)
        self._logprobs += logprobs
        yield TextDelta(item_id=self._id, output_index=self.index, delta=text, logprobs=logprobs)

    def end(self) -> Iterator[StreamEvent]:
        part = self._part()
        yield TextDone(item_id=self._id, output_index=self.index, text=part.text, logprobs=part.logprobs)
        yield PartDone(item_id=self._id, output_index=self.index, part=part)

    def item(self, status: str) -> MessageItem:
        return MessageItem(self._id, "assistant", [self._part()], status)

    def _part(self) -> OutputText:
        return OutputText("".join(self._texts), logprobs=self._logprobs)


class _Thoughts:
    def __init__(self) -> None:
        self.index, self._id = 0, new_id("reasoning")
        self._texts: list[str] = []

    def begin(self, index: int) -> Iterator[StreamEvent]:
        self.index = index
        yield ItemAdded(output_index=self.index, item=ReasoningItem(self._id, [], status="in_progress"))
        yield PartAdded(item_id=self._id, output_index=self.index, part=ReasoningText(""))

    def add(self, text: str) -> Iterator[StreamEvent]:
        self._texts.append(text)
        yield ReasoningDelta(item_id=self._id, output_index=self.index, delta=text)

    def end(self) -> Iterator[StreamEvent]:
        part = self._part()
        yield ReasoningDone(item_id=self._id, output_index=self.index, text=part.text)
        yield PartDone(item_id=self._id, output_index=self.index, part=part)

    def item(self, status: str) -> ReasoningItem:
        return ReasoningItem(self._id, [self._part()], status=status)

    def _part(self) -> ReasoningText:
        return ReasoningText("".join(self._texts))


class _Call:
    def __init__(self, call: CallStart) -> None:
        self.index, self._id, self._call = 0, new_id("function_call"), call
        self._texts: list[str] = []

    def begin(self, index: int) -> Iterator[StreamEvent]:
        self.index = index
        yield ItemAdded(output_index=self.index, item=self.item("in_progress"))

    def add(self, text: str) -> Iterator[StreamEvent]:
        self._texts.append(text)
        yield ArgumentsDelta(item_id=self._id, output_index=self.index, delta=text)

    def end(self) -> Iterator[StreamEvent]:
        arguments = "".join(self._texts)
        yield ArgumentsDone(
            item_id=self._id, output_index=self.index, arguments=arguments, name=self._call.name
        )

    def item(self, status: str) -> FunctionCallItem:
        return FunctionCallItem(self._id, self._call.id, self._call.name, "".join(self._texts), status=status)

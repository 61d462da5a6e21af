"""An answer's text, as it comes, to what it consists of: thoughts, content, calls of functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway.answer import formats, reasoning
from gateway.answer.events import Event, Output
from gateway.answer.grammar import NO_THOUGHTS, Function, answer_grammar, thoughts_between
from gateway.answer.reader import Reading
from gateway.answer.reasoning import Tags, Thoughts
from gateway.answer.tool_format import ToolFormat
from gateway.prompt.marks import Marks
from gateway.prompt.tokenizer import Tokenizer

AUTO, NONE = "auto", "none"
"""Beside the formats' names: what the chat template shows; none at all."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How one model writes its answers."""

    marks: Marks  # what the readers below need to see of the model's tokens
    tools: ToolFormat | None = None
    tags: Tags | None = None  # of its thoughts, as the prompt has them

    def is_thinking(self, prompt: str, begun: str | None = None) -> bool | None:
        """Where the answer to a prompt that ends so begins, or goes on that has `begun` so: in thoughts, or
        (False) behind them. None: the model may begin some."""
        if self.tags is None:
            return False
        if begun is not None:
            return reasoning.is_open_in(begun, self.tags)
        return reasoning.state_of(prompt, self.tags)

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        required: bool,
        many: bool,
        is_thinking: bool | None,
        content: str | None,
    ) -> str:
        """Of an answer that calls functions as is asked; `content`: of what it says if it calls none."""
        calls = self.tools.grammar(functions, many=many) if self.tools and functions else None
        thoughts = NO_THOUGHTS
        if self.tags:
            open, close = map(self.marks.grammar, self.tags)
            thoughts = thoughts_between(open, close, is_open=is_thinking)
        return answer_grammar(thoughts, calls, required=required, content=content)


def answer_format(
    tokenizer: Tokenizer, template: str, *, tool_format: str = AUTO, reasoning_format: str = AUTO
) -> AnswerFormat:
    """The format of a model with this chat template; the other two name it, or are AUTO or NONE."""
    tools = formats.FORMATS.get((formats.detect(template) if tool_format == AUTO else tool_format) or NONE)
    thinks = reasoning.detect(template) if reasoning_format == AUTO else reasoning_format
    tags = reasoning.FORMATS.get(thinks or NONE)
    marks = Marks(tokenizer, (*(tools.MARKS if tools else ()), *(tags or ())))
    return AnswerFormat(marks, tools(marks) if tools else None, tags)


class AnswerReader:
    """Reads one answer. `names`: the functions that it may call; `is_thinking`: its prompt has opened the
    tags of its thoughts, or (False) closed them."""

    def __init__(
        self, format: AnswerFormat, names: Collection[str] = (), is_thinking: bool | None = None
    ) -> None:
        self._out = out = Output(names)
        tools, tags = format.tools, format.tags
        self._calls = Reading(lambda reader: tools.read(reader, out)) if tools and names else None
        self.thoughts: Thoughts | None = None  # if it may have any
        self._thinking: Reading | None = None
        if tags is not None and is_thinking is not False:
            spelled = Tags(*map(format.marks.spell, tags))
            content = self._calls.feed if self._calls else out.plain
            thoughts = Thoughts(spelled, is_open=bool(is_thinking), reasoning=out.reasoning, content=content)
            self.thoughts, self._thinking = thoughts, Reading(thoughts.read)

    @property
    def has_thought(self) -> bool:
        return self.thoughts is not None and self.thoughts.has_begun

    @property
    def num_calls(self) -> int:
        return self._out.num_calls

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        if self._thinking is not None:
            self._thinking.feed(text)
        elif self._calls is not None:
            self._calls.feed(text)
        else:
            return self._out.only(text)
        return self._out.take()

    def end(self) -> list[Event]:
        """What was held back for what might have followed."""
        if self._thinking is not None:
            self._thinking.end()
        if self._calls is not None:
            self._calls.end()
        self._out.end()
        return self._out.take()

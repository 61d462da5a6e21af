"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's requests, and the chats that they are.

What a field has no place for in a chat is in anthropic_fields.py, with the reason."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gateway.protocol import anthropic_fields, bounds
from gateway.protocol.anthropic_messages import Text, Turns, as_chat
from gateway.protocol.chat import THINKING_SWITCHES
from gateway.protocol.common import GenerationParams, InvalidField, ModelName, RequestPart
from gateway.protocol.messages import ChatMessage
from gateway.protocol.structured import Shape, json_shape
from gateway.protocol.tools import FunctionDefinition, ToolUse, chosen

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class CustomTool(RequestPart):
    rules = anthropic_fields.TOOL

    type: Literal["custom"] | None = None
    name: _Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


def _only_custom(value: object) -> object:
    """Tools of the server's are refused with a message of their own."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise ValueError(
            f"only tools of type 'custom' are supported, which the client runs, not {kind[:40]!r}"
        )
    return value


_Tool = Annotated[CustomTool, BeforeValidator(_only_custom)]


class CustomToolChoice(RequestPart):
    type: Literal["auto", "any", "tool", "none"]
    name: _Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestPart):
    """`enabled`: think; `adaptive`: if the model wants to. Thoughts are shown whole, or not at all."""

    rules = anthropic_fields.THINKING

    type: Literal["enabled", "disabled", "adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(RequestPart):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestPart):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(RequestPart):
    """What makes a prompt. As a chat: gateway/routes/chat_start.py, ChatRequest."""

    rules = anthropic_fields.COUNT

    model: ModelName
    turns: Annotated[Turns, Field(alias="messages")]
    system: Text | None = None
    tools: Annotated[list[_Tool], Field(max_length=bounds.MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: CustomToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        choice = self.tool_choice
        if choice is not None and choice.type != "none" and not self.tools:
            raise InvalidField("tool_choice", "'tool_choice' is only allowed when 'tools' are specified.")
        if choice is not None and (choice.name is None) == (choice.type == "tool"):
            raise InvalidField(
                "tool_choice.name", "'tool_choice.name' belongs to a choice of type 'tool', and only there."
            )
        if self.continue_final_message and self.turns[-1].content[-1:]:
            last = self.turns[-1].content[-1].type
            if last != "text":
                raise InvalidField(
                    "messages",
                    f"A last message of the assistant's is gone on with: it cannot end in {last!r}.",
                )
        return self

    @property
    def add_generation_prompt(self) -> None:
        """It follows from the last message."""

    @property
    def prompt_cache_key(self) -> None:
        """There is none."""

    @cached_property
    def messages(self) -> list[ChatMessage]:
        return as_chat(self.system or (), self.turns)

    @property
    def shows_thoughts(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    @property
    def continue_final_message(self) -> bool:
        """The answer goes on where the last message ends."""
        return self.turns[-1].role == "assistant"

    def tool_use(self) -> ToolUse:
        """Raises InvalidField."""
        choice = self.tool_choice
        if not self.tools or choice is None:
            return chosen(ToolUse(self._functions()), "auto", None)
        mode = {"any": "required", "tool": "required"}.get(choice.type, choice.type)
        use = ToolUse(self._functions(), is_parallel=not choice.disable_parallel_tool_use)
        return chosen(use, mode, None if choice.name is None else [choice.name])

    def _functions(self) -> tuple[FunctionDefinition, ...]:
        return tuple(
            FunctionDefinition.model_construct(
                name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
            )
            for tool in self.tools or ()
        )

    def shape(self) -> Shape | None:
        """Raises InvalidField."""
        if self.output_config is None or self.output_config.format is None:
            return None
        return json_shape(self.output_config.format.json_schema, "output_config.format.schema")

    def template_variables(self, known: frozenset[str]) -> dict[str, Any]:
        """What the template is told beside messages and tools; `known`: the variables that it reads.

        Raises InvalidField if it knows of no effort that was asked for."""
        told: dict[str, Any] = {}
        if self.thinking is not None:
            is_on = self.thinking.type != "disabled"
            told = {name: is_on for name in THINKING_SWITCHES if name in known}
        effort = self.output_config.effort if self.output_config is not None else None
        if effort is not None and "reasoning_effort" in known:
            told["reasoning_effort"] = effort
        elif effort not in (None, "high"):  # which is what is done without one
            raise InvalidField(
                "output_config.effort",
                "This model's chat template knows of no effort: leave 'output_config.effort' out, or send"
                " 'high'.",
            )
        return told

    def check_thinking(self, known: frozenset[str], *, has_thoughts: bool) -> None:
        """That the model can do as it is told; `has_thoughts`: it writes some. Raises InvalidField."""
        wanted = self.thinking.type if self.thinking is not None else None
        has_switch = not known.isdisjoint(THINKING_SWITCHES)
        if wanted == "enabled" and not has_thoughts:
            raise InvalidField(
                "thinking",
                "This model does not think before it answers: leave 'thinking' out, or send 'adaptive' or"
                " 'disabled'.",
            )
        if wanted == "disabled" and has_thoughts and not has_switch:
            raise InvalidField(
                "thinking",
                "This model's chat template has no switch for its thoughts: leave 'thinking' out, or send"
                " 'adaptive'.",
            )


class MessagesRequest(CountTokensRequest):
    """Where more is asked for than fits into the model's context, the answer ends there."""

    rules = anthropic_fields.CREATE

    max_tokens: Annotated[int, Field(ge=bounds.MAX_TOKENS.min, le=bounds.MAX_TOKENS.max)]
    stream: bool | None = None
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=bounds.MAX_STOP_CHARS)]],
            Field(max_length=bounds.MAX_STOP_SEQUENCES, fail_fast=True),
        ]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=bounds.TEMPERATURE.min, le=bounds.TEMPERATURE.max)] | None = None
    top_p: Annotated[float, Field(ge=bounds.TOP_P.min, le=bounds.TOP_P.max)] | None = None
    top_k: Annotated[int, Field(ge=bounds.TOP_K.min, le=bounds.TOP_K.max)] | None = None

    def params(self) -> GenerationParams:
        return GenerationParams(
            max_tokens=self.max_tokens,
            is_max_tokens_default=True,
            stop=tuple(self.stop_sequences or ()),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
        )

"""POST /v1/chat/completions: the request."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gateway.protocol import bounds, fields
from gateway.protocol.common import GenerationParams, InvalidField
from gateway.protocol.messages import Messages
from gateway.protocol.structured import StructuredRequest
from gateway.protocol.tools import FunctionChoice, Functions, ToolChoice, Tools, ToolUse, use_of_tools

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TemplateVariables = Annotated[dict[str, Any], Field(max_length=bounds.MAX_TEMPLATE_VARIABLES)]
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates that know of no effort let a model think or not."""

_NEVER_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatCompletionRequest(StructuredRequest):
    rules = fields.CHAT

    messages: Messages
    max_completion_tokens: (
        Annotated[int, Field(ge=bounds.MAX_TOKENS.min, le=bounds.MAX_TOKENS.max)] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=bounds.TOP_LOGPROBS.min, le=bounds.TOP_LOGPROBS.max)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None
    reasoning_effort: Effort | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1_024)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if reserved := _NEVER_VARIABLES & (self.chat_template_kwargs or {}).keys():
            raise InvalidField(
                "chat_template_kwargs",
                f"'chat_template_kwargs' cannot set '{min(reserved)}'",
            )
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidField(
                    "continue_final_message",
                    "'continue_final_message' goes on with the last message, 'add_generation_prompt' begins a"
                    " new one: set one of them",
                )
            last = self.messages[-1]
            if last.role != "assistant" or last.calls or last.written is None:
                raise InvalidField(
                    "continue_final_message",
                    "'continue_final_message' needs a last message of the assistant's: text, without calls",
                )
        return self

    def params(self) -> GenerationParams:
        """Raises InvalidField."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens not in (None, max_tokens):
            raise InvalidField(
                "max_tokens", "'max_tokens' is the older name of 'max_completion_tokens': give one of them"
            )
        return self._params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)

    def tool_use(self) -> ToolUse:
        """Raises InvalidField."""
        return use_of_tools(
            self.tools, self.tool_choice, self.functions, self.function_call, self.parallel_tool_calls
        )

    def template_variables(self, known: frozenset[str]) -> dict[str, Any]:
        """What the template is told beside messages and tools; `known`: the variables that it reads.

        Raises InvalidField if it knows of no effort, and of no thinking that could be switched."""
        told = effort_variables(self.reasoning_effort, known, "reasoning_effort")
        return told | (self.chat_template_kwargs or {})


def effort_variables(effort: Effort | None, known: frozenset[str], param: str) -> dict[str, Any]:
    """An effort as the template that reads these variables knows it. Raises InvalidField, naming `param`."""
    if effort is None:
        return {}
    told: dict[str, Any] = {name: effort != "none" for name in THINKING_SWITCHES if name in known}
    if "reasoning_effort" in known:
        told["reasoning_effort"] = effort
    if not told and effort != "none":
        raise InvalidField(
            param,
            "This model's chat template knows of no reasoning effort: leave it out, or send 'none'.",
        )
    return told

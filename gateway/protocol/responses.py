"""POST /v1/responses: the request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gateway.protocol import bounds, responses_fields
from gateway.protocol.chat import Effort, effort_variables
from gateway.protocol.common import GenerationParams, InvalidField, RequestPart, SampledRequest
from gateway.protocol.messages import ChatMessage
from gateway.protocol.responses_items import Items
from gateway.protocol.responses_tools import Choice, Tools, use_of_tools
from gateway.protocol.structured import ANY_OBJECT, Shape
from gateway.protocol.tools import ToolUse

LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",  # thoughts come in plain text, and are taken back so
    "file_search_call.results",  # these are of items that no response here has
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
MAX_LABELS = 16


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    if any(len(name) > 64 or len(value) > 512 for name, value in labels.items()):
        raise ValueError("keys have at most 64 characters, values at most 512")
    return labels


Labels = Annotated[dict[str, str], Field(max_length=MAX_LABELS), AfterValidator(_check_labels)]


class StreamOptions(RequestPart):
    rules = responses_fields.STREAM_OPTIONS


class PromptCacheOptions(RequestPart):
    rules = responses_fields.PROMPT_CACHE_OPTIONS


class Reasoning(RequestPart):
    rules = responses_fields.REASONING

    effort: Effort | None = None


class TextFormat(RequestPart):
    """`strict` or not, the answer follows the schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: Annotated[str, Field(max_length=bounds.MAX_SHAPE_CHARS)] | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_a_schema_if_it_needs_one(self) -> Self:
        for name, value in (("name", self.name), ("schema", self.json_schema)):
            param = f"text.format.{name}"
            if self.type == "json_schema" and value is None:
                raise InvalidField(param, f"Missing required parameter: '{param}'.")
            if self.type != "json_schema" and value is not None:
                raise InvalidField(param, f"'{param}' is only allowed with the type 'json_schema'")
        return self

    def shape(self) -> Shape | None:
        if self.json_schema is not None:
            return Shape("json_schema", _bounded(json.dumps(self.json_schema)), "text.format.schema")
        return Shape("json_schema", ANY_OBJECT, "text.format") if self.type == "json_object" else None


def _bounded(schema: str) -> str:
    if len(schema) > bounds.MAX_SHAPE_CHARS:
        most = bounds.MAX_SHAPE_CHARS
        message = f"'text.format.schema' has {len(schema)} characters of JSON; at most {most} are allowed"
        raise InvalidField("text.format.schema", message)
    return schema


class TextConfig(RequestPart):
    rules = responses_fields.TEXT

    format: TextFormat | None = None


class ResponseRequest(SampledRequest):
    rules = responses_fields.RESPONSES

    input: Items | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=bounds.MAX_LABEL_CHARS)] | None = None
    store: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=bounds.MAX_TOKENS.max)] | None = None
    top_logprobs: Annotated[int, Field(ge=bounds.TOP_LOGPROBS.min, le=bounds.TOP_LOGPROBS.max)] | None = None
    include: Annotated[list[Include], Field(max_length=64, fail_fast=True)] | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: Labels | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1_024)] | None = None
    prompt_cache_options: PromptCacheOptions | None = None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.input is None and self.previous_response_id is None:
            raise InvalidField("input", "Missing required parameter: 'input'.")
        if self.stream_options is not None and not self.stream:
            raise InvalidField("stream_options", "'stream_options' is only allowed when 'stream' is true")
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidField(
                "top_logprobs", f"'top_logprobs' is only allowed when 'include' has '{LOGPROBS}'"
            )
        return self

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


@dataclass(frozen=True, slots=True)
class ResponseChat:
    """The chat that a request goes on with: a ChatRequest (routes/chat_start.py)."""

    body: ResponseRequest
    messages: Sequence[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def model(self) -> str:
        return self.body.model

    @property
    def prompt_cache_key(self) -> str | None:
        return self.body.prompt_cache_key

    def params(self) -> GenerationParams:
        body = self.body
        return body.sampling(body.max_output_tokens, body.top_logprobs or 0 if body.has_logprobs else None)

    def shape(self) -> Shape | None:
        """Raises InvalidField."""
        format = self.body.text and self.body.text.format
        return format.shape() if format else None

    def tool_use(self) -> ToolUse:
        """Raises InvalidField."""
        return use_of_tools(self.body.tools, self.body.tool_choice, self.body.parallel_tool_calls)

    def template_variables(self, known: frozenset[str]) -> dict[str, Any]:
        """Raises InvalidField if the template knows of no effort."""
        effort = self.body.reasoning and self.body.reasoning.effort
        return effort_variables(effort or None, known, "reasoning.effort")

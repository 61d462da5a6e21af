"""What a text must look like, as clients ask for it: OpenAI's response_format, and vLLM's structured_outputs
and its older guided_* fields. Each becomes a `Shape`; whether it can be followed, gateway/grammar.py tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gateway.protocol import bounds, fields
from gateway.protocol.common import GenerationRequest, InvalidField, RequestPart, require_free_end
from gateway.protocol.json_body import MalformedBody, parse_object


@dataclass(frozen=True, slots=True)
class Shape:
    """`source` is what was asked, as text: JSON, where it is a schema or a list. `param` names the field."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    source: str
    param: str


ANY_OBJECT = '{"type": "object"}'


def _as_object(value: object) -> object:
    """vLLM takes a schema as text, too."""
    if not isinstance(value, str):
        return value
    try:
        return parse_object(value.encode())
    except MalformedBody as error:
        raise ValueError(str(error).replace("The body", "the schema", 1)) from error


JsonSchema = Annotated[
    dict[str, Any], BeforeValidator(_as_object, json_schema_input_type=dict[str, Any] | str)
]
Text = Annotated[str, Field(min_length=1, max_length=bounds.MAX_SHAPE_CHARS)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=bounds.MAX_SHAPE_CHOICES, fail_fast=True)]


class JsonSchemaFormat(RequestPart):
    """`strict` or not, the answer follows the schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=bounds.MAX_SHAPE_CHARS)] | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(RequestPart):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_a_schema_if_it_needs_one(self) -> Self:
        param = "response_format.json_schema"
        if self.type == "json_schema" and self.json_schema is None:
            raise InvalidField(param, f"Missing required parameter: '{param}'.")
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidField(param, f"'{param}' is only allowed with the type 'json_schema'")
        return self

    def shapes(self) -> Iterator[Shape]:
        if self.json_schema is not None:
            yield json_shape(self.json_schema.json_schema, "response_format.json_schema.schema")
        elif self.type == "json_object":
            yield Shape("json_schema", ANY_OBJECT, "response_format")


class StructuredOutputs(RequestPart):
    rules = fields.STRUCTURED_OUTPUTS

    as_json: Annotated[JsonSchema | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not list(self.shapes()):
            raise InvalidField(
                "structured_outputs",
                "'structured_outputs' needs one of json, regex, choice, grammar and json_object",
            )
        return self

    def shapes(self) -> Iterator[Shape]:
        yield from _shapes("structured_outputs.", self.as_json, self.regex, self.choice, self.grammar)
        if self.json_object:
            yield Shape("json_schema", ANY_OBJECT, "structured_outputs.json_object")


class StructuredRequest(GenerationRequest):
    """A request that may say what its answer must look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    def shape(self) -> Shape | None:
        """None: like anything. Raises InvalidField."""
        shapes = list(self._shapes())
        if len(shapes) > 1:
            first, second = shapes[0].param, shapes[1].param
            raise InvalidField(
                second, f"'{first}' and '{second}' both say what the answer must look like: give one of them"
            )
        if shapes:
            require_free_end(self.ignore_eos, self.min_tokens, f"'{shapes[0].param}'")
        return shapes[0] if shapes else None

    def _shapes(self) -> Iterator[Shape]:
        if self.response_format is not None:
            yield from self.response_format.shapes()
        if self.structured_outputs is not None:
            yield from self.structured_outputs.shapes()
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        yield from _shapes("guided_", *guided)


def _shapes(
    prefix: str,
    schema: dict[str, Any] | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> Iterator[Shape]:
    if schema is not None:
        yield json_shape(schema, f"{prefix}json")
    if regex is not None:
        yield Shape("regex", regex, f"{prefix}regex")
    if choice is not None:
        yield Shape("choice", _bounded(json.dumps(choice), f"{prefix}choice"), f"{prefix}choice")
    if grammar is not None:
        yield Shape("grammar", grammar, f"{prefix}grammar")


def json_shape(schema: dict[str, Any], param: str) -> Shape:
    """JSON of a schema that `param` has. Raises InvalidField if it is too large."""
    return Shape("json_schema", _bounded(json.dumps(schema), param), param)


def _bounded(source: str, param: str) -> str:
    if len(source) > bounds.MAX_SHAPE_CHARS:
        most = bounds.MAX_SHAPE_CHARS
        raise InvalidField(
            param, f"'{param}' has {len(source)} characters of JSON; at most {most} are allowed"
        )
    return source

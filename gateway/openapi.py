"""The OpenAPI document: every route of the API, what it takes, what it answers and which errors it has.

Read from the types that requests are checked by and responses are written from, and from the table of errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Literal, get_args

import msgspec

from gateway.anthropic_errors import AnthropicError
from gateway.errors import ROWS, Error
from gateway.protocol.anthropic import CountTokensRequest, MessagesRequest
from gateway.protocol.anthropic_response import Message, MessageEvent, TokensCount
from gateway.protocol.capabilities import Capabilities
from gateway.protocol.chat import ChatCompletionRequest
from gateway.protocol.chat_response import ChatChunk, ChatCompletion
from gateway.protocol.common import RequestPart
from gateway.protocol.completions import Completion, CompletionRequest
from gateway.protocol.embeddings import Embeddings, EmbeddingsRequest
from gateway.protocol.json_schema import JsonSchema, reference, schemas_of
from gateway.protocol.models import Model, ModelList
from gateway.protocol.responses import ResponseRequest
from gateway.protocol.responses_events import RESPONSE_EVENTS
from gateway.protocol.responses_object import ItemList, ResponseDeleted, ResponseObject
from gateway.protocol.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from gateway.routes.ops import Health

_OF_ANY = (400, 403, 408, 431, 500, 503)
"""What can be wrong with any request: it is no HTTP, it comes from another's web page, too slowly or with too
large headers, or the server has an error or too many connections."""
_OF_KEYS = (401,)
_OF_BODIES = (404, 413, 429, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    path: str
    summary: str
    response: type[msgspec.Struct] | None  # None: `media_type`, of any shape
    request: type[RequestPart] | None = None
    chunks: tuple[type[msgspec.Struct], ...] = ()  # the data of a stream's events
    has_done: bool = True  # that is the data of its last one
    error: type[msgspec.Struct] = Error
    example: dict[str, Any] | None = None  # of a request, but for the model's name
    parameters: tuple[JsonSchema, ...] = ()
    errors: tuple[int, ...] = ()  # beside those of any request, of keys and of bodies
    media_type: str = "application/json"
    is_open: bool = False  # needs no key
    tag: Literal["generation", "tokens", "models", "operations"]

    deletes: bool = False

    @property
    def method(self) -> str:
        if self.request is not None:
            return "post"
        return "delete" if self.deletes else "get"

    @property
    def statuses(self) -> tuple[int, ...]:
        """The errors that it can end with."""
        keys = () if self.is_open else _OF_KEYS
        bodies = _OF_BODIES if self.request is not None else ()
        return tuple(sorted({*_OF_ANY, *keys, *bodies, *self.errors}))


def _parameter(name: str, place: Literal["path", "query"], description: str) -> JsonSchema:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": {"type": "string", "minLength": 1},
    }


_RESPONSE_ID = _parameter("id", "path", "A response's id")
_HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}
OPERATIONS = (
    Operation(
        path="/v1/chat/completions",
        summary="The next message of a chat, whole or as a stream",
        request=ChatCompletionRequest,
        response=ChatCompletion,
        chunks=(ChatChunk,),
        example=_HELLO,
        tag="generation",
    ),
    Operation(
        path="/v1/completions",
        summary="How a text goes on, whole or as a stream",
        request=CompletionRequest,
        response=Completion,
        chunks=(Completion,),
        example={"prompt": "Sluice is", "max_tokens": 16},
        tag="generation",
    ),
    Operation(
        path="/v1/responses",
        summary="What a model answers to items, whole or as a stream",
        request=ResponseRequest,
        response=ResponseObject,
        chunks=RESPONSE_EVENTS,
        has_done=False,
        example={"input": "Hello!", "max_output_tokens": 16},
        tag="generation",
    ),
    Operation(
        path="/v1/responses/{id}",
        summary="A response that is stored",
        response=ResponseObject,
        parameters=(_RESPONSE_ID,),
        errors=(404,),
        tag="generation",
    ),
    Operation(
        path="/v1/responses/{id}",
        summary="Delete a response that is stored",
        response=ResponseDeleted,
        deletes=True,
        parameters=(_RESPONSE_ID,),
        errors=(404,),
        tag="generation",
    ),
    Operation(
        path="/v1/responses/{id}/input_items",
        summary="The items that a stored response was asked with, those of earlier ones included",
        response=ItemList,
        parameters=(
            _RESPONSE_ID,
            _parameter("after", "query", "The last id of the page before"),
            _parameter("limit", "query", "From 1 to 100; 20"),
            _parameter("order", "query", "asc, or desc: newest first"),
        ),
        errors=(404,),
        tag="generation",
    ),
    Operation(
        path="/v1/messages",
        summary="The next message of a chat, as Anthropic has it, whole or as a stream",
        request=MessagesRequest,
        response=Message,
        chunks=get_args(MessageEvent),
        has_done=False,
        error=AnthropicError,
        example=_HELLO,
        tag="generation",
    ),
    Operation(
        path="/v1/messages/count_tokens",
        summary="The number of tokens of a chat's prompt, as Anthropic has it",
        request=CountTokensRequest,
        response=TokensCount,
        error=AnthropicError,
        example={"messages": _HELLO["messages"]},
        tag="tokens",
    ),
    Operation(
        path="/v1/embeddings",
        summary="A vector for each text, of models that are configured to serve them",
        request=EmbeddingsRequest,
        response=Embeddings,
        example={"input": "Hello!"},
        tag="generation",
    ),
    *(
        Operation(
            path=f"{prefix}/tokenize",
            summary="The tokens of a text, or of a chat's prompt",
            request=TokenizeRequest,
            response=Tokenized,
            example={"prompt": "Hello!"},
            tag="tokens",
        )
        for prefix in ("", "/v1")
    ),
    *(
        Operation(
            path=f"{prefix}/detokenize",
            summary="The text of tokens",
            request=DetokenizeRequest,
            response=Detokenized,
            example={"tokens": [20, 21]},
            tag="tokens",
        )
        for prefix in ("", "/v1")
    ),
    Operation(
        path="/tokenizer_info",
        summary="The model's tokenizer_config.json, with the chat template that is used",
        response=None,
        parameters=(_parameter("model", "query", "Needed where several are served"),),
        errors=(404,),
        tag="tokens",
    ),
    Operation(path="/v1/models", summary="The models that are served", response=ModelList, tag="models"),
    Operation(
        path="/v1/models/{id}",
        summary="One model",
        response=Model,
        parameters=(_parameter("id", "path", "A model's name, whose slashes may be written as they are"),),
        errors=(404,),
        tag="models",
    ),
    Operation(
        path="/v1/capabilities",
        summary="What becomes of every field of every endpoint",
        response=Capabilities,
        tag="models",
    ),
    Operation(path="/openapi.json", summary="This document", response=None, tag="operations"),
    Operation(path="/livez", summary="The process answers", response=Health, is_open=True, tag="operations"),
    Operation(
        path="/readyz",
        summary="Every model has a ready group; 503 until then, and while the server ends",
        response=Health,
        is_open=True,
        tag="operations",
    ),
    Operation(
        path="/health", summary="As /readyz; without keys with reasons", response=Health, tag="operations"
    ),
    Operation(
        path="/metrics",
        summary="Metrics for Prometheus",
        response=None,
        media_type="text/plain",
        tag="operations",
    ),
)
_TELLS_WHILE_LOADING = ("/readyz", "/health")


@cache
def document(models: tuple[str, ...], has_keys: bool) -> bytes:
    """As JSON, for a server of these models."""
    return msgspec.json.encode(_document(models, has_keys))


def _document(models: Sequence[str], has_keys: bool) -> JsonSchema:
    requests = dict.fromkeys(operation.request for operation in OPERATIONS if operation.request)
    responses = dict.fromkeys(struct for operation in OPERATIONS for struct in _answers(operation))
    references, components = schemas_of(list(requests), list(responses))
    for request in requests:
        components[request.__name__]["properties"]["model"] = _name_of_model(request, models)
    paths: dict[str, JsonSchema] = {}
    for operation in OPERATIONS:
        described = _described(operation, references, models[0])
        paths.setdefault(operation.path, {})[operation.method] = described
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "Sluice",
            "version": version("sluice"),
            "summary": "A gateway for language models, compatible with OpenAI's API",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"header": []}] if has_keys else [],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {_name(status): _error(status) for status in sorted(_all_statuses())},
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _answers(operation: Operation) -> Iterator[type[msgspec.Struct]]:
    if operation.response is not None:
        yield operation.response
    yield from (*operation.chunks, operation.error)


def _name_of_model(request: type[RequestPart], models: Sequence[str]) -> JsonSchema:
    """One of those that are served here."""
    name: JsonSchema = {"type": "string", "enum": list(models)}
    is_required = request.model_fields["model"].is_required()
    return name if is_required else {"anyOf": [name, {"type": "null"}]}


def _described(operation: Operation, references: dict[type, JsonSchema], model: str) -> JsonSchema:
    described: JsonSchema = {
        "operationId": _operation_id(operation),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": _success(operation, references),
            **{str(status): _failure(operation, status) for status in operation.statuses},
        },
    }
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.is_open:
        described["security"] = []
    if operation.request is not None:
        content = {
            "schema": references[operation.request],
            "example": {"model": model, **(operation.example or {})},
        }
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.path in _TELLS_WHILE_LOADING:
        either = {"anyOf": [references[Health], reference("Error")]}
        described["responses"]["503"] = _response("Not ready", {"application/json": {"schema": either}})
    return described


def _operation_id(operation: Operation) -> str:
    """get_v1_models_id"""
    return "_".join([operation.method, *re.findall(r"\w+", operation.path)])


def _success(operation: Operation, references: dict[type, JsonSchema]) -> JsonSchema:
    schema = {} if operation.response is None else references[operation.response]
    if operation.media_type != "application/json":
        schema = {"type": "string"}
    elif operation.response is None:
        schema = {"type": "object"}
    content: JsonSchema = {operation.media_type: {"schema": schema}}
    if operation.chunks:
        content["text/event-stream"] = {"itemSchema": _event(operation, references)}
    return _response("OK", content)


def _event(operation: Operation, references: dict[type, JsonSchema]) -> JsonSchema:
    """Of a stream: a chunk, an error, after which the stream ends, or its regular end."""
    content = {"anyOf": [references[kind] for kind in (*operation.chunks, operation.error)]}
    ends = [{"const": "[DONE]"}] if operation.has_done else []
    data = {
        "type": "string",
        "anyOf": [*ends, {"contentMediaType": "application/json", "contentSchema": content}],
    }
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


_RESPONSES = "#/components/responses/"
_HEADERS: JsonSchema = {
    "x-request-id": {"description": "The caller's own, or a new one", "schema": {"type": "string"}},
    "openai-processing-ms": {"description": "Until the answer began", "schema": {"type": "string"}},
    "retry-after": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}},
}


def _response(description: str, content: JsonSchema, *headers: str) -> JsonSchema:
    names = ("x-request-id", *headers)
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": content,
    }


def _all_statuses() -> set[int]:
    return {status for operation in OPERATIONS for status in operation.statuses}


def _name(status: int) -> str:
    """RequestTimeout"""
    return HTTPStatus(status).phrase.title().replace(" ", "")


def _failure(operation: Operation, status: int) -> JsonSchema:
    if operation.error is Error:
        return {"$ref": _RESPONSES + _name(status)}
    return _error(status, operation.error)


def _error(status: int, kind: type[msgspec.Struct] = Error) -> JsonSchema:
    """With the codes that it can have. What is wrong with any request may be told in OpenAI's words: nobody
    has looked at its path then."""
    kinds: dict[type[msgspec.Struct], None] = dict.fromkeys((kind, Error) if status in _OF_ANY else (kind,))
    schemas = [reference(one.__name__) for one in kinds]
    rows = [row for row in ROWS if row.status == status]
    codes = ", ".join(sorted({row.code for row in rows if row.code is not None}))
    phrase = HTTPStatus(status).phrase
    headers = ["retry-after"] if any(row.retry_after for row in rows) else []
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    content = {"application/json": {"schema": schema}}
    return _response(f"{phrase}: {codes}" if codes else phrase, content, *headers)

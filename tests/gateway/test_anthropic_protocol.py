"""Anthropic's requests: each field of its SDK's types is decided, each mistake is an error that names it."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from anthropic.types import (
    ContentBlockParam,
    ToolUnionParam,
    message_count_tokens_params,
    message_create_params,
)
from anthropic.types import stop_reason as sdk_stop_reason
from anthropic.types.beta import message_create_params as beta_params
from anthropic.types.shared import ErrorResponse
from pydantic import ValidationError
from typing_extensions import get_type_hints, is_typeddict

from gateway.anthropic_errors import anthropic_body
from gateway.errors import TABLE, APIError, ErrorObject, Row, to_api_error
from gateway.protocol import anthropic_fields, bounds
from gateway.protocol.anthropic import CountTokensRequest, MessagesRequest
from gateway.protocol.anthropic_response import StopReason
from gateway.protocol.common import parse_body
from tests.gateway.test_capabilities import undecided

BASE: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
KINDS = {
    "messages[].content[]": {"text", "thinking", "tool_use", "tool_result"},
    "messages[].content[].content[]": {"text"},
    "thinking": {"enabled", "disabled", "adaptive"},
    "tools[]": {"custom"},
}
"""Where an object's type says what it is: those that are supported. The others are refused by their type."""
PARAMS = {
    "/v1/messages": message_create_params.MessageCreateParamsStreaming,
    "/v1/messages/count_tokens": message_count_tokens_params.MessageCountTokensParams,
}


def options(hint: Any) -> Iterator[tuple[Any, str]]:
    """The types that a hint stands for, "[]" behind those in a list."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in inner:
            yield from options(option)
    elif inner and isinstance(origin, type) and not issubclass(origin, dict) and hasattr(origin, "__iter__"):
        yield from ((found, f"[]{suffix}") for found, suffix in options(inner[0]))
    else:
        yield hint, ""


def kind_of(typed: type) -> str | None:
    """What the type's `type` must be."""
    hint = get_type_hints(typed).get("type")
    literals = [option for option, _ in options(hint) if get_origin(option) is Literal] if hint else []
    return get_args(literals[0])[0] if literals else None


def paths(typed: type, place: str = "") -> Iterator[str]:
    """Every field of a TypedDict and of those in it, but for objects of kinds that are refused."""
    for name, hint in get_type_hints(typed).items():
        field = f"{place}.{name}".lstrip(".")
        yield field
        for option, suffix in options(hint):
            inner = field + suffix
            if is_typeddict(option) and kind_of(option) in KINDS.get(inner, {kind_of(option)}):
                yield from paths(option, inner)


@pytest.mark.parametrize("path", PARAMS)
def test_every_field_of_the_sdk_is_decided(path: str) -> None:
    found = set(paths(PARAMS[path]))
    nested = {"messages[].content[].cache_control.ttl", "tools[].input_schema", "output_config.format.schema"}
    assert nested <= found
    found -= {field for field in found if field.startswith("tools[].input_schema.")}  # any JSON schema
    assert undecided(path, found) == set()


def test_every_field_of_the_sdk_s_beta_is_decided() -> None:
    fields = set(get_type_hints(beta_params.MessageCreateParamsStreaming)) - {"betas"}  # a header
    assert "thread" in fields
    assert undecided("/v1/messages", fields) == set()


def kinds_of(union: Any) -> set[str]:
    return {kind_of(option) or "custom" for option, _ in options(union) if is_typeddict(option)}


def whole(model: type[CountTokensRequest], fields: dict[str, Any]) -> CountTokensRequest:
    """A request, with all that is read of it."""
    request = parse_body(json.dumps(BASE | fields).encode(), model)
    assert request.messages
    request.tool_use()
    request.shape()
    return request


def refusal(model: type[CountTokensRequest], fields: dict[str, Any]) -> str:
    """The message of the error that a body gets."""
    with pytest.raises((ValidationError, ValueError)) as caught:
        whole(model, fields)
    api_error = to_api_error(caught.value)
    assert api_error.status == 400
    return api_error.error.message


def test_every_other_kind_of_block_is_refused_by_name() -> None:
    found = kinds_of(ContentBlockParam)
    others = found - KINDS["messages[].content[]"]
    assert {"image", "document", "redacted_thinking", "server_tool_use", "search_result"} <= others
    for kind in others:
        message = refusal(MessagesRequest, {"messages": [{"role": "user", "content": [{"type": kind}]}]})
        assert repr(kind) in message
    for kind in ("image", "document", "search_result"):
        block = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": kind}]}
        message = refusal(MessagesRequest, {"messages": [{"role": "user", "content": [block]}]})
        assert repr(kind) in message
        assert "messages[0].content[0].content" in message


def test_every_other_kind_of_tool_is_refused_by_name() -> None:
    others = kinds_of(ToolUnionParam) - KINDS["tools[]"]
    assert len(others) > 10
    for kind in others:
        message = refusal(MessagesRequest, {"tools": [{"type": kind, "name": "x"}]})
        assert "only tools of type 'custom'" in message
        assert kind in message


def values_of(rules: dict[str, anthropic_fields.Rule]) -> Iterator[tuple[str, Any, bool]]:
    """Each field with a value, and whether it passes."""
    for name, rule in rules.items():
        yield name, None, True
        yield name, {"any": "thing"}, rule.status == "ignored"
        yield from ((name, value, True) for value in rule.no_op)


@pytest.mark.parametrize("model", [MessagesRequest, CountTokensRequest])
def test_what_is_refused_passes_only_where_it_asks_for_nothing(model: type[CountTokensRequest]) -> None:
    base = {name: BASE[name] for name in BASE if name in model.model_fields or name == "messages"}
    for name, value, passes in values_of(dict(model.rules)):
        body = json.dumps(base | {name: value}).encode()
        if passes:
            parse_body(body, model)
        else:
            with pytest.raises(ValueError, match=f"'{name}' is not supported"):
                parse_body(body, model)


TOOL = {"name": "f", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}
TEXT = {"type": "text", "text": "x"}


def turns(*contents: Any) -> dict[str, Any]:
    """Of user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": 1.5}, "'max_tokens'"),
        ({"messages": []}, "'messages'"),
        ({"brand_new": 1}, "brand_new"),
        ({"temperature": 3}, "'temperature'"),
        ({"stop_sequences": [""]}, "'stop_sequences[0]'"),
        ({"stop_sequences": ["x"] * (bounds.MAX_STOP_SEQUENCES + 1)}, "'stop_sequences'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        (turns([{"type": "text"}]), "'messages[0].content[0].text'"),
        (turns([TEXT | {"id": "a"}]), "'messages[0].content[0].id' is not allowed in a block of type 'text'"),
        (turns([USE]), "messages with role 'user' have no block of type 'tool_use'"),
        (turns("x", [RESULT]), "messages with role 'assistant' have no block of type 'tool_result'"),
        (turns("x", [{"type": "tool_use", "id": "a"}], "x"), "'messages[1].content[0].input'"),
        (turns("x", [USE]), "These have none: a"),
        (turns("x", [USE], "y"), "These have none: a"),
        (turns("x", [USE], [TEXT, RESULT]), "'tool_result' of 'a'"),
        (turns("x", [USE], [RESULT, RESULT]), "'tool_result' of 'a'"),
        (turns([RESULT]), "'tool_result' of 'a'"),
        (turns("x", [USE, USE], [RESULT]), "an 'id' of its own"),
        (turns("x", [{"type": "thinking", "thinking": "hm"}]), "cannot end in 'thinking'"),
        ({"system": [{"type": "image"}]}, "'system'"),
        ({"tool_choice": {"type": "auto"}}, "'tools' are specified"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "'tool_choice.name'"),
        ({"tools": [TOOL], "tool_choice": {"type": "any", "name": "f"}}, "'tool_choice.name'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "names the function 'g'"),
        ({"tools": [TOOL, TOOL]}, "two functions of one name"),
        ({"tools": [{"name": "f"}]}, "'tools[0].input_schema'"),
        ({"tools": [TOOL | {"name": "a b"}]}, "'tools[0].name'"),
        ({"thinking": {"type": "between_tools"}}, "'thinking.type'"),
        ({"thinking": {"type": "enabled", "display": "whole"}}, "'thinking.display'"),
        ({"output_config": {"effort": "minimal"}}, "'output_config.effort'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "'output_config.format.schema'"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"enum": ["x" * 300_000]}}}},
            "'output_config.format.schema' has 300",
        ),
    ],
)
def test_a_mistake_is_named(fields: dict[str, Any], part: str) -> None:
    assert part in refusal(MessagesRequest, fields)


def test_what_is_no_mistake() -> None:
    for fields in (
        turns("x", [TEXT, USE], [RESULT | {"content": []}, TEXT], [{"type": "thinking", "thinking": ""}], []),
        turns("x", ""),
        {"messages": [{"role": "system", "content": "s"}, *BASE["messages"]]},
        {"tools": [], "tool_choice": {"type": "none"}},
        {"tools": [TOOL | {"name": "n" * 128, "strict": True, "type": None}]},
        {"system": None, "stop_sequences": None, "thinking": None, "output_config": {"effort": "max"}},
    ):
        whole(MessagesRequest, fields)


def test_every_reason_to_stop_is_one_of_the_sdk_s() -> None:
    assert set(get_args(StopReason)) < set(get_args(sdk_stop_reason.StopReason))


@pytest.mark.parametrize(
    "row", {row.status: row for row in TABLE.values()}.values(), ids=lambda row: row.status
)
def test_every_error_is_of_the_sdk_s_types(row: Row) -> None:
    """But for 413, whose type is in the documentation only."""
    error = APIError(row.status, ErrorObject("words", row.type, None, row.code), {})
    body = json.loads(anthropic_body(error, "req_1"))
    if row.status == 413:
        assert body["error"]["type"] == "request_too_large"
    else:
        assert ErrorResponse.model_validate(body).to_dict() == body

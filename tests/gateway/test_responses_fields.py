"""Every field of the SDK's types for POST /v1/responses is decided, and its items and parts too."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
from openai.types.responses import (
    EasyInputMessageParam,
    FunctionToolParam,
    Response,
    ResponseFormatTextJSONSchemaConfigParam,
    ResponseFunctionToolCallParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputRefusalParam,
    ResponseOutputTextParam,
    ResponseReasoningItemParam,
    ResponseTextConfigParam,
    ToolChoiceAllowedParam,
    ToolChoiceFunctionParam,
    response_create_params,
    response_input_param,
)
from openai.types.responses.response_includable import ResponseIncludable
from openai.types.shared_params import Reasoning as ReasoningParam

from gateway.protocol import responses, responses_items, responses_tools
from gateway.protocol.common import RequestPart
from gateway.protocol.responses_events import RESPONSE_EVENTS
from gateway.protocol.responses_object import ResponseObject

create = response_create_params
PAIRS: list[tuple[type[RequestPart], list[Any]]] = [
    (responses.ResponseRequest, [create.ResponseCreateParamsStreaming]),
    (responses.StreamOptions, [create.StreamOptions]),
    (responses.PromptCacheOptions, [create.PromptCacheOptions]),
    (responses.Reasoning, [ReasoningParam]),
    (responses.TextConfig, [ResponseTextConfigParam]),
    (responses.TextFormat, [ResponseFormatTextJSONSchemaConfigParam]),
    (
        responses_items.Item,
        [
            EasyInputMessageParam,
            ResponseOutputMessageParam,
            ResponseFunctionToolCallParam,
            ResponseReasoningItemParam,
            response_input_param.Message,
            response_input_param.FunctionCallOutput,
            response_input_param.ItemReference,
        ],
    ),
    (
        responses_items.Part,
        [ResponseInputTextParam, ResponseOutputTextParam, ResponseOutputRefusalParam],
    ),
    (responses_tools.FunctionTool, [FunctionToolParam]),
    (responses_tools._Choice, [ToolChoiceFunctionParam, ToolChoiceAllowedParam]),
]


@pytest.mark.parametrize(("model", "params"), PAIRS)
def test_every_field_of_the_sdk_is_decided(model: type[RequestPart], params: list[Any]) -> None:
    names = {field.alias or name for name, field in model.model_fields.items()}
    asked = {name for param in params for name in get_type_hints(param)}
    assert asked
    assert asked - names - set(model.rules) == set()
    assert not names & set(model.rules)
    assert all(rule.why for rule in model.rules.values())


def test_every_includable_is_known() -> None:
    assert set(get_args(responses.Include)) == set(get_args(ResponseIncludable))


def test_a_response_has_no_field_of_our_own_but_one() -> None:
    fields = set(ResponseObject.__struct_fields__)
    assert fields - set(Response.model_fields) == {"store"}  # OpenAI sends it, and its types forget it


def test_every_event_has_a_name_of_its_own() -> None:
    kinds = [str(event.__struct_config__.tag) for event in RESPONSE_EVENTS]
    assert len(set(kinds)) == len(kinds) == 16

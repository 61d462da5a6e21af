"""Requests: every field has a rule, every number a bound, every mistake an error that names it."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from gateway.errors import to_api_error
from gateway.protocol import bounds, fields
from gateway.protocol.chat import ChatCompletionRequest
from gateway.protocol.common import InvalidField, RequestPart, parse_body
from gateway.protocol.completions import CompletionRequest
from gateway.protocol.embeddings import EmbeddingsRequest
from gateway.protocol.json_body import MalformedBody
from gateway.protocol.messages import for_template

CHAT: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, object] = {"model": "m", "prompt": "hi"}
Model = type[ChatCompletionRequest] | type[CompletionRequest]
MODELS: list[tuple[Model, dict[str, object]]] = [(ChatCompletionRequest, CHAT), (CompletionRequest, TEXT)]


def parse(model: Model, given: dict[str, object]) -> Any:
    return parse_body(json.dumps(given).encode(), model)


def refusal(model: Model, body: bytes | dict[str, object]) -> tuple[str | None, str]:
    """The param and the message of the error that a body gets."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises((MalformedBody, ValidationError, InvalidField)) as caught:
        parse_body(raw, model).params()
    api_error = to_api_error(caught.value)
    assert api_error.status == 400
    assert api_error.error.type == "invalid_request_error"
    return api_error.error.param, api_error.error.message


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (chat_create_params.CompletionCreateParamsStreaming, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
        (embedding_create_params.EmbeddingCreateParams, EmbeddingsRequest),
    ],
)
def test_every_field_of_the_sdk_has_a_rule(params: type, model: type[RequestPart]) -> None:
    known = set(model.model_fields) | set(model.rules)
    assert set(get_type_hints(params)) - known == set()


NESTED = [fields.MESSAGE, fields.TEXT_PART, fields.TOOL, fields.TOOL_CALL, fields.FUNCTION_CALL]


@pytest.mark.parametrize("rules", [fields.CHAT, fields.COMPLETIONS, fields.STREAM_OPTIONS, *NESTED])
def test_no_field_has_two_rules_and_every_rule_says_why(rules: dict[str, fields.Rule]) -> None:
    models = {id(model.rules): model for model in (ChatCompletionRequest, CompletionRequest)}
    model = models.get(id(rules))
    assert model is None or not set(rules) & set(model.model_fields)
    assert all(rule.why for rule in rules.values())
    assert all(rule.status == "refused" or not rule.no_op for rule in rules.values())


@pytest.mark.parametrize(("model", "base"), MODELS)
def test_refused_fields_pass_only_where_they_ask_for_nothing(model: Model, base: dict[str, object]) -> None:
    for name, rule in model.rules.items():
        parse(model, base | {name: None})
        if rule.status == "ignored":
            parse(model, base | {name: {"any": "thing"}})
            continue
        for value in rule.no_op:
            parse(model, base | {name: value})
        param, message = refusal(model, base | {name: {"some": "value"}})
        assert param == name
        assert rule.why in message


def test_true_is_not_one() -> None:
    assert refusal(CompletionRequest, TEXT | {"best_of": True})[0] == "best_of"
    assert refusal(CompletionRequest, TEXT | {"n": True})[0] == "n"


@pytest.mark.parametrize(("model", "base"), MODELS)
def test_unknown_fields_are_refused_as_openai_does(model: Model, base: dict[str, object]) -> None:
    expected = (None, "Unrecognized request argument supplied: temprature (did you mean 'temperature'?)")
    assert refusal(model, base | {"temprature": 1}) == expected


def test_nested_fields_have_rules_too() -> None:
    options = {"include_usage": True, "include_obfuscation": True, "continuous_usage_stats": True}
    request = parse(ChatCompletionRequest, CHAT | {"stream": True, "stream_options": options})
    assert request.include_usage
    assert request.continuous_usage
    unknown = CHAT | {"stream": True, "stream_options": {"x": 1}}
    message = "Unrecognized request argument supplied: x, in 'stream_options'"
    assert refusal(ChatCompletionRequest, unknown)[1] == message
    audio = {"role": "assistant", "content": "a", "audio": {"id": "1"}}
    assert "'audio' is not supported" in refusal(ChatCompletionRequest, CHAT | {"messages": [audio]})[1]


NUMBERS = {
    "temperature": bounds.TEMPERATURE,
    "top_p": bounds.TOP_P,
    "top_k": bounds.TOP_K,
    "min_p": bounds.MIN_P,
    "presence_penalty": bounds.PRESENCE_PENALTY,
    "frequency_penalty": bounds.FREQUENCY_PENALTY,
    "repetition_penalty": bounds.REPETITION_PENALTY,
    "seed": bounds.SEED,
    "n": bounds.N,
    "max_tokens": bounds.MAX_TOKENS,
    "min_tokens": bounds.MIN_TOKENS,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(("model", "base"), MODELS)
def test_numbers_are_bounded(model: Model, base: dict[str, object], name: str) -> None:
    low, high = NUMBERS[name]
    for inside in (low, high):
        parse(model, base | {name: inside})
    step = max(1, abs(high) // 1000)
    wrong: list[object] = [low - step, high + step, 10**30, -(10**30), "1", [1], {}, True]
    for outside in wrong:
        assert refusal(model, base | {name: outside})[0] == name
    for literal in (b"1e999", b"-1e999"):
        body = json.dumps(base | {name: "X"}).encode().replace(b'"X"', literal)
        assert refusal(model, body)[0] == name


def test_every_bound_is_tested_and_used() -> None:
    ranges = {name: value for name, value in vars(bounds).items() if isinstance(value, bounds.Range)}
    elsewhere = {"DIMENSIONS", "LOGIT_BIAS", "TOP_LOGPROBS", "TOKEN_ID", "BEST_OF", "TRUNCATE_PROMPT_TOKENS"}
    assert set(ranges) - {name.upper() for name in NUMBERS} == elsewhere
    assert all(low < high for low, high in ranges.values())


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(id): 1 for id in range(2_000)}}, "logit_bias"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["x" * 1_001]}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(100))}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name"),
    ],
)
def test_the_error_names_the_field(extra: dict[str, object], param: str) -> None:
    assert refusal(ChatCompletionRequest, CHAT | extra)[0] == param


def test_refusals_are_plain_sentences() -> None:
    assert refusal(ChatCompletionRequest, CHAT | {"store": True}) == (
        "store",
        "'store' is not supported: nothing is stored",
    )
    assert refusal(ChatCompletionRequest, CHAT | {"messages": []}) == (
        "messages",
        "Invalid value for 'messages': expected at least 1 item, not 0.",
    )
    assert refusal(ChatCompletionRequest, CHAT | {"stop": ["a"] * 5}) == (
        "stop",
        "Invalid value for 'stop': expected at most 4 items.",
    )


def test_missing_fields_and_other_media_have_messages_of_their_own() -> None:
    assert refusal(ChatCompletionRequest, {"model": "m"}) == (
        "messages",
        "Missing required parameter: 'messages'.",
    )
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
    assert "text only" in refusal(ChatCompletionRequest, CHAT | {"messages": [image]})[1]


@pytest.mark.parametrize(
    "prompt",
    [None, 1, {}, [], [1, "a"], [[1], "a"], [True], [[-1]], [1.5], ["a"] * 257, [["a"]]],
)
def test_prompts_of_no_known_form_are_refused(prompt: object) -> None:
    param, message = refusal(CompletionRequest, TEXT | {"prompt": prompt})
    assert (param or "").startswith("prompt")
    assert "prompt" in message


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_has_four_forms(prompt: object, expected: object) -> None:
    assert parse(CompletionRequest, TEXT | {"prompt": prompt}).prompt == expected


def test_too_many_sequences_are_refused_before_any_exists() -> None:
    param, message = refusal(CompletionRequest, TEXT | {"prompt": ["a"] * 100, "n": 100})
    assert param == "prompt"
    assert "10000 sequences" in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b'{"n": 1' + b"0" * 100_000 + b"}",
    ],
)
def test_malformed_bodies_are_refused(body: bytes) -> None:
    assert refusal(ChatCompletionRequest, body)[1].startswith("The body ")


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, TEXT | {"prompt": [-1] * 10_000}),
        (CompletionRequest, TEXT | {"prompt": [[-1] * 100] * 100}),
        (CompletionRequest, TEXT | {"logit_bias": dict.fromkeys(map(str, range(10_000)), 1_000)}),
        (ChatCompletionRequest, CHAT | {"messages": [{}] * 4_000}),
        (
            ChatCompletionRequest,
            CHAT | {"messages": [{"role": "user", "content": [{"type": "text"}] * 999}]},
        ),
        (ChatCompletionRequest, CHAT | {"stop": [1] * 10_000}),
        (ChatCompletionRequest, CHAT | {"stop_token_ids": ["x"] * 10_000}),
    ],
)
def test_a_body_with_many_mistakes_costs_little(model: Model, body: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(model, body)
    assert caught.value.error_count() <= 5


def test_content_parts_become_one_text_and_developers_are_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts, "name": "bob"}, {"role": "user", "content": "c"}]
    request = parse(ChatCompletionRequest, CHAT | {"messages": messages})
    assert for_template(request.messages) == [
        {"role": "system", "content": "a\nb", "name": "bob"},
        {"role": "user", "content": "c"},
    ]


def test_defaults_and_translations() -> None:
    params = parse(ChatCompletionRequest, CHAT | {"stop": "x", "top_k": -1, "logit_bias": {"7": 2}}).params()
    assert (params.stop, params.top_k, params.logit_bias, params.logprobs) == (("x",), 0, {7: 2.0}, None)
    assert (params.max_tokens, params.temperature, params.n) == (None, 1.0, 1)
    newer = parse(ChatCompletionRequest, CHAT | {"max_completion_tokens": 5, "logprobs": True}).params()
    assert (newer.max_tokens, newer.logprobs) == (5, 0)
    both = CHAT | {"max_completion_tokens": 5}
    assert parse(ChatCompletionRequest, both | {"max_tokens": 5}).params().max_tokens == 5
    assert refusal(ChatCompletionRequest, both | {"max_tokens": 3})[0] == "max_tokens"
    text = parse(CompletionRequest, TEXT).params()
    assert (text.max_tokens, text.is_max_tokens_default) == (16, True)


def test_null_is_left_out() -> None:
    names = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    assert (
        parse(ChatCompletionRequest, CHAT | dict.fromkeys(names)).params()
        == parse(ChatCompletionRequest, CHAT).params()
    )

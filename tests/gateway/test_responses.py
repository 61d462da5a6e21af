"""POST /v1/responses over a socket, by OpenAI's own client: text, streams, structure, thoughts, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from gateway.settings import Settings
from tests.fakes import FakeGroup, ready
from tests.gateway.chat_models import Scripted, make_chat_model, scripted, serving_chat
from tests.gateway.serving import listening, make_app, make_group, make_model_dir
from tests.gateway.test_sse import served, until

pytestmark = pytest.mark.anyio
TEXT = "Hello world, how are you today?"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def sdk(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.fixture
def url(model_dir: Path, group: FakeGroup) -> Iterator[str]:
    with listening(make_app(model_dir, group)) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with sdk(url) as client:
        yield client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("hermes", "thinking", "plain"):
        make_chat_model(directory / name, name)
    return directory


def events_of(url: str, **fields: Any) -> list[dict[str, Any]]:
    """Of a stream, each valid to the letter: its name, its number and its type as the SDK has it."""
    body = {"model": "demo", "input": "hi", "stream": True} | fields
    response = httpx.post(f"{url}/responses", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found = EVENTS.validate_json(data.removeprefix("data: "), strict=True)
        assert found.type == event["type"]
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """Types in a row, each once."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]


MESSAGE_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]


def test_text(client: OpenAI, group: FakeGroup) -> None:
    group.num_cached_tokens = 3
    response = client.responses.create(
        model="demo", input="hi", temperature=0.5, top_p=0.9, metadata={"a": "b"}, user="me"
    )
    assert response.output_text == TEXT
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert (response.temperature, response.top_p, response.metadata) == (0.5, 0.9, {"a": "b"})
    assert (response.tool_choice, response.tools, response.parallel_tool_calls) == ("auto", [], True)
    assert response.id.startswith("resp_")
    [message] = response.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "completed")
    assert message.id.startswith("msg_")
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.usage.output_tokens == len(group.says) + 1
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response._request_id


def test_a_response_is_valid_to_the_letter(url: str) -> None:
    found = httpx.post(f"{url}/responses", json={"model": "demo", "input": "hi"}).content
    Response.model_validate_json(found, strict=True)
    assert json.loads(found)["object"] == "response"


def test_a_stream_of_text(url: str) -> None:
    events = events_of(url, metadata={"a": "b"})
    assert kinds_of(events) == ["created", "in_progress", *MESSAGE_EVENTS, "completed"]
    created, completed = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    assert len(deltas) > 5
    by_kind = {event["type"]: event for event in events}
    assert by_kind["response.output_text.done"]["text"] == TEXT
    added, done = by_kind["response.output_item.added"], by_kind["response.output_item.done"]
    assert (added["item"]["status"], added["item"]["content"]) == ("in_progress", [])
    assert completed["output"] == [done["item"]]
    assert {event["item_id"] for event in events if "item_id" in event} == {done["item"]["id"]}
    same = {"id", "created_at", "model", "metadata", "tools", "text", "store"}
    assert {key: created[key] for key in same} == {key: completed[key] for key in same}


def test_what_is_too_long_is_incomplete(url: str, client: OpenAI) -> None:
    response = client.responses.create(model="demo", input="hi", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hello world"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
    last = events_of(url, max_output_tokens=2)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_log_probabilities_are_those_of_the_text(url: str, client: OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = client.responses.create(model="demo", input="hi", include=include, top_logprobs=2)
    message = response.output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(token.token for token in part.logprobs) == TEXT
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
    events = events_of(url, include=include, top_logprobs=2)
    tokens = [
        token["token"]
        for event in events
        if event["type"] == "response.output_text.delta"
        for token in event["logprobs"]
    ]
    assert "".join(tokens) == TEXT


async def test_the_async_client_and_its_stream_helper(url: str) -> None:
    async with AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        whole = await client.responses.create(model="demo", input="hi")
        assert whole.output_text == TEXT
        stream = await client.responses.create(model="demo", input="hi", stream=True)
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == TEXT
        async with client.responses.stream(model="demo", input="hi") as helper:
            final = await helper.get_final_response()
        assert final.output_text == TEXT


def test_sampling_is_that_of_the_other_endpoints(client: OpenAI, group: FakeGroup) -> None:
    extras = {"seed": 7, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "stop": " you"}
    response = client.responses.create(model="demo", input="hi", top_p=0.9, extra_body=extras)
    assert (response.status, response.output_text) == ("completed", "Hello world, how are")
    sampling = group.requests[0].sampling
    assert (sampling.seed, sampling.top_k, sampling.min_p, sampling.top_p) == (7, 5, 0.1, 0.9)
    assert sampling.presence_penalty == 0.5


ITEMS: list[tuple[Any, str | None, str]] = [
    ("hi", None, "<|user|>hi<|end|>"),
    ("hi", "Be brief.", "<|system|>Be brief.<|end|><|user|>hi<|end|>"),
    ([{"role": "user", "content": "hi"}], None, "<|user|>hi<|end|>"),
    (
        [
            {"role": "developer", "content": "And kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"role": "assistant", "content": "a"},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
            },
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "c"}]},
            {"role": "user", "content": [{"type": "input_text", "text": t} for t in "de"]},
        ],
        "Be brief.",
        "<|system|>Be brief.\nAnd kind.<|end|><|user|>hi<|end|><|assistant|>a<|end|><|assistant|>b<|end|>"
        "<|assistant|>c<|end|><|user|>d\ne<|end|>",
    ),
]


@pytest.mark.parametrize(("given", "instructions", "prompt"), ITEMS)
def test_items_are_the_messages_of_a_chat(
    models: Path, given: Any, instructions: str | None, prompt: str
) -> None:
    group = scripted(models / "plain", "Hi.")
    with serving_chat(models / "plain", group) as url, sdk(url) as client:
        client.responses.create(model="demo", input=given, instructions=instructions)
    assert group.prompt() == prompt + "<|assistant|>"


class City(BaseModel):
    name: str
    people: int


def test_parse_and_structured_output(models: Path) -> None:
    group = scripted(models / "plain", '{"name": "Oslo", "people": 7}')
    with serving_chat(models / "plain", group) as url, sdk(url) as client:
        response = client.responses.parse(model="demo", input="hi", text_format=City)
        assert response.output_parsed == City(name="Oslo", people=7)
        assert response.text is not None
        assert response.text.format is not None
        assert response.text.format.type == "json_schema"
        with client.responses.stream(model="demo", input="hi", text_format=City) as stream:
            assert stream.get_final_response().output_parsed == City(name="Oslo", people=7)
        client.responses.create(model="demo", input="hi", text={"format": {"type": "json_object"}})
        client.responses.create(model="demo", input="hi", text={"format": {"type": "text"}})
    assert [bool(request.grammar) for request in group.requests] == [True, True, True, False]
    assert "people" in group.requests[0].grammar


THOUGHT, SAID = "They greet me.", "Hello."


def test_thoughts_are_items(models: Path) -> None:
    said = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
    group = scripted(models / "thinking", said)
    with serving_chat(models / "thinking", group) as url, sdk(url) as client:
        include: Any = ["message.output_text.logprobs", "reasoning.encrypted_content"]
        response = client.responses.create(
            model="demo", input="hi", reasoning={"effort": "low", "summary": "auto"}, include=include
        )
        thoughts, message = response.output
        assert thoughts.type == "reasoning"
        assert thoughts.content is not None
        assert (thoughts.content[0].text, thoughts.summary) == (THOUGHT, [])
        assert response.output_text == SAID
        assert message.type == "message"
        part = message.content[0]
        assert part.type == "output_text"
        assert "".join(token.token for token in part.logprobs or ()).strip() == SAID
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens > 0
        assert response.reasoning is not None
        assert response.reasoning.effort == "low"
        events = events_of(url)
        client.responses.create(
            model="demo",
            input=[
                {"role": "user", "content": "hi"},
                *[item.model_dump(exclude_unset=True) for item in response.output],  # type: ignore[list-item]
                {"role": "user", "content": "again"},
            ],
        )
        assert f"<think>\n{THOUGHT}\n</think>\n\n{SAID}<|end|>" in group.prompt()
        unsaid: Any = [{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "hi"}]
        client.responses.create(model="demo", input=unsaid)
        assert "<think>" not in group.prompt()
        assert group.prompt().count("<|assistant|>") == 1
    reasoning = [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert kinds_of(events) == ["created", "in_progress", *reasoning, *MESSAGE_EVENTS, "completed"]
    deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == THOUGHT
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message"]
    assert {event["output_index"] for event in events if "output_index" in event} == {0, 1}


def test_no_effort_is_no_thoughts(models: Path) -> None:
    group = scripted(models / "thinking", SAID)
    with serving_chat(models / "thinking", group) as url, sdk(url) as client:
        response = client.responses.create(model="demo", input="hi", reasoning={"effort": "none"})
    assert [item.type for item in response.output] == ["message"]
    assert group.prompt().endswith("</think>\n\n")


def test_a_stream_that_breaks_says_so_and_raises(url: str, client: OpenAI, group: FakeGroup) -> None:
    group.fails_after = 2
    seen: list[Any] = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012
        for event in client.responses.create(model="demo", input="hi", stream=True):
            seen.append(event)
    assert caught.value.code == "worker_lost"
    failed = seen[-1]
    assert failed.type == "response.failed"
    assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
    assert failed.response.output_text == "Hello world"


def test_the_events_of_a_broken_stream_are_valid(url: str, group: FakeGroup) -> None:
    group.fails_after = 2
    events = events_of(url)
    assert kinds_of(events)[-2:] == ["failed", "error"]
    assert (events[-1]["code"], events[-1]["error"]["code"]) == ("worker_lost", "worker_lost")
    assert events[-2]["response"]["output"][0]["status"] == "incomplete"


def test_what_fails_before_it_begins_has_a_status(client: OpenAI, group: FakeGroup) -> None:
    group.num_outstanding = 10_000
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError):
            client.responses.create(model="demo", input="hi", stream=stream)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="none", input="hi")


async def test_a_failure_before_the_first_token_but_behind_the_headers_is_an_event(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=0, fails_after=0)
    body = {"model": "demo", "input": "hi", "stream": True}
    async with (
        served(make_app(model_dir, group, settings=Settings(first_delta_wait=0.05))) as client,
        client.stream("POST", "/v1/responses", json=body) as response,
    ):
        assert response.status_code == 200
        group.go_on.set()
        found = (await response.aread()).decode()
    name, data = found.strip().split("\n")
    assert name == "event: error"
    event = EVENTS.validate_json(data.removeprefix("data: "), strict=True)
    assert (event.sequence_number, event.code) == (0, "worker_lost")


async def test_a_client_that_leaves_ends_its_response(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=2)
    app = make_app(model_dir, group)
    async with served(app) as client:
        async with client.stream(
            "POST", "/v1/responses", json={"model": "demo", "input": "hi", "stream": True}
        ):
            await until(lambda: group.num_outstanding == 1)
        await until(lambda: group.closed_early)
    assert app.state.gateway.responses.num_responses == 0


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"input": None}, "input", "Missing required parameter: 'input'."),
    ({"input": []}, "input", "at least 1 item"),
    ({"input": 5}, "input", ""),
    ({"input": [{"type": "computer_call", "action": {}}]}, "input[0]", "'computer_call' are not supported"),
    ({"input": [{"type": [], "role": "user", "content": "x"}]}, "input[0]", "items of type '[]'"),
    ({"input": [{"content": "x"}]}, "input[0].role", "Missing"),
    ({"input": [{"role": "user"}]}, "input[0].content", "Missing"),
    ({"input": [{"role": "user", "content": "x", "output": "y"}]}, "input[0].output", "no 'output'"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content",
        "reads text only; a content part of type 'input_image'",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0].text",
        "Missing",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "refusal": "y"}]}]},
        "input[0].content[0].refusal",
        "have no 'refusal'",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
        "input[0].content[0].type",
        "Items of role 'user' have no part of type 'refusal'",
    ),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "Missing"),
    (
        {"input": [{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}]},
        "input",
        "No tool output found for function call c1.",
    ),
    (
        {"input": [{"type": "function_call_output", "call_id": "c2", "output": "x"}]},
        "input",
        "No tool call found for function call output with call_id c2.",
    ),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "encrypted_content", "can read it"),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id", "'msg_x' not found"),
    ({"top_logprobs": 3}, "top_logprobs", "'include' has"),
    ({"include": ["brand_new"]}, "include[0]", ""),
    ({"stream_options": {}}, "stream_options", "'stream' is true"),
    ({"max_output_tokens": 0}, "max_output_tokens", ""),
    ({"max_output_tokens": 10_000}, "input", "maximum context length is 512"),
    ({"input": "x " * 2_000}, "input", "maximum context length is 512"),
    ({"temperature": 3}, "temperature", ""),
    ({"metadata": {"x" * 65: "y"}}, "metadata", "64 characters"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "Missing"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "only allowed"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 3}}}},
        "text.format.schema",
        "",
    ),
    ({"text": {"verbosity": "low"}}, "verbosity", "ask for it in a message"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", "no reasoning effort"),
    ({"truncation": "auto"}, "truncation", "served whole or refused"),
    ({"background": True}, "background", "while its client waits"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "not 'web_search'"),
    ({"tools": [{"type": "function", "name": "f"}]}, "tools", "knows of no tools"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'tools' are specified"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "needs 'tools'"),
    ({"tool_choice": "never"}, "tool_choice", "'none', 'auto', 'required'"),
    ({"previous_response_id": "resp_x"}, "previous_response_id", "'resp_x' not found"),
    ({"messages": []}, None, "Unrecognized request argument supplied: messages"),
    ({"n": 2}, None, "Unrecognized request argument supplied: n"),
]


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    with listening(make_app(model_dir, make_group(model_dir))) as url:
        response = httpx.post(f"{url}/v1/responses", json={"model": "demo", "input": "hi"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "no_chat_template", "model")


def test_what_the_template_refuses_is_in_the_input(url: str) -> None:
    late = [{"role": "user", "content": "hi"}, {"role": "system", "content": "no"}]
    response = httpx.post(f"{url}/responses", json={"model": "demo", "input": late})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "input")
    assert "system comes first" in error["message"]


@pytest.fixture(scope="module")
def plain(models: Path) -> Iterator[tuple[str, Scripted]]:
    group = scripted(models / "plain", "Hi.", info=ready(10_000, max_model_len=512))
    with serving_chat(models / "plain", group) as url:
        yield url, group


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    plain: tuple[str, Scripted], fields: dict[str, Any], param: str | None, message: str
) -> None:
    url, group = plain
    response = httpx.post(f"{url}/responses", json={"model": "demo", "input": "hi"} | fields)
    error = response.json()["error"]
    assert response.status_code == (404 if "item_reference" in str(fields) else 400), error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]
    assert not group.requests

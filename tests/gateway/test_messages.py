"""Anthropic's own client against the gateway on a socket: messages, streams, tool loops, thoughts, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import MessageParam, ToolParam
from pydantic import BaseModel

from gateway.settings import Settings
from gateway.workers.protocol import WorkerUnavailable
from tests.fakes import FakeGroup
from tests.gateway.chat_models import make_chat_app, make_chat_model, scripted
from tests.gateway.groups import until
from tests.gateway.serving import client_of, listening, make_app
from tests.gateway.test_tools import CALLS

pytestmark = pytest.mark.anyio
TEXT = "Hello world, how are you today?"
HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
KEY = "sk-test"
WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
QUESTION: list[MessageParam] = [{"role": "user", "content": "How is the weather in Oslo?"}]
OSLO = {"city": "Oslo"}


def sdk(url: str, **options: Any) -> Anthropic:
    given = {"api_key": KEY, "max_retries": 0, "_strict_response_validation": True} | options
    return Anthropic(base_url=url, **given)


@pytest.fixture
def url(model_dir: Path, group: FakeGroup) -> Iterator[str]:
    with listening(make_app(model_dir, group, settings=Settings(api_keys=(KEY,)))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Anthropic]:
    with sdk(url) as client:
        yield client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in (*CALLS, "thinking", "plain"):
        make_chat_model(directory / name, name)
    return directory


def test_a_message(client: Anthropic, group: FakeGroup) -> None:
    group.num_cached_tokens = 3
    message = client.messages.create(
        model="demo", max_tokens=100, messages=HI, system="Be brief.", metadata={"user_id": "me"}
    )
    assert [block.model_dump(exclude_unset=True) for block in message.content] == [
        {"type": "text", "text": TEXT}
    ]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert message.id.startswith("msg_")
    assert message._request_id
    usage, [request] = message.usage, group.requests
    assert usage.cache_read_input_tokens == 3
    assert usage.input_tokens == len(request.prompt_ids) - 3
    assert usage.output_tokens == len(group.says) + 1
    counted = client.messages.count_tokens(model="demo", messages=HI, system="Be brief.")
    assert counted.input_tokens == len(request.prompt_ids)
    assert len(group.requests) == 1, "counting asks no group"


def test_sampling_fields_reach_the_group(client: Anthropic, group: FakeGroup) -> None:
    """The SDK's newest release has dropped three of them; what is older sends them."""
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    client.messages.create(model="demo", max_tokens=5, messages=HI, extra_body=fields)
    [request] = group.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert request.max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({"max_tokens": 2}, "Hello world", "max_tokens", None),
        ({"max_tokens": 99, "stop_sequences": ["today", ", how"]}, "Hello world", "stop_sequence", ", how"),
        ({"max_tokens": 99, "stop_sequences": ["xyz"]}, TEXT, "end_turn", None),
    ],
)
def test_why_a_message_ends(
    client: Anthropic, fields: dict[str, Any], text: str, reason: str, sequence: str | None
) -> None:
    whole = client.messages.create(model="demo", messages=HI, **fields)
    with client.messages.stream(model="demo", messages=HI, **fields) as stream:
        assert stream.get_final_text() == text
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.content[0].type == "text"
        assert message.content[0].text == text
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert streamed.usage == whole.usage


def test_what_does_not_fit_ends_with_the_context(model_dir: Path, group: FakeGroup) -> None:
    """Clients ask for tens of thousands of tokens, whatever the model."""
    group.says *= 200
    with listening(make_app(model_dir, group)) as url, sdk(url) as client:
        message = client.messages.create(model="demo", max_tokens=20_000, messages=HI)
        assert message.stop_reason == "model_context_window_exceeded"
        [request] = group.requests
        assert message.usage.output_tokens == request.max_tokens == 512 - len(request.prompt_ids)
        long: list[MessageParam] = [{"role": "user", "content": "word " * 600}]
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .* is 512 tokens"):
            client.messages.create(model="demo", max_tokens=1, messages=long)


def test_a_stream_event_by_event(client: Anthropic, group: FakeGroup) -> None:
    group.num_cached_tokens = 2
    events = list(client.messages.create(model="demo", max_tokens=100, messages=HI, stream=True))
    start, begin, *deltas, stop, message_delta, message_stop = events
    assert start.type == "message_start"
    assert (start.message.content, start.message.stop_reason) == ([], None)
    assert start.message.usage.input_tokens == len(group.requests[0].prompt_ids) - 2
    assert start.message.usage.cache_read_input_tokens == 2
    assert begin.type == "content_block_start"
    assert begin.to_dict() == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert len(deltas) > 5, "as the model writes it"
    texts = [event.delta.text for event in deltas if event.type == "content_block_delta"]  # type: ignore[union-attr]
    assert "".join(texts) == TEXT
    assert stop.to_dict() == {"type": "content_block_stop", "index": 0}
    assert message_delta.type == "message_delta"
    assert message_delta.delta.stop_reason == "end_turn"
    assert message_delta.usage.output_tokens == len(group.says) + 1
    assert message_stop.type == "message_stop"


def test_the_bytes_of_a_stream(url: str) -> None:
    """Named events, no [DONE], pings by name."""
    body = {"model": "demo", "max_tokens": 2, "messages": HI, "stream": True}
    answer = httpx.post(f"{url}/v1/messages", json=body, headers={"x-api-key": KEY})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_pings_come_in_silence(model_dir: Path, group: FakeGroup) -> None:
    group.waits_after = 1
    settings = Settings(ping_interval=1)
    body = {"model": "demo", "max_tokens": 9, "messages": HI, "stream": True}
    with (
        listening(make_app(model_dir, group, settings=settings)) as url,
        httpx.stream("POST", f"{url}/v1/messages", json=body, timeout=60) as answer,
    ):
        for line in answer.iter_lines():
            if line == "event: ping":
                break
        else:
            pytest.fail("no ping came")


async def test_async(url: str) -> None:
    async with AsyncAnthropic(
        base_url=url, api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as client:
        message = await client.messages.create(model="demo", max_tokens=2, messages=HI)
        assert message.stop_reason == "max_tokens"
        stream = await client.messages.create(model="demo", max_tokens=99, messages=HI, stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        async with client.messages.stream(model="demo", max_tokens=99, messages=HI) as helper:
            assert "".join([text async for text in helper.text_stream]) == TEXT
        counted = await client.messages.count_tokens(model="demo", messages=HI)
        assert counted.input_tokens > 3


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_tool_loop(models: Path, name: str, streams: bool) -> None:
    """The call, its result and the answer; and the prompts are those of the same chat in OpenAI's words."""
    group = scripted(models / name, CALLS[name], "It is sunny.")
    messages: list[MessageParam] = list(QUESTION)
    with listening(make_chat_app(models / name, group)) as url, sdk(url) as client:

        def ask() -> anthropic.types.Message:
            asked: dict[str, Any] = {"model": "demo", "max_tokens": 200, "messages": messages}
            if not streams:
                return client.messages.create(**asked, tools=[WEATHER])
            with client.messages.stream(**asked, tools=[WEATHER]) as stream:
                return stream.get_final_message()

        first = ask()
        assert first.stop_reason == "tool_use"
        [call] = first.content
        assert call.type == "tool_use"
        assert call.id.startswith("toolu_")
        assert (call.name, call.input) == ("get_weather", OSLO)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"sky": "clear"}'}
        messages += [first.to_param(), {"role": "user", "content": [result]}]  # type: ignore[list-item]
        second = ask()
        assert [block.type for block in second.content] == ["text"]
        assert second.content[0].text == "It is sunny."  # type: ignore[union-attr]
        assert second.stop_reason == "end_turn"

        function = {"name": "get_weather", "arguments": json.dumps(OSLO)}
        same = [
            *QUESTION,
            {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'},
        ]
        tool = {key: WEATHER[key] for key in ("name", "description")} | {
            "parameters": WEATHER["input_schema"]
        }
        body = {"model": "demo", "messages": same, "tools": [{"type": "function", "function": tool}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    assert group.prompt(1) == group.prompt(2)


def test_a_stream_of_calls(models: Path) -> None:
    """Text and two calls are three blocks; inputs come as the model writes them."""
    text = f'I look. {CALLS["hermes"]}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
    now: ToolParam = {"name": "now", "input_schema": {"type": "object"}}
    group = scripted(models / "hermes", text)
    with listening(make_chat_app(models / "hermes", group)) as url, sdk(url) as client:
        asked: dict[str, Any] = {"model": "demo", "max_tokens": 200, "messages": QUESTION}
        with client.messages.stream(**asked, tools=[WEATHER, now]) as stream:
            events = list(stream)
            streamed = stream.get_final_message()
        whole = client.messages.create(**asked, tools=[WEATHER, now])
    for message in (streamed, whole):
        assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
        assert [block.input for block in message.content if block.type == "tool_use"] == [OSLO, {}]
    started = [event.index for event in events if event.type == "content_block_start"]
    stopped = [event.index for event in events if event.type == "content_block_stop"]
    assert started == stopped == [0, 1, 2]
    parts = [event.partial_json for event in events if event.type == "input_json"]
    assert len(parts) > 3
    assert json.loads("".join(parts).removesuffix("{}")) == OSLO


async def ask(model_dir: Path, text: str, **fields: Any) -> tuple[httpx.Response, Any]:
    """The answer to a request without an SDK in between, and the group."""
    group = scripted(model_dir, text)
    body = {"model": "demo", "max_tokens": 300, "messages": QUESTION} | fields
    async with client_of(make_chat_app(model_dir, group)) as client:
        return await client.post("/v1/messages", json=body), group


@pytest.mark.parametrize(
    ("choice", "is_constrained"),
    [
        ({"type": "auto"}, False),
        ({"type": "auto", "disable_parallel_tool_use": True}, True),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "get_weather"}, True),
    ],
)
async def test_the_choice_of_tools_is_enforced(
    models: Path, choice: dict[str, Any], is_constrained: bool
) -> None:
    answer, group = await ask(models / "hermes", CALLS["hermes"], tools=[WEATHER], tool_choice=choice)
    assert answer.json()["stop_reason"] == "tool_use"
    assert bool(group.requests[0].grammar) == is_constrained


async def test_no_tool_is_to_be_used(models: Path) -> None:
    answer, group = await ask(models / "hermes", TEXT, tools=[WEATHER], tool_choice={"type": "none"})
    assert answer.json()["stop_reason"] == "end_turn"
    assert "get_weather" not in group.prompt()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{"city": "Oslo", "sky": "cle', OSLO),
        ('{"city": "Os', {}),
        ("{city: Oslo}", {"INVALID_JSON": "{city: Oslo}"}),
    ],
)
async def test_what_a_model_wrote_amiss_is_told(models: Path, arguments: str, found: object) -> None:
    text = f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}'
    answer, _ = await ask(models / "hermes", text, tools=[WEATHER])
    assert answer.json()["content"][0]["input"] == found


THOUGHT = "Let me see: is it?"
SAID = f"<think>\n{THOUGHT}\n</think>\n\nYes."


def test_thoughts(models: Path) -> None:
    group = scripted(models / "thinking", SAID)
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 2_000, "messages": HI}
    with listening(make_chat_app(models / "thinking", group)) as url, sdk(url) as client:
        whole = client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
        with client.messages.stream(**asked, thinking={"type": "adaptive"}) as stream:
            events = list(stream)
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            thinking, text = message.content
            assert thinking.type == "thinking"
            assert (thinking.thinking, len(thinking.signature)) == (THOUGHT, 64)
            assert text.type == "text"
            assert text.text == "Yes."
            assert message.usage.output_tokens_details is not None
            assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens
        assert "".join(event.thinking for event in events if event.type == "thinking") == THOUGHT
        messages = [*HI, whole.to_param(), *HI]
        client.messages.create(model="demo", max_tokens=200, messages=messages, thinking={"type": "disabled"})
    assert f"<think>\n{THOUGHT}\n</think>\n\nYes.<|end|>" in group.prompt()
    assert group.prompt().endswith("<think>\n\n</think>\n\n"), "the template's way not to think"


def test_thoughts_that_are_not_shown(models: Path) -> None:
    group = scripted(models / "thinking", SAID)
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 2_000, "messages": HI}
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    with listening(make_chat_app(models / "thinking", group)) as url, sdk(url) as client:
        whole = client.messages.create(**asked, thinking=thinking)
        with client.messages.stream(**asked, thinking=thinking) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
    assert "thinking" not in kinds
    for message in (whole, streamed):
        thoughts, text = message.content
        assert thoughts.type == "thinking"
        assert (thoughts.thinking, len(thoughts.signature)) == ("", 64)
        assert text.type == "text"
        assert text.text == "Yes."


async def test_a_model_is_asked_for_no_thoughts_that_it_does_not_have(models: Path) -> None:
    enabled = {"type": "enabled", "budget_tokens": 1024}
    answer, _ = await ask(models / "plain", TEXT, thinking=enabled)
    assert answer.status_code == 400
    assert "does not think" in answer.json()["error"]["message"]
    for kind in ("adaptive", "disabled"):
        assert (await ask(models / "plain", TEXT, thinking={"type": kind}))[0].status_code == 200
    answer, _ = await ask(models / "plain", TEXT, output_config={"effort": "low"})
    assert "output_config.effort" in answer.json()["error"]["message"]


class City(BaseModel):
    city: str


def test_structured_output(models: Path) -> None:
    group = scripted(models / "plain", json.dumps(OSLO))
    with listening(make_chat_app(models / "plain", group)) as url, sdk(url) as client:
        parsed = client.messages.parse(model="demo", max_tokens=99, messages=QUESTION, output_format=City)
    assert parsed.parsed_output == City(city="Oslo")
    assert "json_schema" in group.requests[0].grammar


async def test_turns_become_a_chat(models: Path) -> None:
    """Turns of one role are joined, and blocks; the last one of the assistant's is gone on with."""
    use = {"type": "tool_use", "id": "a", "name": "get_weather", "input": OSLO}
    said = [{"type": "text", "text": "no"}]
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": said}
    messages = [
        {"role": "user", "content": "one"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "three"}]},
        {"role": "assistant", "content": "It is "},
    ]
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    answer, group = await ask(models / "hermes", "sunny.", messages=messages, system=system)
    assert answer.json()["content"] == [{"type": "text", "text": "sunny."}]
    assert group.prompt() == (
        "<|system|>\nBe\nbrief.<|end|><|user|>\none\ntwo<|end|><|assistant|>\nI look.<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|end|>'
        "<|user|>\n<tool_response>\nno\n</tool_response><|end|><|user|>\nthree<|end|><|assistant|>\nIt is "
    )


ERRORS = [
    (anthropic.BadRequestError, "invalid_request_error", {"max_tokens": 0}),
    (anthropic.NotFoundError, "not_found_error", {"model": "none"}),
]


@pytest.mark.parametrize(("kind", "type", "fields"), ERRORS)
def test_errors_have_their_classes(
    client: Anthropic, kind: type[anthropic.APIStatusError], type: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        client.messages.create(**({"model": "demo", "max_tokens": 5, "messages": HI} | fields))
    _is_anthropic_s(caught.value, type)


def _is_anthropic_s(error: anthropic.APIStatusError, type: str) -> None:
    assert isinstance(error.body, dict)
    assert error.body.keys() == {"type", "error", "request_id"}
    assert error.body["type"] == "error"
    assert error.body["error"].keys() == {"type", "message"}
    assert error.body["error"]["type"] == error.type == type
    assert error.body["error"]["message"]
    assert error.body["request_id"] == error.request_id


def test_keys(url: str) -> None:
    with sdk(url, api_key="wrong") as wrong, pytest.raises(anthropic.AuthenticationError) as caught:
        wrong.messages.create(model="demo", max_tokens=5, messages=HI)
    _is_anthropic_s(caught.value, "authentication_error")
    body = {"model": "demo", "max_tokens": 5, "messages": HI}
    for headers, status in (
        ({"x-api-key": KEY}, 200),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": KEY, "authorization": "Bearer wrong"}, 401),
        ({}, 401),
    ):
        assert httpx.post(f"{url}/v1/messages", json=body, headers=headers).status_code == status


def test_errors_of_the_layers_around(model_dir: Path, group: FakeGroup) -> None:
    settings = Settings(max_body_bytes=2_000)
    with listening(make_app(model_dir, group, settings=settings)) as url, sdk(url) as client:
        with pytest.raises(anthropic.APIStatusError) as large:
            client.messages.count_tokens(model="demo", messages=[{"role": "user", "content": "x" * 3_000}])
        assert large.value.status_code == 413
        assert large.value.body["error"]["type"] == "request_too_large"  # type: ignore[index]
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.batches.list()
        _is_anthropic_s(missing.value, "not_found_error")
        group.num_outstanding = 10_000
        with pytest.raises(anthropic.RateLimitError) as busy:
            client.messages.create(model="demo", max_tokens=5, messages=HI)
        _is_anthropic_s(busy.value, "rate_limit_error")
        assert busy.value.response.headers["retry-after"] == "1"
        openai = httpx.get(f"{url}/v1/none").json()
        assert openai["error"].keys() == {"message", "type", "param", "code"}, "elsewhere as ever"


@pytest.mark.parametrize("streams", [False, True])
def test_a_group_that_is_not_ready_is_overload(client: Anthropic, group: FakeGroup, streams: bool) -> None:
    group.fails_after, group.fails_with = 0, WorkerUnavailable("x")
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(model="demo", max_tokens=5, messages=HI, stream=streams)
    assert caught.value.status_code == 503
    _is_anthropic_s(caught.value, "overloaded_error")


def test_a_stream_that_breaks_raises(client: Anthropic, group: FakeGroup) -> None:
    group.fails_after = 2
    texts = []
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(model="demo", max_tokens=99, messages=HI) as stream,
    ):
        texts += list(stream.text_stream)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "overloaded_error"
    assert caught.value.body["request_id"]


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_leaves_ends_its_sequence(
    model_dir: Path, group: FakeGroup, streams: bool
) -> None:
    group.waits_after = 2
    body = {"model": "demo", "max_tokens": 99, "messages": HI, "stream": streams}
    with listening(make_app(model_dir, group)) as url:
        async with httpx.AsyncClient() as client:
            asked = asyncio.create_task(client.post(f"{url}/v1/messages", json=body, timeout=60))
            await until(lambda: group.num_outstanding)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: group.closed_early == [group.requests[0].id])
    assert group.num_outstanding == 0


def test_what_may_go_better_is_tried_again(url: str, group: FakeGroup) -> None:
    group.fails_after, group.fails_with = 0, WorkerUnavailable("x")
    with sdk(url, max_retries=1) as client, pytest.raises(anthropic.InternalServerError):
        client.messages.create(model="demo", max_tokens=5, messages=HI)
    assert len(group.requests) == 2


def test_models(client: Anthropic) -> None:
    assert [model.id for model in client.models.list(limit=1)] == ["demo", "org/demo"]
    model = client.models.retrieve("org/demo")
    assert (model.display_name, model.lifecycle) == ("org/demo", "active")
    assert model.created_at.timestamp() == 1_700_000_000


async def test_versions(models: Path) -> None:
    app = make_chat_app(models / "plain", scripted(models / "plain", TEXT))
    body = {"model": "demo", "max_tokens": 5, "messages": HI}
    async with client_of(app) as client:
        for version, status in (("2023-06-01", 200), ("2026-10-21", 200), ("2099-01-01", 400)):
            headers = {"anthropic-version": version}
            answer = await client.post("/v1/messages", json=body, headers=headers)
            assert answer.status_code == status
        assert "2026-10-21" in answer.json()["error"]["message"]


def test_the_sdk_s_tool_runner(models: Path) -> None:
    """It asks the beta of the endpoint, which is the same path, first for a thread, then without."""
    cities = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        cities.append(city)
        return "sunny"

    group = scripted(models / "hermes", CALLS["hermes"], "It is sunny.")
    with listening(make_chat_app(models / "hermes", group)) as url, sdk(url) as client:
        runner = client.beta.messages.tool_runner(
            model="demo", max_tokens=200, tools=[get_weather], messages=[{"role": "user", "content": "Oslo?"}]
        )
        final = runner.until_done()
    assert cities == ["Oslo"]
    assert final.content[0].type == "text"
    assert final.content[0].text == "It is sunny."
    assert "<tool_response>\nsunny\n</tool_response>" in group.prompt()

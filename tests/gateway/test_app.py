"""The API over HTTP, against groups that say what the test tells them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engines.wire import Progress, RequestError
from gateway.app import create_app
from gateway.settings import Settings
from gateway.workers.protocol import GroupState, WorkerLost, WorkerUnavailable
from tests.fakes import FakeGroup
from tests.gateway.groups import until
from tests.gateway.serving import (
    client_of,
    data_of,
    ids_of,
    make_app,
    make_group,
    make_served,
    texts_of,
)

pytestmark = pytest.mark.anyio
TEXT = "Hello world, how are you today?"
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
RAW: dict[str, Any] = {"model": "demo", "prompt": "hi"}


async def ask(
    model_dir: Path, group: FakeGroup, path: str, body: dict[str, Any], settings: Settings | None = None
) -> httpx.Response:
    async with client_of(make_app(model_dir, group, settings=settings)) as client:
        return await client.post(path, json=body)


async def chat(model_dir: Path, group: FakeGroup, **fields: Any) -> httpx.Response:
    return await ask(model_dir, group, "/v1/chat/completions", CHAT | fields)


async def complete(model_dir: Path, group: FakeGroup, **fields: Any) -> httpx.Response:
    return await ask(model_dir, group, "/v1/completions", RAW | fields)


# Whole answers


async def test_chat(model_dir: Path, group: FakeGroup) -> None:
    group.num_cached_tokens = 3
    answer = (await chat(model_dir, group)).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    num_tokens = len(group.says) + 1  # the end token is counted
    prompt = group.requests[0].prompt_ids
    assert answer == {
        "object": "chat.completion",
        "model": "demo",
        "system_fingerprint": "fp_fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": num_tokens,
            "total_tokens": len(prompt) + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }


async def test_completion(model_dir: Path, group: FakeGroup) -> None:
    answer = (await complete(model_dir, group, max_tokens=3)).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"text": "Hello world,", "index": 0, "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"]["completion_tokens"] == 3


async def test_parameters_reach_the_group(model_dir: Path, group: FakeGroup) -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "seed": 42,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"5": -100},
    }  # fmt: skip
    limits = {"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [3], "ignore_eos": True}
    await chat(model_dir, group, **given, **limits)
    [request] = group.requests
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in given} == given | {"logit_bias": {5: -100.0}}
    assert {name: getattr(request, name) for name in limits} == limits
    assert sampling.logprobs is None


async def test_seeds_are_drawn_and_negative_ones_are_mapped(model_dir: Path, group: FakeGroup) -> None:
    for seed in (None, None, -1, 0):
        await chat(model_dir, group, seed=seed)
    seeds = [request.sampling.seed for request in group.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [2**63 - 1, 0]
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_choices_share_a_group_and_a_seed(model_dir: Path, group: FakeGroup) -> None:
    answer = (await complete(model_dir, group, prompt=["a", "bc"], n=2, max_tokens=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    requests = group.requests
    assert [request.choice for request in requests] == [0, 1, 0, 1]
    assert requests[0].group == requests[1].group != requests[2].group
    assert len({request.id for request in requests}) == 4
    assert len({request.sampling.seed for request in requests}) == 1
    num_prompt = len(requests[0].prompt_ids) + len(requests[2].prompt_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == 8


async def test_chat_answers_may_be_as_long_as_the_context_completions_are_short(
    model_dir: Path, group: FakeGroup
) -> None:
    await chat(model_dir, group)
    await complete(model_dir, group)
    long_prompt = [1] * 505
    await complete(model_dir, group, prompt=long_prompt)
    rooms = [(len(request.prompt_ids), request.max_tokens) for request in group.requests]
    assert rooms[0] == (rooms[0][0], 512 - rooms[0][0])
    assert rooms[1][1] == 16
    assert rooms[2] == (505, 7)


async def test_stop_strings_end_the_answer_and_the_sequence(model_dir: Path, group: FakeGroup) -> None:
    for stop in ("how", " how are", ["zzz", "w are y"], "today?"):
        answer = (await chat(model_dir, group, stop=stop)).json()
        [choice] = answer["choices"]
        cut = min(TEXT.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in TEXT)
        assert choice["message"]["content"] == TEXT[:cut]
        assert choice["finish_reason"] == "stop"
    assert len(group.closed_early) == 4
    answer = (await chat(model_dir, group, stop="how")).json()
    assert answer["usage"]["completion_tokens"] == len(ids_of(model_dir, "Hello world, how"))


async def test_stop_strings_wait_for_min_tokens(model_dir: Path, group: FakeGroup) -> None:
    answer = (await chat(model_dir, group, stop=["world", "are"], min_tokens=3)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello world, how "


async def test_a_stop_string_that_never_completes_is_text(model_dir: Path, group: FakeGroup) -> None:
    answer = (await chat(model_dir, group, stop="today?!")).json()
    assert answer["choices"][0]["message"]["content"] == TEXT


async def test_several_tokens_in_a_delta_are_cut_exactly(model_dir: Path, group: FakeGroup) -> None:
    group.tokens_per_delta = 4
    answer = (await chat(model_dir, group, stop="world")).json()
    assert answer["choices"][0]["message"]["content"] == "Hello "
    assert answer["usage"]["completion_tokens"] == len(ids_of(model_dir, "Hello world"))


async def test_chat_logprobs(model_dir: Path, group: FakeGroup) -> None:
    answer = (await chat(model_dir, group, logprobs=True, top_logprobs=2, max_tokens=2)).json()
    [first, second] = answer["choices"][0]["logprobs"]["content"]
    assert (first["token"], second["token"]) == ("Hello", " world")
    assert first["bytes"] == list(b"Hello")
    assert first["logprob"] == pytest.approx(-0.6931, abs=1e-4)
    assert len(first["top_logprobs"]) == 2
    assert set(first["top_logprobs"][0]) == {"token", "logprob", "bytes"}


async def test_completion_logprobs(model_dir: Path, group: FakeGroup) -> None:
    answer = (await complete(model_dir, group, logprobs=2)).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT + "<|end|>", "all that is counted, the end too"
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))
    ]
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    none = (await complete(model_dir, group, logprobs=0)).json()["choices"][0]["logprobs"]
    assert none["top_logprobs"] is None
    assert len(none["token_logprobs"]) == len(none["tokens"])


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_do_not_spell_a_stop_string(model_dir: Path, group: FakeGroup, stream: bool) -> None:
    response = await chat(model_dir, group, logprobs=True, stop="ow are", stream=stream)
    chunks = [json.loads(data) for data in data_of(response.content)[:-1]] if stream else [response.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    spelled = [
        info["token"] for choice in choices if choice["logprobs"] for info in choice["logprobs"]["content"]
    ]
    assert "".join(spelled) == "Hello world,"


# Streams


async def test_a_chat_stream_has_the_recorded_shape(model_dir: Path, group: FakeGroup) -> None:
    response = await chat(model_dir, group, stream=True, stream_options={"include_usage": True}, max_tokens=2)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = data_of(response.content)
    assert done == b"[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    id, created = parsed[0]["id"], parsed[0]["created"]
    head = f'"id":"{id}","object":"chat.completion.chunk","created":{created},"model":"demo"'
    num_prompt = len(group.requests[0].prompt_ids)
    usage = (
        f'{{"prompt_tokens":{num_prompt},"completion_tokens":2,"total_tokens":{num_prompt + 2},'
        '"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,'
        '"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}'
    )

    def chunk(choices: str, usage: str = "null") -> bytes:
        return f'{{{head},"choices":[{choices}],"system_fingerprint":"fp_fake","usage":{usage}}}'.encode()

    def choice(delta: str, finish_reason: str = "null") -> str:
        return f'{{"index":0,"delta":{{{delta}}},"logprobs":null,"finish_reason":{finish_reason}}}'

    assert chunks == [
        chunk(choice('"role":"assistant","content":"","refusal":null')),
        chunk(choice('"content":"Hello"')),
        chunk(choice('"content":" world"')),
        chunk(choice("", '"length"')),
        chunk("", usage),
    ]


async def test_usage_is_absent_unless_asked_for(model_dir: Path, group: FakeGroup) -> None:
    for ask_for in (chat, complete):
        *chunks, _ = data_of((await ask_for(model_dir, group, stream=True)).content)
        assert not any("usage" in json.loads(chunk) for chunk in chunks)
        assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("ask_for", [chat, complete])
async def test_usage_on_every_chunk(model_dir: Path, group: FakeGroup, ask_for: Callable[..., Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await ask_for(model_dir, group, stream=True, stream_options=options, max_tokens=3)
    chunks = [json.loads(data) for data in data_of(response.content)[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert {1, 2, 3} <= set(counts)
    assert chunks[-1]["choices"] == []


async def test_completion_streams_carry_every_choice(model_dir: Path, group: FakeGroup) -> None:
    response = await complete(model_dir, group, prompt=["a", "b"], n=2, stream=True, logprobs=1)
    *chunks, done = data_of(response.content)
    assert done == b"[DONE]"
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for data in chunks:
        [choice] = json.loads(data)["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == dict.fromkeys(range(4), TEXT)
    assert ends == dict.fromkeys(range(4), "stop")


async def test_chat_choices_each_begin_with_their_role(model_dir: Path, group: FakeGroup) -> None:
    *chunks, _ = data_of((await chat(model_dir, group, stream=True, n=3)).content)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", ["how", "w are you", ["xyz", "ello"]])
async def test_streams_never_show_part_of_a_stop_string(
    model_dir: Path, group: FakeGroup, stop: str | list[str]
) -> None:
    response = await chat(model_dir, group, stream=True, stop=stop)
    cut = min(TEXT.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in TEXT)
    assert "".join(texts_of(response.content)) == TEXT[:cut]
    assert group.closed_early


async def test_characters_are_whole_in_every_chunk(model_dir: Path) -> None:
    text = "Grüße 🦆🦆 ß"
    response = await chat(model_dir, make_group(model_dir, text), stream=True)
    parts = texts_of(response.content)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


# Failures


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize(
    ("failure", "code", "error_type"),
    [
        (WorkerLost("rank 1 at 0x7f of host-7 died"), "worker_lost", "server_error"),
        (TimeoutError("secret"), "timeout", "server_error"),
        (RequestError("internal", "secret"), "generation_failed", "server_error"),
        (
            RequestError("too_long", "too long: 700 tokens"),
            "context_length_exceeded",
            "invalid_request_error",
        ),
        (KeyError("secret"), "internal_error", "server_error"),
    ],
)
async def test_a_stream_that_fails_says_so_and_never_ends_well(
    model_dir: Path,
    group: FakeGroup,
    path: str,
    num_choices: int,
    failure: Exception | RequestError,
    code: str,
    error_type: str,
) -> None:
    group.fails_after, group.fails_with = 2, failure
    base = CHAT if "chat" in path else RAW
    response = await ask(model_dir, group, path, base | {"stream": True, "n": num_choices})
    assert response.status_code == 200
    *chunks, last = [json.loads(data) for data in data_of(response.content)]
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert last["error"]["type"] == error_type
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert b"secret" not in response.content
    assert b"0x7f" not in response.content
    assert b"DONE" not in response.content
    assert not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
    assert group.num_outstanding == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "headers"),
    [
        (WorkerLost("x"), 503, {"retry-after": "1"}),
        (WorkerUnavailable("x", 7), 503, {"retry-after": "7"}),
        (TimeoutError("x"), 504, {"x-should-retry": "false"}),
        (RequestError("internal", "x"), 500, {"x-should-retry": "false"}),
        (RequestError("invalid_request", "no such token"), 400, {}),
        (RequestError("too_long", "700 tokens"), 400, {}),
    ],
)
async def test_a_failure_before_the_first_token_has_a_status(
    model_dir: Path,
    group: FakeGroup,
    stream: bool,
    failure: Exception | RequestError,
    status: int,
    headers: dict[str, str],
) -> None:
    group.fails_after, group.fails_with = 0, failure
    response = await chat(model_dir, group, stream=stream)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert headers.items() <= dict(response.headers).items()
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_failure_in_the_middle_fails_a_whole_answer(model_dir: Path, group: FakeGroup) -> None:
    group.fails_after = 3
    response = await chat(model_dir, group, n=2)
    assert response.status_code == 503
    assert "choices" not in response.json()
    assert group.num_outstanding == 0


async def test_a_sequence_without_an_end_is_an_error(model_dir: Path, group: FakeGroup) -> None:
    group.says, group.eos_id = [], None
    response = await chat(model_dir, group)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


@pytest.mark.parametrize(
    ("fields", "param", "fragments"),
    [
        ({"prompt": [1] * 512}, "prompt", ["512 tokens", "513 tokens (512 in the prompt, 1 in"]),
        ({"prompt": [1] * 500, "max_tokens": 13}, "prompt", ["513 tokens (500 in the prompt, 13 in"]),
    ],
)
async def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(
    model_dir: Path, group: FakeGroup, fields: dict[str, Any], param: str, fragments: list[str]
) -> None:
    response = await complete(model_dir, group, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert all(fragment in error["message"] for fragment in fragments)
    assert not group.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, 100_000]}, "prompt"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ],
)
async def test_ids_outside_the_vocabulary_are_refused(
    model_dir: Path, group: FakeGroup, fields: dict[str, Any], param: str
) -> None:
    response = await complete(model_dir, group, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not group.requests


async def test_the_template_may_refuse(model_dir: Path, group: FakeGroup) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    response = await chat(model_dir, group, messages=messages)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert "system comes first" in error["message"]


async def test_an_unknown_model_is_not_found(model_dir: Path, group: FakeGroup) -> None:
    response = await chat(model_dir, group, model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The model 'gpt-9' does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": None,
        "code": "model_not_found",
    }
    answer = (await chat(model_dir, group, model="org/demo")).json()
    assert answer["model"] == "org/demo"


@pytest.mark.parametrize(
    ("state", "code", "header"),
    [
        (GroupState.STARTING, "model_not_ready", "retry-after"),
        (GroupState.RESTARTING, "model_not_ready", "retry-after"),
        (GroupState.DRAINING, "shutting_down", "retry-after"),
        (GroupState.FAILED, "model_failed", "x-should-retry"),
    ],
)
async def test_a_model_that_is_not_ready_is_503(
    model_dir: Path, group: FakeGroup, state: GroupState, code: str, header: str
) -> None:
    group.state = state
    response = await chat(model_dir, group, stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert response.headers[header] in ("5", "false")


async def test_a_full_queue_is_429(model_dir: Path, group: FakeGroup) -> None:
    """Two run and three may wait, two of them in the group."""
    assert group.info is not None
    group.info, group.waits_after = msgspec.structs.replace(group.info, max_num_seqs=2), 0
    app = create_app(Settings(), [make_served(model_dir, group, max_queued=3)])
    async with client_of(app) as client:
        first = asyncio.create_task(client.post("/v1/completions", json=RAW | {"n": 3}))
        await until(lambda: group.num_outstanding == 3)
        refused = await client.post("/v1/completions", json=RAW | {"n": 3})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        second = asyncio.create_task(client.post("/v1/completions", json=RAW | {"n": 2}))
        await until(lambda: group.num_outstanding == 4)
        assert (await client.post("/v1/completions", json=RAW)).status_code == 429
        assert 'num_requests_queued{model_name="demo"} 1.0' in (await client.get("/metrics")).text
        group.go_on.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert (await client.post("/v1/completions", json=RAW)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_the_log_of_a_failure_names_the_request(
    model_dir: Path, group: FakeGroup, caplog: pytest.LogCaptureFixture, path: str, stream: bool
) -> None:
    group.fails_after, group.fails_with = 2, WorkerLost("rank 1 died")
    base = CHAT if "chat" in path else RAW
    response = await ask(model_dir, group, path, base | {"stream": stream})
    request_id = response.headers["x-request-id"]
    assert [record.getMessage() for record in caplog.records if record.name == "gateway.errors"] == [
        f"POST {path} ({request_id}): WorkerLost: rank 1 died"
    ]


async def test_unexpected_exceptions_say_nothing_of_the_inside(
    model_dir: Path, group: FakeGroup, caplog: pytest.LogCaptureFixture
) -> None:
    group.fails_after, group.fails_with = 0, RuntimeError("/home/x at 0x7fff")
    response = await chat(model_dir, group)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The server had an error.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "0x7fff" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, None),
        ("POST", "/v1/models", 405, "method_not_supported"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("GET", "/docs", 404, None),
        ("GET", "/v1/models/none/such", 404, "model_not_found"),
    ],
)
async def test_every_error_has_openais_shape(
    model_dir: Path, group: FakeGroup, method: str, path: str, status: int, code: str | None
) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


# Models, health, metrics


async def test_models_are_listed_by_all_their_names(model_dir: Path, group: FakeGroup) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/demo")).json()
        encoded = (await client.get("/v1/models/org%2Fdemo")).json()
    assert [model["id"] for model in listed["data"]] == ["demo", "org/demo"]
    assert listed["object"] == "list"
    assert one == encoded == listed["data"][1]
    openai_s = {"id": "org/demo", "object": "model", "created": 1_700_000_000, "owned_by": "sluice"}
    anthropic_s = {
        "type": "model",
        "display_name": "org/demo",
        "created_at": "2023-11-14T22:13:20Z",
        "lifecycle": "active",
    }
    assert one == openai_s | anthropic_s


async def test_readiness_shows_how_far_loading_is(model_dir: Path, group: FakeGroup) -> None:
    group.state, group.progress, group.failure = GroupState.STARTING, Progress("load", 0.421), "/secret/path"
    async with client_of(make_app(model_dir, group)) as client:
        assert (await client.get("/livez")).status_code == 200
        response = await client.get("/readyz")
        health = await client.get("/health")
        group.state = GroupState.READY
        assert (await client.get("/readyz")).status_code == 200
    assert response.status_code == health.status_code == 503
    [status] = response.json()["models"][0]["groups"]
    assert (status["state"], status["phase"], status["percent"]) == ("starting", "load", 39)
    assert "secret" not in response.text
    assert "/secret/path" in health.text


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_probes_may_ask_for_no_body(path: str, model_dir: Path, group: FakeGroup) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        assert (await client.head(path)).status_code == 200


async def test_a_start_is_shown_before_anything_has_reported(model_dir: Path, group: FakeGroup) -> None:
    group.state = GroupState.STARTING
    async with client_of(make_app(model_dir, group)) as client:
        [status] = (await client.get("/readyz")).json()["models"][0]["groups"]
    assert (status["phase"], status["percent"]) == ("start", 0)


async def test_a_server_that_shuts_down_says_so(model_dir: Path, group: FakeGroup) -> None:
    group.state = GroupState.DRAINING
    async with client_of(make_app(model_dir, group)) as client:
        ready, refused = await client.get("/readyz"), await client.post("/v1/completions", json=RAW)
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert "shutting down" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1


async def test_every_model_needs_a_ready_group(model_dir: Path) -> None:
    one, other = make_group(model_dir), make_group(model_dir, state=GroupState.RESTARTING)
    spare = make_group(model_dir, name="fake/1")
    served = [
        make_served(model_dir, one, name="a", aliases=()),
        make_served(model_dir, other, spare, name="b", aliases=()),
    ]
    async with client_of(create_app(Settings(), served)) as client:
        assert (await client.get("/readyz")).status_code == 200
        spare.state = GroupState.STARTING
        assert (await client.get("/readyz")).status_code == 503


async def test_metrics_count_what_happened(model_dir: Path, group: FakeGroup) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        await client.post("/v1/completions", json=RAW | {"max_tokens": 3, "n": 2})
        await client.post("/v1/completions", json=RAW | {"max_tokens": 16})
        await client.post("/v1/completions", json=RAW | {"stop": "how"})
        await client.post("/v1/completions", json=RAW | {"model": "hostile\nname"})
        group.fails_after = 1
        await client.post("/v1/completions", json=RAW)
        text = (await client.get("/metrics")).text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    reasons = {
        reason: samples[f'sluice:request_success_total{{finished_reason="{reason}",model_name="demo"}}']
        for reason in ("stop", "length", "abort", "error")
    }
    assert reasons == {"stop": "2.0", "length": "2.0", "abort": "0.0", "error": "1.0"}
    assert samples['sluice:time_to_first_token_seconds_count{model_name="demo"}'] == "5.0"
    assert samples['sluice:e2e_request_latency_seconds_count{model_name="demo"}'] == "5.0"
    num_generated = 3 + 3 + len(group.says) + 1 + len(ids_of(model_dir, "Hello world, how")) + 1
    assert samples['sluice:generation_tokens_total{model_name="demo"}'] == f"{num_generated}.0"
    assert samples['sluice:request_errors_total{code="model_not_found"}'] == "1.0"
    assert samples['sluice:group_ready{engine="0",model_name="demo"}'] == "0.0"  # it died
    assert "hostile" not in text


async def test_metrics_tell_a_first_start_from_the_others(model_dir: Path, group: FakeGroup) -> None:
    found = []
    async with client_of(make_app(model_dir, group)) as client:
        for state, num_restarts in (("starting", 0), ("ready", 0), ("failed", 0), ("starting", 1)):
            group.state, group.num_restarts = GroupState(state), num_restarts
            lines = (await client.get("/metrics")).text.splitlines()
            found += [line[-3:] for line in lines if line.startswith("sluice:group_first_start{")]
    assert found == ["1.0", "0.0", "0.0", "0.0"]


async def test_metrics_show_the_process(model_dir: Path, group: FakeGroup) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    values = dict(line.split() for line in lines if line.startswith("process_"))
    assert float(values["process_resident_memory_bytes"]) > 1 << 20
    assert float(values["process_open_fds"]) > 2


async def test_metrics_show_the_heartbeat(model_dir: Path, group: FakeGroup) -> None:
    from engines.wire import Stats

    group.stats = Stats(
        num_steps=9, num_running=3, num_waiting=2, num_blocks_used=1, num_blocks_cached=1, num_blocks_free=2,
        num_preemptions=4, num_prefix_queries=10, num_prefix_hits=6,
        num_drafted_tokens=8, num_accepted_tokens=5,
    )  # fmt: skip
    group.num_restarts = 2
    async with client_of(make_app(model_dir, group)) as client:
        text = (await client.get("/metrics")).text
    labels = '{engine="0",model_name="demo"}'
    for sample in (
        f"sluice:num_requests_running{labels} 3.0",
        f"sluice:num_requests_waiting{labels} 2.0",
        f"sluice:kv_cache_usage_perc{labels} 0.25",
        f"sluice:num_preemptions_total{labels} 4.0",
        f"sluice:prefix_cache_queries_total{labels} 10.0",
        f"sluice:prefix_cache_hits_total{labels} 6.0",
        f"sluice:spec_decode_num_draft_tokens_total{labels} 8.0",
        f"sluice:spec_decode_num_accepted_tokens_total{labels} 5.0",
        f"sluice:group_restarts_total{labels} 2.0",
    ):
        assert sample in text.splitlines()


# Routing


async def test_replicas_get_the_least_outstanding_work(model_dir: Path) -> None:
    first, second = make_group(model_dir), make_group(model_dir, name="fake/1")
    down = make_group(model_dir, name="fake/2", state=GroupState.RESTARTING)
    app = make_app(model_dir, first, second, down)
    first.num_outstanding = 2
    first.waits_after = second.waits_after = 0
    async with client_of(app) as client:
        asking = asyncio.create_task(
            client.post("/v1/completions", json=RAW | {"prompt": ["a", "b", "c", "d"]})
        )
        await until(lambda: first.num_outstanding + second.num_outstanding == 6)
        first.go_on.set()
        second.go_on.set()
        assert (await asking).status_code == 200
    assert (len(first.requests), len(second.requests), len(down.requests)) == (1, 3, 0)


def test_two_models_cannot_share_a_name(model_dir: Path, group: FakeGroup) -> None:
    served = [make_served(model_dir, group), make_served(model_dir, group, name="other")]
    with pytest.raises(ValueError, match="'org/demo'"):
        create_app(Settings(), served)


def test_importing_the_application_loads_no_torch() -> None:
    code = (
        "import sys, gateway.app;"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


async def test_metrics_show_how_busy_the_stages_of_a_pipeline_are(model_dir: Path, group: FakeGroup) -> None:
    from engines.wire import Stats

    group.stats = Stats(num_steps=9, active_seconds=8.0, stage_busy_seconds=[6.0, 4.0])
    async with client_of(make_app(model_dir, group)) as client:
        text = (await client.get("/metrics")).text
    labels = 'engine="0",model_name="demo"'
    for sample in (
        f'sluice:pipeline_stage_busy_share{{{labels},stage="0"}} 0.75',
        f'sluice:pipeline_stage_busy_share{{{labels},stage="1"}} 0.5',
        f'sluice:pipeline_stage_busy_seconds_total{{{labels},stage="1"}} 4.0',
        f"sluice:pipeline_active_seconds_total{{{labels}}} 8.0",
        f"sluice:pipeline_bubble{{{labels}}} 0.375",
    ):
        assert sample in text

"""POST /v1/embeddings over groups whose vectors are known: inputs, limits, mistakes, OpenAI's SDK."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from engines.wire import Generate, Pooling, RequestError, TokenDelta
from gateway.app import create_app
from gateway.embedding import MAX_TOGETHER
from gateway.keys import file_line
from gateway.settings import Settings
from gateway.workers.protocol import GroupState, Take, WorkerLost
from tests.fakes import HIDDEN_SIZE, FakeGroup, fake_embedding
from tests.gateway.serving import client_of, ids_of, listening, make_app, make_group, make_served

pytestmark = pytest.mark.anyio
BEGIN = 0
"""The id of <|begin|>, which the tokenizer puts before a text."""
MEAN = Pooling(method="mean")


@asynccontextmanager
async def client_for(model_dir: Path, *groups: FakeGroup, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(model_dir, *groups, **{"pooling": "mean", **options})) as client:
        yield client


@pytest.fixture
async def client(model_dir: Path, group: FakeGroup) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(model_dir, group) as client:
        yield client


async def ask(client: httpx.AsyncClient, input: object, **fields: object) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": "demo", "input": input, **fields})


async def refusal(client: httpx.AsyncClient, input: object, **fields: object) -> tuple[str | None, str]:
    """The param and the message of a 400."""
    answer = await ask(client, input, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["message"]


def floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def vector_of(ids: list[int], pooling: Pooling = MEAN) -> list[float]:
    return floats(fake_embedding(ids, pooling))


async def test_a_text_becomes_a_vector(client: httpx.AsyncClient, group: FakeGroup, model_dir: Path) -> None:
    answer = await ask(client, "Hello world", user="me")
    ids = [BEGIN, *ids_of(model_dir, "Hello world")]
    assert answer.json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector_of(ids)}],
        "model": "demo",
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
    }
    (request,) = group.requests
    assert (request.prompt_ids, request.max_tokens, request.pooling) == (ids, 0, MEAN)


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_the_pooling_is_the_models(model_dir: Path, group: FakeGroup, pooling: str) -> None:
    async with client_for(model_dir, group, pooling=pooling) as client:
        answer = await ask(client, [5, 6, 7])
    method = Pooling(method=pooling)  # type: ignore[arg-type]
    assert answer.json()["data"][0]["embedding"] == vector_of([5, 6, 7], method)


async def test_inputs_come_in_four_ways_and_keep_their_order(
    client: httpx.AsyncClient, model_dir: Path
) -> None:
    texts = ["Hello", "world", "how are you"]
    ids = [[BEGIN, *ids_of(model_dir, text)] for text in texts]
    for input, expected in ((texts[1], ids[1:2]), (texts, ids), (ids[2], ids[2:]), (ids, ids)):
        answer = (await ask(client, input)).json()
        assert [one["embedding"] for one in answer["data"]] == [vector_of(each) for each in expected]
        assert [one["index"] for one in answer["data"]] == list(range(len(expected)))
        assert answer["usage"]["total_tokens"] == sum(map(len, expected))


async def test_special_tokens_can_be_left_out_and_inputs_cut(
    client: httpx.AsyncClient, group: FakeGroup, model_dir: Path
) -> None:
    ids = ids_of(model_dir, "Hello world")
    await ask(client, "Hello world", add_special_tokens=False)
    await ask(client, [*range(10, 20)], truncate_prompt_tokens=3)
    await ask(client, [7] * 600, truncate_prompt_tokens=-1)
    assert [request.prompt_ids for request in group.requests] == [ids, [17, 18, 19], [7] * 512]
    assert (await refusal(client, "a", truncate_prompt_tokens=0))[0] == "truncate_prompt_tokens"


async def test_base64_is_of_the_same_numbers(client: httpx.AsyncClient) -> None:
    plain = (await ask(client, [[5, 6], [7]], encoding_format="float")).json()["data"]
    coded = (await ask(client, [[5, 6], [7]], encoding_format="base64")).json()["data"]
    assert [floats(base64.b64decode(one["embedding"])) for one in coded] == [
        one["embedding"] for one in plain
    ]


async def test_dimensions_are_asked_of_the_group(client: httpx.AsyncClient, group: FakeGroup) -> None:
    answer = await ask(client, [5], dimensions=2)
    assert len(answer.json()["data"][0]["embedding"]) == 2
    assert group.requests[0].pooling == Pooling(method="mean", dimensions=2)
    assert len((await ask(client, [5], dimensions=HIDDEN_SIZE)).json()["data"][0]["embedding"]) == HIDDEN_SIZE
    param, message = await refusal(client, [5], dimensions=HIDDEN_SIZE + 1)
    assert param == "dimensions"
    assert f"this model's vectors have {HIDDEN_SIZE}" in message
    assert len(group.requests) == 2


class Counting(FakeGroup):
    """Knows how many sequences it had at once, each of them for a while."""

    most = 0

    async def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
        async with aclosing(super().generate(request)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                self.most = max(self.most, self.num_outstanding)
                await asyncio.sleep(0)
                yield batch


async def test_as_many_inputs_as_openai_takes_though_few_run_at_once(model_dir: Path) -> None:
    group = Counting(says=[], info=make_group(model_dir).info)
    async with client_for(model_dir, group) as client:
        answer = await ask(client, [[5 + number % 300] for number in range(2048)])
        assert [one["embedding"] for one in answer.json()["data"]] == [
            vector_of([5 + number % 300]) for number in range(2048)
        ]
        assert group.most == MAX_TOGETHER
        param, message = await refusal(client, [[5]] * 2049)
    assert (param, message) == (
        "input",
        "Invalid value for 'input': at most 2048 inputs are allowed in a request, not 2049.",
    )


@pytest.mark.parametrize(
    ("input", "param"),
    [
        ("", "input"),
        ([], "input"),
        ([[]], "input"),
        (["a", ""], "input[1]"),
        ([[5], [6], []], "input[2]"),
        (["a", [5]], "input"),
        ([5, "a"], "input"),
        ([5, -1], "input"),
        ([5.5], "input"),
        ({"text": "a"}, "input"),
        (None, "input"),
        ([[5], [100_000]], "input[1]"),
        ([100_000], "input"),
    ],
)
async def test_bad_inputs_are_named(
    client: httpx.AsyncClient, group: FakeGroup, input: object, param: str
) -> None:
    assert (await refusal(client, input))[0] == param
    assert group.requests == []


async def test_an_input_that_is_too_long_is_named(client: httpx.AsyncClient, group: FakeGroup) -> None:
    answer = await ask(client, [[5], [6] * 513])
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "This model's maximum context length is 512 tokens. However, 'input[1]' has 513 tokens."
        " Please reduce its length.",
        "type": "invalid_request_error",
        "param": "input[1]",
        "code": "context_length_exceeded",
    }
    assert group.requests == []
    assert (await ask(client, [6] * 512)).status_code == 200


async def test_fields_are_decided(client: httpx.AsyncClient) -> None:
    assert (await refusal(client, "a", encoding_format="hex"))[0] == "encoding_format"
    assert (await refusal(client, "a", dimensions=0))[0] == "dimensions"
    assert (await refusal(client, "a", normalize=False))[0] == "normalize"
    assert "dimension" in (await refusal(client, "a", dimension=4))[1]
    answer = await client.post("/v1/embeddings", json={"model": "nobody", "input": "a"})
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_a_model_without_pooling_says_how_to_have_them(model_dir: Path, group: FakeGroup) -> None:
    other = make_served(model_dir, make_group(model_dir), name="vectors", aliases=(), pooling="last")
    plain = make_served(model_dir, group, pooling=None)
    async with client_of(create_app(Settings(), [plain])) as client:
        answer = await ask(client, "Hello")
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "The model 'demo' serves no embeddings. To have them, set 'pooling: mean' or"
        " 'pooling: last', as the model was trained for, in its model-config.yaml (on the command line:"
        " --pooling).",
        "type": "invalid_request_error",
        "param": "model",
        "code": "no_embeddings",
    }
    async with client_of(create_app(Settings(), [plain, other])) as client:
        assert "Ask 'vectors', or set" in (await refusal(client, "Hello"))[1]
    assert group.requests == []


async def test_a_model_with_pooling_generates_too(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hello"})
    assert answer.json()["choices"][0]["text"] == "Hello world, how are you today?"


async def test_another_group_does_what_a_dead_one_had(model_dir: Path) -> None:
    dying = make_group(model_dir, fails_after=0, fails_with=WorkerLost("rank 1 died"), name="demo/0")
    alive = make_group(model_dir, name="demo/1", num_outstanding=1)
    async with client_for(model_dir, dying, alive) as client:
        answer = await ask(client, [5, 6])
        metrics = (await client.get("/metrics")).text
    assert answer.json()["data"][0]["embedding"] == vector_of([5, 6])
    assert [len(group.requests) for group in (dying, alive)] == [1, 1]
    assert 'sluice:streams_resumed_total{model_name="demo",where="replica"} 1.0' in metrics


async def test_one_failure_ends_the_request_and_its_mates(model_dir: Path) -> None:
    group = make_group(model_dir, fails_after=0, fails_with=RequestError("internal", "states"))
    async with client_for(model_dir, group) as client:
        answer = await ask(client, [[5], [6]])
        metrics = (await client.get("/metrics")).text
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "generation_failed"
    assert group.num_outstanding == 0
    assert 'finished_reason="error",model_name="demo"} 0' not in metrics


async def test_a_client_that_leaves_takes_its_sequences_along(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=0)
    app = make_app(model_dir, group, pooling="mean")
    async with client_of(app) as client:
        asking = asyncio.create_task(ask(client, [[5], [6], [7]]))
        while len(group.requests) < 3:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(30):
            while group.num_outstanding:
                await asyncio.sleep(0.001)
    assert sorted(group.closed_early) == sorted(request.id for request in group.requests)
    assert app.state.gateway.admissions["demo"]._num_admitted == 0


async def test_prompts_are_counted_and_ends(client: httpx.AsyncClient) -> None:
    await ask(client, [[5, 6, 7], [8]])
    metrics = (await client.get("/metrics")).text
    assert 'sluice:prompt_tokens_total{model_name="demo"} 4.0' in metrics
    assert 'sluice:generation_tokens_total{model_name="demo"} 0.0' in metrics
    assert 'sluice:request_success_total{finished_reason="stop",model_name="demo"} 2.0' in metrics


async def test_a_keys_limit_is_for_inputs_too(model_dir: Path, group: FakeGroup, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(file_line("a", "secret-of-a")[:-1] + ", tokensPerMinute: 5}")
    keys.chmod(0o600)
    async with client_for(model_dir, group, settings=Settings(api_key_file=keys)) as client:
        client.headers["authorization"] = "Bearer secret-of-a"
        first = await ask(client, [5, 6, 7])
        second = await ask(client, [5, 6, 7])
        third = await ask(client, [5] * 6)
    assert [first.status_code, second.status_code, third.status_code] == [200, 429, 429]
    assert third.json()["error"]["code"] == "request_over_limit"
    assert len({request.cache_salt for request in group.requests}) == 1
    assert group.requests[0].cache_salt


async def test_no_group_is_ready(model_dir: Path, group: FakeGroup) -> None:
    group.state = GroupState.STARTING
    async with client_for(model_dir, group) as client:
        answer = await ask(client, "Hello")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_not_ready"


def test_openais_sdk_asks_for_base64_by_itself(model_dir: Path, group: FakeGroup) -> None:
    with listening(make_app(model_dir, group, pooling="mean")) as url:
        sdk = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = sdk.embeddings.create(model="demo", input=["Hello", "world"])
        raw = sdk.embeddings.with_raw_response.create(model="demo", input="Hello", encoding_format="base64")
        with pytest.raises(BadRequestError, match="is empty"):
            sdk.embeddings.create(model="demo", input=["Hello", ""])
        sdk._strict_response_validation = True  # which takes the SDK's own base64 for a mistake
        plain = sdk.embeddings.create(model="demo", input=["Hello", "world"], encoding_format="float")
    assert isinstance(raw.http_response.json()["data"][0]["embedding"], str)
    assert [one.embedding for one in answer.data] == [one.embedding for one in plain.data]
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 2

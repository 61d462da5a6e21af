"""OpenAI's own client against the gateway on a socket: what it reads, raises and retries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gateway.settings import Settings
from gateway.workers.protocol import WorkerUnavailable
from tests.fakes import FakeGroup
from tests.gateway.serving import listening, make_app

pytestmark = pytest.mark.anyio
TEXT = "Hello world, how are you today?"
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
KEY = "sk-test"


@pytest.fixture
def url(model_dir: Path, group: FakeGroup) -> Iterator[str]:
    with listening(make_app(model_dir, group, settings=Settings(api_keys=(KEY,)))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, user="me"
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer._request_id
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(info.token for info in logprobs.content) == TEXT


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == TEXT
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


def test_completions(client: OpenAI) -> None:
    client._strict_response_validation = False  # its type for chunks forgets that finish_reason may be null
    whole = client.completions.create(model="demo", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in whole.choices] == [TEXT, TEXT]
    chunks = list(client.completions.create(model="demo", prompt=[5, 6], stream=True, max_tokens=3))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world,"


async def test_async(async_client: AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"
    stream = await async_client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == TEXT
    async_client._strict_response_validation = False
    text = await async_client.completions.create(model="demo", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in text]) == TEXT


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "org/demo"]
    assert client.models.retrieve("org/demo").owned_by == "sluice"


def test_errors_have_their_classes(client: OpenAI, group: FakeGroup) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: foo"):
        client.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"foo": 1})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    group.num_outstanding = 10_000
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="demo", messages=MESSAGES)


def test_a_stream_that_breaks_raises(client: OpenAI, group: FakeGroup) -> None:
    group.fails_after = 2
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    parts = []
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012
        for chunk in stream:
            parts.append(chunk.choices[0].delta.content or "")
    assert "".join(parts) == "Hello world"
    assert caught.value.code == "worker_lost"


@pytest.mark.parametrize(("failure", "num_tries"), [(WorkerUnavailable("x"), 2), (TimeoutError("x"), 1)])
def test_only_what_may_go_better_is_tried_again(
    client: OpenAI, group: FakeGroup, failure: Exception, num_tries: int
) -> None:
    group.fails_after, group.fails_with = 0, failure
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=1).chat.completions.create(model="demo", messages=MESSAGES)
    assert len(group.requests) == num_tries

"""Streams and clients that leave, over a real socket where the socket matters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engines.wire import Generate, RequestError, TokenDelta
from gateway.settings import Settings
from gateway.workers.protocol import Take
from tests.fakes import FakeGroup, ready
from tests.gateway.serving import data_of, make_app, make_group, served

pytestmark = pytest.mark.anyio
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


async def until(condition: Any) -> None:
    """Waits, half a minute at most, until it is true."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("waits_after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_when_the_client_leaves_every_sequence_is_aborted(
    model_dir: Path, waits_after: int, stream: bool, n: int
) -> None:
    group = make_group(model_dir, waits_after=waits_after)
    async with served(make_app(model_dir, group)) as client:
        asking = asyncio.create_task(
            client.post("/v1/chat/completions", json=CHAT | {"stream": stream, "n": n})
        )
        await until(lambda: group.num_outstanding == n)
        await asyncio.sleep(0.02)
        asking.cancel()
        await until(lambda: group.num_outstanding == 0)
        assert sorted(group.closed_early) == sorted(request.id for request in group.requests)
        metrics = (await client.get("/metrics")).text
    assert f'finished_reason="abort",model_name="demo"}} {n}.0' in metrics


async def test_when_one_choice_fails_the_others_are_aborted(model_dir: Path) -> None:
    error = RequestError("internal", "it went wrong")
    waiting = make_group(model_dir, waits_after=2)
    failing = make_group(model_dir, fails_after=2, fails_with=error)

    class Mixed(FakeGroup):
        def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
            return (failing if request.choice == 1 else waiting).generate(request)

    group = Mixed(says=[], info=waiting.info)
    async with served(make_app(model_dir, group)) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True, "n": 3})
        await until(lambda: waiting.num_outstanding == 0)
    assert json.loads(data_of(response.content)[-1])["error"]["code"] == "generation_failed"
    assert len(waiting.closed_early) == 2


async def test_silence_is_filled_with_comments(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=3)
    settings = Settings(ping_interval=0.02)
    async with (
        served(make_app(model_dir, group, settings=settings)) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response,
    ):
        content = b""
        async for part in response.aiter_raw():
            content += part
            if content.count(b": ping\n\n") >= 3:
                group.go_on.set()
    assert content.endswith(b"data: [DONE]\n\n")
    assert data_of(content)[-1] == b"[DONE]"


async def test_headers_do_not_wait_for_ever_for_the_first_token(model_dir: Path) -> None:
    group = make_group(model_dir, waits_after=0, fails_after=0)
    settings = Settings(first_delta_wait=0.01, ping_interval=0.02)
    async with (
        served(make_app(model_dir, group, settings=settings)) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response,
    ):
        assert response.status_code == 200
        content = b""
        async for part in response.aiter_raw():
            content += part
            group.go_on.set()
    [error] = data_of(content)
    assert json.loads(error)["error"]["code"] == "worker_lost"


async def test_a_client_that_does_not_read_is_given_up(model_dir: Path) -> None:
    group = make_group(model_dir, info=ready(400, max_model_len=10**7))
    group.says = group.says * 6_000  # more than the kernel holds
    settings = Settings(send_timeout=0.2)
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with served(make_app(model_dir, group, settings=settings)) as client:
        url = client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=1)
        writer.write(head + body)
        await writer.drain()
        await until(lambda: group.requests)
        await until(lambda: group.closed_early)
        assert (await client.get("/livez")).status_code == 200
        with pytest.raises(ConnectionResetError):  # not left to the kernel with what it has not read
            await reader.read()
        writer.close()


class AtOnce(FakeGroup):
    """All that it says has come before anybody looks."""

    async def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
        yield [delta async for batch in super().generate(request) for delta in batch]


@pytest.mark.parametrize("fails", [False, True])
async def test_what_came_together_is_told_token_by_token_up_to_the_end_or_the_failure(
    model_dir: Path, fails: bool
) -> None:
    one_by_one = make_group(model_dir)
    group = AtOnce(
        says=one_by_one.says,
        eos_id=one_by_one.eos_id,
        info=one_by_one.info,
        fails_after=3 if fails else None,
        fails_with=RequestError("internal", "it went wrong"),
    )
    told = []
    for answering in (one_by_one, group):
        async with served(make_app(model_dir, answering)) as client:
            response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        told.append(data_of(response.content))
    deltas = [
        [json.loads(data)["choices"][0]["delta"] for data in one if data.startswith(b'{"id"')] for one in told
    ]
    if fails:
        assert deltas[1] == deltas[0][:4], "the role and three tokens"
        assert json.loads(told[1][-1])["error"]["code"] == "generation_failed"
    else:
        assert deltas[1] == deltas[0]
        assert len(deltas[0]) > 5
        assert told[1][-1] == b"[DONE]"

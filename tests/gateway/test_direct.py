"""Tokens past the generators: the same answers, to the byte; whatever cannot go that way goes the other."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.wire import TokenDelta
from gateway.http_connection import AnswerPush
from gateway.prompt.detokenize import Detokenizer
from gateway.settings import Settings
from gateway.workers.connection import Inbox
from tests.fakes import ready
from tests.gateway.serving import client_of, data_of, make_app, make_group, served, texts_of

pytestmark = pytest.mark.anyio

TEXT = "Grüße aus München: schöne Straße, 100 % natürlich. The quick brown fox jumps over the lazy dog."
ASKED = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 300},
    "/v1/chat/completions": {"messages": ASKED},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": ASKED, "max_tokens": 300},
}
OF_ONE_ANSWER = re.compile(rb'"(id|item_id|created|created_at|completed_at)":("[^"]*"|\d+)')
"""What is another one each time."""


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has gone the short way."""
    pieces: list[bytes] = []
    write = AnswerPush.write

    def counted(self: AnswerPush, data: bytes) -> None:
        pieces.append(data)
        write(self, data)

    monkeypatch.setattr(AnswerPush, "write", counted)
    return pieces


async def streamed(client: httpx.AsyncClient, path: str, **options: Any) -> bytes:
    response = await client.post(path, json={"model": "demo", "stream": True} | BODIES[path] | options)
    assert response.status_code == 200, response.text
    return response.content


@pytest.mark.parametrize("path", BODIES)
async def test_both_ways_say_the_same(path: str, model_dir: Path, pushed: list[bytes]) -> None:
    async with served(make_app(model_dir, make_group(model_dir, TEXT))) as client:
        short = await streamed(client, path)
    assert len(pushed) > len(TEXT) // 8, "all but the first and the last have gone the short way"
    num_pushed = len(pushed)
    async with client_of(make_app(model_dir, make_group(model_dir, TEXT))) as client:  # not our connection
        long = await streamed(client, path)
    assert len(pushed) == num_pushed
    assert OF_ONE_ANSWER.sub(b"", short) == OF_ONE_ANSWER.sub(b"", long)


@pytest.mark.parametrize(
    "options",
    [{"n": 2}, {"logprobs": True}, {"stop": ["lazy"]}, {"stream_options": {"include_usage": True}}],
    ids=lambda options: next(iter(options)),
)
async def test_whatever_is_asked_beside_the_text(
    options: dict[str, Any], model_dir: Path, pushed: list[bytes]
) -> None:
    path = "/v1/chat/completions"
    async with served(make_app(model_dir, make_group(model_dir, TEXT))) as client:
        short = await streamed(client, path, **options)
    assert bool(pushed) == ("stream_options" in options), "the others are looked into, or several"
    async with client_of(make_app(model_dir, make_group(model_dir, TEXT))) as client:
        long = await streamed(client, path, **options)
    assert sorted(data_of(OF_ONE_ANSWER.sub(b"", short))) == sorted(data_of(OF_ONE_ANSWER.sub(b"", long)))


async def test_an_echo_comes_before_the_text(model_dir: Path, pushed: list[bytes]) -> None:
    """Also where headers had to go out before there was a token: what is told of the prompt waits for one."""
    group = make_group(model_dir, TEXT, waits_after=0)
    async with served(make_app(model_dir, group, settings=Settings(first_delta_wait=0.01))) as client:
        asked = asyncio.create_task(streamed(client, "/v1/completions", prompt="Hello", echo=True))
        await asyncio.sleep(0.2)
        group.go_on.set()
        events = [json.loads(data) for data in data_of(await asked)[:-1]]
    texts = [choice["text"] for event in events for choice in event["choices"]]
    assert texts[0] == "Hello"
    assert "".join(texts) == f"Hello{TEXT}"
    assert not pushed


async def test_a_client_that_reads_slowly_gets_everything(model_dir: Path, pushed: list[bytes]) -> None:
    group = make_group(model_dir, info=ready(400, max_model_len=10**7))
    group.says = group.says * 3_000  # more than the kernel and the connection hold
    app = make_app(model_dir, group, settings=Settings(send_timeout=20))
    body = json.dumps({"model": "demo", "stream": True, "messages": ASKED}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    async with served(app) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=1)
        writer.write(head % len(body) + body)
        await asyncio.sleep(1)
        num_pushed = len(pushed)
        assert 0 < num_pushed < len(group.says), "it waits for its client"
        content = await reader.read()
        writer.close()
    chunked = content.partition(b"\r\n\r\n")[2]
    assert "".join(texts_of(b"".join(_chunks(chunked)))) == "Hello world, how are you today?" * 3_000


def _chunks(body: bytes) -> Iterator[bytes]:
    """Of a body in chunked encoding."""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return
        yield body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]


async def test_what_raises_on_the_short_way_ends_that_request(
    model_dir: Path, pushed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    group, push = make_group(model_dir, TEXT), Detokenizer.push

    def failing(self: Detokenizer, ids: list[int]) -> str:
        if len(pushed) == 5:
            raise RuntimeError("a fault of ours")
        return push(self, ids)

    async with served(make_app(model_dir, group)) as client:
        monkeypatch.setattr(Detokenizer, "push", failing)
        content = await streamed(client, "/v1/chat/completions")
        monkeypatch.setattr(Detokenizer, "push", push)
        assert json.loads(data_of(content)[-1])["error"]["type"] == "server_error"
        assert len(group.closed_early) == 1
        pushed.clear()
        assert "".join(texts_of(await streamed(client, "/v1/chat/completions"))) == TEXT


async def test_what_went_the_short_way_is_not_asked_for_again(model_dir: Path, pushed: list[bytes]) -> None:
    """When its group dies, the sequence is sent on with all tokens that its client has."""
    dying = make_group(model_dir, TEXT, fails_after=9)
    other = make_group(model_dir, TEXT, name="fake/1", num_outstanding=1)  # so the first choice is `dying`
    async with served(make_app(model_dir, dying, other)) as client:
        content = await streamed(client, "/v1/chat/completions")
    assert len(other.requests[0].resume_token_ids) == 9
    assert "".join(texts_of(content)) == TEXT
    assert len(pushed) > 9


async def test_an_inbox_offers_only_what_its_reader_waits_for() -> None:
    taken: list[int] = []
    refuses = False

    def take(delta: TokenDelta) -> bool:
        if not refuses:
            taken.extend(delta.token_ids)
        return not refuses

    def delta(id: int) -> TokenDelta:
        return TokenDelta(id="a", token_ids=[id])

    async def turn() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def give(id: int) -> None:
        if not inbox.offer(delta(id)):
            inbox.push(delta(id))

    inbox = Inbox("a", 0.0, take)
    give(1)  # nobody reads yet
    assert [one.token_ids for one in await inbox.next()] == [[1]]
    give(2)  # its reader is busy with the one before
    reading = asyncio.create_task(inbox.next())
    await turn()
    assert [one.token_ids for one in reading.result()] == [[2]]
    reading = asyncio.create_task(inbox.next())
    await turn()
    give(3)
    give(4)
    refuses = True
    give(5)
    refuses = False
    give(6)  # behind what its reader has not taken yet
    await turn()
    assert taken == [3, 4]
    assert [one.token_ids for one in reading.result()] == [[5], [6]]

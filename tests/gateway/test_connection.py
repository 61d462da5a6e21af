"""The gateway's end of a group's socket, against a peer that the test plays byte by byte."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from engines import wire
from engines.wire import (
    Abort,
    Failed,
    FromWorker,
    Generate,
    Progress,
    RequestError,
    Stats,
    TokenDelta,
    TokenLogprob,
    Tokens,
    ToWorker,
)
from gateway.workers.connection import Connection, Inbox, Report, accept, accept_peer, listen
from gateway.workers.protocol import WorkerLost

pytestmark = pytest.mark.anyio
FOREVER = 1000.0


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


class Peer:
    """Rank 0's end, and what the connection has told its owner."""

    def __init__(self, path: Path) -> None:
        self.reports: list[Report] = []
        self.losses: list[str] = []
        self.connection = Connection(self.reports.append, self.losses.append)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._frames = wire.FrameBuffer()
        self._received: list[ToWorker] = []

    async def connect(self) -> None:
        with listen(self.path) as listener:
            assert self.path.stat().st_mode & 0o777 == 0o600
            accepting = asyncio.create_task(accept(listener, self.path, self.connection))
            await asyncio.get_running_loop().sock_connect(self.socket, os.fspath(self.path))
            await accepting

    async def send(self, *messages: FromWorker) -> None:
        await self.send_bytes(b"".join(wire.encode(message) for message in messages))

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self) -> ToWorker:
        while not self._received:
            data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
            assert data, "the gateway closed the connection"
            self._received += map(wire.to_worker_decoder.decode, self._frames.feed(data))
        return self._received.pop(0)

    def generate(self, id: str, timeout: float = FOREVER) -> Inbox:
        return self.connection.generate(Generate(id=id, prompt_ids=[1, 2], max_tokens=9), timeout)


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    peer = Peer(tmp_path / "gateway.sock")
    await peer.connect()
    yield peer
    peer.connection.close("the test is over")
    peer.socket.close()
    await asyncio.sleep(0)  # asyncio closes the socket in its next turn
    await asyncio.sleep(0)


def delta(id: str, *token_ids: int, **rest: object) -> TokenDelta:
    return TokenDelta(id=id, token_ids=list(token_ids), **rest)  # type: ignore[arg-type]


async def read_all(inbox: Inbox) -> list[int]:
    tokens: list[int] = []
    while True:
        try:
            for delta in await inbox.next():
                tokens += delta.token_ids
        except StopAsyncIteration:
            return tokens


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_path_is_gone_once_connected(peer: Peer) -> None:
    assert not peer.path.exists()
    assert peer.connection.is_connected


async def test_a_request_is_sent_whole(peer: Peer) -> None:
    request = Generate(id="a", prompt_ids=[5], max_tokens=3, stop_token_ids=[7], cache_salt=b"x")
    peer.connection.generate(request, FOREVER)
    assert await peer.receive() == request


async def test_deltas_reach_the_reader_of_their_id_in_order(peer: Peer) -> None:
    a, b = peer.generate("a"), peer.generate("b")
    await peer.send(Tokens([delta("a", 1), delta("b", 10)]), Tokens([delta("b", 11), delta("a", 2, 3)]))
    await peer.send(Tokens([delta("a", 4, finish_reason="stop"), delta("b", 12, finish_reason="length")]))
    assert await read_all(a) == [1, 2, 3, 4]
    assert await read_all(b) == [10, 11, 12]


@pytest.mark.parametrize("size", [1, 3, 7])
async def test_frames_may_come_in_pieces(peer: Peer, size: int) -> None:
    inbox = peer.generate("a")
    data = wire.encode(Tokens([delta("a", 1)])) + wire.encode(Tokens([delta("a", 2, finish_reason="stop")]))
    for start in range(0, len(data), size):
        await peer.send_bytes(data[start : start + size])
        await asyncio.sleep(0)
    assert await read_all(inbox) == [1, 2]


async def test_outstanding_counts_what_was_sent_and_has_not_ended(peer: Peer) -> None:
    assert peer.connection.idle.is_set()
    a, b = peer.generate("a"), peer.generate("b")
    peer.generate("c")
    assert peer.connection.num_outstanding == 3
    await peer.send(Tokens([delta("a", 1, finish_reason="stop")]))
    await peer.send(Tokens([delta("b", error=RequestError("internal", "no"))]))
    assert await read_all(a) == [1]
    assert [delta.error for delta in await b.next()] == [RequestError("internal", "no")]
    assert peer.connection.num_outstanding == 1
    assert not peer.connection.idle.is_set()
    peer.connection.abort("c")
    assert peer.connection.num_outstanding == 0
    assert peer.connection.idle.is_set()


async def test_abort_is_sent_once_and_only_for_what_has_not_ended(peer: Peer) -> None:
    a = peer.generate("a")
    peer.generate("b")
    await peer.send(Tokens([delta("a", finish_reason="length")]))
    await read_all(a)
    for id in ("a", "b", "b", "unknown"):
        peer.connection.abort(id)
    peer.generate("last")
    received = [await peer.receive() for _ in range(4)]
    assert [message.id for message in received] == ["a", "b", "b", "last"]
    assert received[2] == Abort("b")


async def test_late_deltas_of_an_aborted_sequence_are_dropped(peer: Peer) -> None:
    peer.generate("a")
    b = peer.generate("b")
    peer.connection.abort("a")
    await peer.send(Tokens([delta("a", 1), delta("b", 2, finish_reason="stop")]))
    assert await read_all(b) == [2]


async def test_reports_go_to_the_owner(peer: Peer) -> None:
    reports: list[Report] = [
        Progress("load", 0.5),
        Stats(num_steps=3, num_running=1),
        Failed("no memory", False),
    ]
    await peer.send(*reports)
    await until(lambda: len(peer.reports) == 3)
    assert peer.reports == reports


async def test_the_end_of_the_stream_fails_every_sequence_after_what_came(peer: Peer) -> None:
    inboxes = [peer.generate(str(number)) for number in range(3)]
    waiting = asyncio.create_task(inboxes[2].next())
    await peer.send(Tokens([delta("0", 1), delta("1", 2)]))
    peer.socket.close()
    with pytest.raises(WorkerLost):
        await waiting
    assert [delta.token_ids for delta in await inboxes[0].next()] == [[1]]
    for inbox in inboxes[:2]:
        with pytest.raises(WorkerLost):
            await read_all(inbox)
    assert peer.losses == ["the worker group died"]
    assert peer.connection.num_outstanding == 0


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\3abc", wire.encode(Abort("a"))],
    ids=["too long", "not msgpack", "not a message", "a message of ours"],
)
async def test_a_malformed_frame_ends_the_group(peer: Peer, data: bytes) -> None:
    inbox = peer.generate("a")
    await peer.send_bytes(data)
    with pytest.raises(WorkerLost, match="malformed frame"):
        await inbox.next()
    assert len(peer.losses) == 1
    assert "malformed frame" in peer.losses[0]


async def test_close_is_no_loss(peer: Peer) -> None:
    inbox = peer.generate("a")
    peer.connection.close("shutting down")
    with pytest.raises(WorkerLost, match="shutting down"):
        await inbox.next()
    assert await asyncio.get_running_loop().sock_recv(peer.socket, 1 << 16) != b""  # the request
    assert await asyncio.get_running_loop().sock_recv(peer.socket, 1) == b""
    assert peer.losses == []


async def test_silence_times_out_one_sequence_and_aborts_it(peer: Peer) -> None:
    silent, other = peer.generate("silent", 0.1), peer.generate("other")
    with pytest.raises(TimeoutError, match="responseTimeout"):
        await silent.next()
    assert [(await peer.receive()).id for _ in range(2)] == ["silent", "other"]
    assert await peer.receive() == Abort("silent")
    assert peer.connection.num_outstanding == 1
    await peer.send(Tokens([delta("other", 1, finish_reason="stop")]))
    assert await read_all(other) == [1]


async def test_every_token_puts_the_timeout_off(peer: Peer) -> None:
    inbox = peer.generate("a", 0.3)
    for number in range(8):
        await peer.send(Tokens([delta("a", number)]))
        await asyncio.sleep(0.06)
    await peer.send(Tokens([delta("a", 8, finish_reason="length")]))
    assert await read_all(inbox) == list(range(9))


async def test_tokens_and_a_counter_that_moves_are_signs_of_a_step(peer: Peer) -> None:
    peer.generate("a")
    for message, num_signs in [
        (Stats(num_steps=0), 1),
        (Stats(num_steps=0, num_running=1), 1),  # the heartbeat goes on, the counter stands
        (Tokens([delta("a", 1)]), 2),
        (Progress("load", 0.5), 2),
        (Stats(num_steps=7), 3),
    ]:
        num_reports = len(peer.reports)
        await peer.send(message)
        await until(lambda n=num_reports: len(peer.reports) > n or peer.connection.num_signs > 1)  # type: ignore[misc]
        await until(lambda n=num_signs: peer.connection.num_signs == n)  # type: ignore[misc]
    assert len(peer.reports) == 4


async def test_whom_a_cancelled_accept_did_not_take_the_next_one_takes(tmp_path: Path) -> None:
    loop, path = asyncio.get_running_loop(), tmp_path / "gateway.sock"
    with listen(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        accepting = asyncio.create_task(accept_peer(listener))
        await asyncio.sleep(0)
        client.connect(os.fspath(path))
        loop.call_soon(accepting.cancel)  # in the very turn of the loop that finds the listener readable
        await asyncio.wait([accepting])
        assert accepting.cancelled()
        async with asyncio.timeout(5):
            accepted = await accept_peer(listener)
        with accepted:
            assert not accepted.getblocking()
            client.sendall(b"x")
            assert await loop.sock_recv(accepted, 1) == b"x"


async def test_a_name_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TMPDIR"):
        listen(tmp_path / ("x" * 120))


async def test_what_a_slow_reader_leaves_is_kept_as_few_deltas_with_all_tokens() -> None:
    inbox = Inbox("a", 0.0)
    for number in range(10_000):
        logprob = TokenLogprob(-float(number))
        inbox.push(
            TokenDelta(
                id="a",
                token_ids=[number],
                logprobs=[logprob],
                num_cached_tokens=3 if number == 0 else None,
                finish_reason="stop" if number == 9_999 else None,
                is_stop_token=number == 9_999,
            )
        )
    inbox.end()
    deltas = await inbox.next()
    with pytest.raises(StopAsyncIteration):
        await inbox.next()
    assert [id for delta in deltas for id in delta.token_ids] == list(range(10_000))
    assert [logprob.logprob for delta in deltas for logprob in delta.logprobs] == [-n for n in range(10_000)]
    assert deltas[0].num_cached_tokens == 3
    assert [delta.finish_reason for delta in deltas] == [None] * 63 + ["stop"]
    assert deltas[-1].is_stop_token

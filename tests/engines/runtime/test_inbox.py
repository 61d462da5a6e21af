"""The leader's end of the gateway socket, against a real unix socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import wire
from engines.runtime import inbox as inbox_module
from engines.runtime.inbox import Inbox

TIMEOUT = 10.0


class FakeGateway:
    """Accepts one worker and speaks frames with it."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.frames = wire.FrameBuffer()
        self.received: list[bytes] = []

    def accept(self) -> None:
        self.peer, _ = self.listener.accept()
        self.peer.settimeout(TIMEOUT)

    def receive(self) -> wire.FromWorker:
        while not self.received:
            data = self.peer.recv(1 << 16)
            if not data:
                raise EOFError
            self.received += self.frames.feed(data)
        message: wire.FromWorker = wire.from_worker_decoder.decode(self.received.pop(0))
        return message

    def close(self) -> None:
        self.peer.close()
        self.listener.close()


class Pair:
    """An inbox and the gateway it is connected to."""

    def __init__(self, path: Path) -> None:
        self.gateway = FakeGateway(path)
        self.exit_codes: list[int] = []
        self.has_exited = threading.Event()
        self.inbox = Inbox(path, self._exit)
        self.gateway.accept()

    def _exit(self, code: int) -> None:
        self.exit_codes.append(code)
        self.has_exited.set()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "gateway.sock")
    yield pair
    pair.inbox.close()
    pair.gateway.close()


def poll_until(inbox: Inbox, count: int) -> list[wire.ToWorker]:
    messages: list[wire.ToWorker] = []
    while len(messages) < count and not inbox.closed:
        inbox.wait(TIMEOUT)
        arrived = inbox.poll()
        assert arrived or inbox.closed, "nothing came"
        messages += arrived
    return messages


def generate(id: str) -> wire.Generate:
    return wire.Generate(id=id, prompt_ids=[1, 2, 3], max_tokens=4)


def test_requests_come_in_order_and_unharmed(pair: Pair) -> None:
    assert pair.inbox.poll() == []
    sent: list[wire.ToWorker] = [generate("a"), wire.Abort("a"), generate("b")]
    stream = b"".join(map(wire.encode, sent))
    pair.gateway.peer.sendall(stream[:7])
    pair.gateway.peer.sendall(stream[7:])
    assert poll_until(pair.inbox, 3) == sent


def test_wait_ends_at_its_timeout(pair: Pair) -> None:
    pair.inbox.wait(0.01)
    assert pair.inbox.poll() == []
    assert not pair.inbox.closed


def test_deltas_reach_the_gateway_in_order(pair: Pair) -> None:
    sent = [wire.Tokens([wire.TokenDelta(id=str(i), token_ids=[i])]) for i in range(50)]
    for message in sent:
        pair.inbox.send(message)
    assert [pair.gateway.receive() for _ in sent] == sent


def test_the_heartbeat_carries_what_was_published_last(pair: Pair) -> None:
    pair.inbox.publish(wire.Stats(num_steps=1))
    pair.inbox.publish(wire.Stats(num_steps=7, num_running=2))
    assert pair.gateway.receive() == wire.Stats(num_steps=7, num_running=2)
    assert pair.gateway.receive() == wire.Stats(num_steps=7, num_running=2), "it beats on without the leader"


def test_a_slow_gateway_does_not_block_the_leader_and_loses_nothing(pair: Pair) -> None:
    """Far more than a socket holds is sent before the gateway reads any of it."""
    sent = [wire.Tokens([wire.TokenDelta(id=str(i), token_ids=list(range(5000)))]) for i in range(100)]
    for message in sent:
        pair.inbox.send(message)
    assert [pair.gateway.receive() for _ in sent] == sent


def test_a_gateway_that_never_reads_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_UNSENT_BYTES", 1 << 20)
    message = wire.Tokens([wire.TokenDelta(id="a", token_ids=[70_000] * 100_000)])
    for _ in range(20):
        pair.inbox.send(message)
    pair.inbox.wait(TIMEOUT)
    assert pair.inbox.closed


def test_the_end_of_the_stream_is_seen(pair: Pair) -> None:
    pair.gateway.peer.close()
    pair.inbox.wait(TIMEOUT)
    assert pair.inbox.closed
    pair.inbox.send(wire.Progress("load", 0.5))  # to nobody, and no error
    pair.inbox.close()
    assert pair.exit_codes == [], "a leader that closes in time is not ended"


def test_a_stuck_leader_is_ended_after_the_gateway(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "EXIT_GRACE_SECONDS", 0.01)
    pair.gateway.peer.close()
    assert pair.has_exited.wait(TIMEOUT)
    assert pair.exit_codes == [1]


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02hi", wire.encode(wire.Progress("load", 0.0))]
)
def test_what_cannot_be_decoded_closes(pair: Pair, data: bytes) -> None:
    pair.gateway.peer.sendall(data)
    pair.inbox.wait(TIMEOUT)
    assert pair.inbox.closed
    assert pair.inbox.poll() == []


def test_close_sends_what_is_left(pair: Pair) -> None:
    """The reason of a failure is larger than the socket's buffer, and still arrives whole."""
    failed = wire.Failed("x" * (4 << 20), permanent=True)
    received: list[wire.FromWorker] = []
    reader = threading.Thread(target=lambda: received.append(pair.gateway.receive()))
    pair.inbox.send(failed)
    reader.start()
    pair.inbox.close()
    reader.join(TIMEOUT)
    assert received == [failed]


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Inbox(tmp_path / "gateway.sock")

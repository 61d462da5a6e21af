"""The group's own wire: the leader's plans to the followers, their load reports to the leader.

Length-prefixed bytes over unix sockets, the leader in the middle. A socket blocks for as long as the
group idles without a time-out of its own, and its EOF tells each side at once that the other one died,
which a collective would not.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import msgspec

_LENGTH = struct.Struct("<I")


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a follower tells the leader once it has loaded, or could not."""

    rank: int
    pid: int
    num_blocks: int = 0  # K/V blocks that fit its memory
    error: str | None = None
    is_permanent: bool = False


class Pipe:
    """One connection. EOFError when the other side is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, data: bytes) -> None:
        """Raises OSError when the other side is gone."""
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(length)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        filled = 0
        while filled < size:
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise EOFError("the other end of the group's channel is gone")
            filled += count
        return bytes(data)


class ReadAhead:
    """What a pipe receives, read by a thread as it comes, so that its sender never waits for what is done
    with it: a stage that waits for room to send hidden states must not keep the leader from taking them."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._received: SimpleQueue[bytes | None] = SimpleQueue()
        Thread(target=self._run, name="plans", daemon=True).start()

    def receive(self) -> bytes:
        """As Pipe's. EOFError once, after all that came."""
        data = self._received.get()
        if data is None:
            raise EOFError("the other end of the group's channel is gone")
        return data

    def _run(self) -> None:
        try:
            while True:
                self._received.put(self._pipe.receive())
        except (EOFError, OSError):
            self._received.put(None)


class PlanSender:
    """The leader's end. Listens from the start; `accept` waits until every follower has connected."""

    def __init__(self, path: Path, num_followers: int) -> None:
        self._path = path
        self._num_followers = num_followers
        self._pipes: list[Pipe] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(max(num_followers, 1))

    def accept(self, timeout: float) -> None:
        """Raises TimeoutError when a follower does not come within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while len(self._pipes) < self._num_followers:
            self._server.settimeout(max(deadline - time.monotonic(), 0.001))
            connection, _ = self._server.accept()
            connection.settimeout(None)
            self._pipes.append(Pipe(connection))
        self._server.close()
        self._path.unlink()

    def reports(self) -> list[LoadReport]:
        """One report of every follower, in any order. Blocks until all have loaded."""
        return [msgspec.msgpack.decode(pipe.receive(), type=LoadReport) for pipe in self._pipes]

    def send(self, data: bytes) -> None:
        """To every follower. Raises OSError when one has died."""
        for pipe in self._pipes:
            pipe.send(data)

    def close(self) -> None:
        """The followers see EOF and end."""
        self._server.close()
        for pipe in self._pipes:
            pipe.close()


def connect(path: Path, timeout: float) -> Pipe:
    """A follower's end. Tries for `timeout` seconds, for the leader may be slower; then TimeoutError."""
    deadline = time.monotonic() + timeout
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
            return Pipe(connection)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the leader did not open {path.name} within {timeout:.0f} s") from None
            time.sleep(0.01)

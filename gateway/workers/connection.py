"""The gateway's end of one group's socket, for one start of the group: frames in, deltas to their readers.

The gateway listens, the group's rank 0 connects once, and the path is gone. A step's Tokens frame is taken
apart here: per delta it costs one dictionary look-up, one append and, if its reader waits, one wake-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from engines import wire
from engines.wire import (
    Abort,
    Failed,
    FromWorker,
    Generate,
    Progress,
    Ready,
    Stats,
    TokenDelta,
    Tokens,
    ToWorker,
)
from gateway.workers.protocol import Take, WorkerLost

Report = Progress | Ready | Failed | Stats
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
GROUP_DIED = "the worker group died"
_MAX_UNREAD = 64
"""Deltas kept apart for a reader that does not come for them; then tokens are all that is kept."""


class Inbox:
    """What has come for one sequence and has not been read yet."""

    __slots__ = ("_deltas", "_error", "_take", "_waiter", "id", "is_ended", "last_at", "timer")

    def __init__(self, id: str, now: float, take: Take | None = None) -> None:
        self.id = id
        self.last_at = now  # when something last came, on the loop's clock
        self.is_ended = False
        self.timer: asyncio.TimerHandle | None = None
        self._deltas: list[TokenDelta] = []
        self._error: Exception | None = None
        self._take = take
        self._waiter: asyncio.Future[None] | None = None

    def offer(self, delta: TokenDelta) -> bool:
        """Whether the taker has dealt with it. It is asked if its reader waits, having read all."""
        if self._take is None or self._waiter is None or self._waiter.done():
            return False
        return self._take(delta)

    def push(self, delta: TokenDelta) -> None:
        if len(self._deltas) >= _MAX_UNREAD:  # the client is slower than the group: it gets more at once
            delta = _joined(self._deltas.pop(), delta)
        self._deltas.append(delta)
        self._wake()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come; `error` is raised to the reader after what is still unread."""
        self.is_ended, self._error = True, error
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self._wake()

    async def next(self) -> list[TokenDelta]:
        """All that has come, at least one. Raises StopAsyncIteration after the last delta, or what `end` was
        given."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self.is_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        deltas, self._deltas = self._deltas, []
        return deltas

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _joined(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    """Both as one; the first is used up."""
    first.token_ids.extend(second.token_ids)
    first.logprobs.extend(second.logprobs)
    first.prompt_logprobs.extend(second.prompt_logprobs)
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        num_cached_tokens=first.num_cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
    )


class Connection(asyncio.Protocol):
    """Demultiplexes what a group sends. `on_report` gets everything but tokens; `on_lost` is called once
    with the reason when the group is gone (or babbles), unless `close` was called first."""

    def __init__(self, on_report: Callable[[Report], None], on_lost: Callable[[str], None]) -> None:
        self._on_report, self._on_lost = on_report, on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._frames = wire.FrameBuffer()
        self._inboxes: dict[str, Inbox] = {}
        self._num_steps = -1
        self.num_signs = 0  # messages that told of a step finished since the one before
        self.num_lost = 0  # sequences that its end has ended
        self.is_connected = False
        self.idle = asyncio.Event()  # nothing outstanding
        self.idle.set()

    @property
    def num_outstanding(self) -> int:
        """Sequences sent and not ended."""
        return len(self._inboxes)

    def generate(self, request: Generate, timeout: float, take: Take | None = None) -> Inbox:
        """Send one sequence. It ends with TimeoutError, and Abort, when `timeout` seconds bring nothing.
        `take` is offered what comes while its reader waits."""
        assert request.id not in self._inboxes, "ids are unique"
        inbox = Inbox(request.id, self._loop.time(), take)
        self._inboxes[request.id] = inbox
        self.idle.clear()
        self._send(request)
        inbox.timer = self._loop.call_later(timeout, self._check_silence, inbox, timeout)
        return inbox

    def abort(self, id: str) -> None:
        """Stop a sequence that has not ended; else nothing happens."""
        if id in self._inboxes:
            self._end(self._inboxes[id])
            self._send(Abort(id))

    def close(self, reason: str) -> None:
        """End the connection, and every sequence in it with WorkerLost(reason). The group ends on EOF."""
        self.is_connected = False
        if self._transport is not None:
            self._transport.abort()
        self.num_lost += len(self._inboxes)
        for inbox in list(self._inboxes.values()):
            self._end(inbox, WorkerLost(reason))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self.is_connected = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(GROUP_DIED)  # `exc` only tells whether it left something unread

    def data_received(self, data: bytes) -> None:
        try:
            messages = [wire.from_worker_decoder.decode(body) for body in self._frames.feed(data)]
        except (ValueError, msgspec.DecodeError) as error:
            self.lose(f"the worker group sent a malformed frame: {error}")
            return
        for message in messages:
            self._dispatch(message, is_alone=len(messages) == 1)

    def _dispatch(self, message: FromWorker, *, is_alone: bool) -> None:
        if type(message) is Tokens:
            self._deliver(message.deltas, offers=is_alone)
            return
        if isinstance(message, Stats) and message.num_steps != self._num_steps:
            self._num_steps = message.num_steps
            self.num_signs += 1
        assert not isinstance(message, Tokens)
        if self.is_connected:  # a report before it may have closed this
            self._on_report(message)

    def _deliver(self, deltas: list[TokenDelta], *, offers: bool) -> None:
        """Of several steps that have come together each reader gets what there is in one go: it lags."""
        self.num_signs += 1
        now = self._loop.time()
        inboxes = self._inboxes
        for delta in deltas:
            inbox = inboxes.get(delta.id)
            if inbox is None:  # aborted a moment ago
                continue
            inbox.last_at = now
            if not (offers and inbox.offer(delta)):
                inbox.push(delta)
            if delta.finish_reason is not None or delta.error is not None:
                self._end(inbox)

    def _end(self, inbox: Inbox, error: Exception | None = None) -> None:
        del self._inboxes[inbox.id]
        inbox.end(error)
        if not self._inboxes:
            self.idle.set()

    def _check_silence(self, inbox: Inbox, timeout: float) -> None:
        """One timer a sequence, moved on only when it fires: a delta costs no timer."""
        now = self._loop.time()
        if now < inbox.last_at + timeout:
            inbox.timer = self._loop.call_at(inbox.last_at + timeout, self._check_silence, inbox, timeout)
            return
        self._end(inbox, TimeoutError(f"no token within responseTimeout, {timeout:g} s"))
        self._send(Abort(inbox.id))

    def _send(self, message: ToWorker) -> None:
        if self.is_connected and self._transport is not None:
            self._transport.write(wire.encode(message))

    def lose(self, reason: str) -> None:
        """The group is gone, or has to go."""
        if self.is_connected:
            self.close(reason)
            self._on_lost(reason)


def listen(path: Path) -> socket.socket:
    """A unix socket at `path` that only this user may connect to.

    Raises ValueError when the path is too long for one, OSError when it cannot be made."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(1)
    except OSError as error:
        listener.close()
        if "too long" in str(error):
            raise ValueError(
                f"{path} is too long for a unix socket (107 bytes); set TMPDIR to a shorter path"
            ) from error
        raise
    return listener


async def accept(listener: socket.socket, path: Path, connection: Connection) -> None:
    """Connect the one peer; it must be of this user. Then nobody else can: listener and path are gone."""
    peer = await accept_peer(listener)
    listener.close()
    os.unlink(path)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, peer)


async def accept_peer(listener: socket.socket) -> socket.socket:
    """The next connection of this user's; others are closed. Non-blocking, as the listener has to be.

    Not `loop.sock_accept`: cancelled in the turn in which a peer arrives, that raises InvalidStateError in
    the loop and leaks the connection."""
    while True:
        await _readable(listener)
        with contextlib.suppress(BlockingIOError, InterruptedError, ConnectionAbortedError):  # it went away
            peer, _ = listener.accept()
            if peer_uid(peer) == os.getuid():
                peer.setblocking(False)
                return peer
            peer.close()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def peer_uid(peer: socket.socket) -> int:
    """Which user is at the other end of a unix socket."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])

"""Rank 0's end of the socket to the gateway, and the thread that serves it.

The leader never waits for the gateway: requests are read while a step runs, and what a slow gateway
does not take is kept until it does. The end of the stream means that the gateway is gone; the group
has no purpose then, and this process ends even if the leader is stuck in a collective.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from engines.wire import FrameBuffer, FromWorker, Stats, ToWorker, encode, to_worker_decoder

log = logging.getLogger("sluice.inbox")

HEARTBEAT_SECONDS = 0.5
CONNECT_SECONDS = 10.0
FLUSH_SECONDS = 1.0
EXIT_GRACE_SECONDS = 1.0
"""How long the leader may take to end by itself once the gateway is gone."""
MAX_UNSENT_BYTES = 128 << 20
"""A gateway that leaves more than this unread hangs: it is given up, as if it had closed."""
_READ_BYTES = 1 << 18


class Inbox:
    """Connects at once; raises OSError if nobody listens at `path`.

    All methods are for the leader's thread. `end_process` is called from the I/O thread if the leader has not
    called close() within EXIT_GRACE_SECONDS of the gateway's end.
    """

    def __init__(self, path: Path, end_process: Callable[[int], object] = os._exit) -> None:
        self._socket = _connect(path)
        self._end_process = end_process
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._arrived = threading.Condition()  # guards _messages, _closed
        self._messages: list[ToWorker] = []
        self._closed = False
        self._writing = threading.Lock()  # guards _unsent and writes to the socket
        self._unsent = bytearray()
        self._stats: Stats | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="inbox", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether the gateway is gone (or was given up)."""
        return self._closed

    def poll(self) -> list[ToWorker]:
        """What has come since the last call, in order. Does not wait."""
        if not self._messages:
            return []
        with self._arrived:
            messages, self._messages = self._messages, []
        return messages

    def wait(self, timeout: float) -> None:
        """Until there is something to poll, the gateway is gone, or `timeout` seconds have passed."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._messages or self._closed, timeout)

    def send(self, message: FromWorker) -> None:
        """Never blocks. What the gateway does not take now is sent later, in order; nothing once gone."""
        frame = encode(message)
        with self._writing:
            was_empty = not self._unsent
            self._unsent += frame
            if was_empty:
                self._write()
            self._give_up_if_stalled()
            has_rest = bool(self._unsent)
        if has_rest:
            self._wake_up()

    def publish(self, stats: Stats) -> None:
        """The latest counters, for the heartbeat."""
        self._stats = stats

    def close(self) -> None:
        """Send what is left, for at most FLUSH_SECONDS, and end the connection. Nothing is sent after."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._wake_up()
        self._thread.join(FLUSH_SECONDS + 1.0)
        os.close(self._wake)

    # ------------------------------------------------------------------ the I/O thread

    def _serve(self) -> None:
        try:
            self._exchange()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.error("the connection to the gateway failed: %s", error)
        if self._ending.is_set():
            self._flush()
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        self._socket.close()
        if not self._ending.wait(EXIT_GRACE_SECONDS):
            log.warning("the gateway is gone and the leader is stuck: this process ends")
            self._end_process(1)

    def _exchange(self) -> None:
        """Read, write and beat until the gateway closes or close() is called."""
        frames = FrameBuffer()
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._ending.is_set():
                selector.modify(self._socket, self._interest())
                ready = selector.select(max(0.0, next_beat - time.monotonic()))
                for key, events in ready:
                    if key.fd == self._wake:
                        os.eventfd_read(self._wake)
                    elif not self._read_and_write(frames, events):
                        return
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + HEARTBEAT_SECONDS
                    self._beat()

    def _interest(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def _read_and_write(self, frames: FrameBuffer, events: int) -> bool:
        """False at the end of the stream."""
        if events & selectors.EVENT_WRITE:
            with self._writing:
                self._write()
        if events & selectors.EVENT_READ:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                return False
            self._deliver([to_worker_decoder.decode(body) for body in frames.feed(data)])
        return True

    def _deliver(self, messages: list[ToWorker]) -> None:
        if messages:
            with self._arrived:
                self._messages += messages
                self._arrived.notify_all()

    def _beat(self) -> None:
        if self._stats is not None:
            self.send(self._stats)

    # ------------------------------------------------------------------ either thread

    def _write(self) -> None:
        """As much as the socket takes. With _writing held. A broken socket is left for the reader to find."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()

    def _give_up_if_stalled(self) -> None:
        if len(self._unsent) > MAX_UNSENT_BYTES:
            log.error("the gateway has left %d bytes unread: given up", len(self._unsent))
            self._unsent.clear()
            self._socket.shutdown(socket.SHUT_RDWR)  # the reader finds the end of the stream

    def _flush(self) -> None:
        """What is left, for at most FLUSH_SECONDS."""
        with self._writing:
            try:
                self._socket.settimeout(FLUSH_SECONDS)
                self._socket.sendall(self._unsent)
            except OSError as error:
                log.warning("not everything reached the gateway: %s", error)

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_SECONDS)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    connection.setblocking(False)
    return connection

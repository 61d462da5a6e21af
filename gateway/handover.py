"""From one gateway to the next on the same port, without a refused or reset connection.

The listening socket itself is handed over, as a descriptor over a unix socket: its queue of connections goes
on whatever happens to either process. (With a second socket on the port, by SO_REUSEPORT, the connections in
the queue of the one that is closed are reset.)

    successor (`serve --replace`)          predecessor (Offer)
    connects                  -------->    of the same user? then: the listener
    starts its groups                      goes on serving
    accepts; "ready"          -------->    accepts no more, ends what it has, ends
    (or dies)                 -- EOF -->   goes on serving; may be replaced by another
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from gateway.workers.connection import accept_peer, listen, peer_uid

log = logging.getLogger(__name__)

_HELLO, _READY = b"sluice listener 1", b"ready"
_ANSWER_SECONDS = 10.0


class CannotReplace(ValueError):  # noqa: N818
    """There is a gateway on the port, but it cannot be replaced now."""


class Predecessor:
    """The gateway that is to be replaced, found at its address."""

    def __init__(self, control: socket.socket, listener: socket.socket) -> None:
        self._control = control
        self.listener = listener

    def dismiss(self) -> None:
        """We accept now: it shall accept no more, and end. One that has ended meanwhile needs no telling."""
        with contextlib.suppress(ConnectionError), self._control:
            self._control.sendall(_READY)


def find_predecessor(host: str, port: int, directory: Path | None = None) -> Predecessor | None:
    """The gateway of this user on that address; None when there is none.

    `directory` is the temporary directory that both use. Raises CannotReplace."""
    wanted = {info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    refusal = None
    for path in _directory(directory).glob(f"sluice.*.{port}.sock"):
        control = _connect(path)
        if control is None:
            continue
        try:
            listener = _take_listener(control, path)
        except CannotReplace as error:
            refusal = error
            continue
        if listener.getsockname()[:2] in wanted:
            return Predecessor(control, listener)
        listener.close()
        control.close()
    if refusal is not None:
        raise refusal
    return None


def _connect(path: Path) -> socket.socket | None:
    """None when nobody is there any more, or somebody who is not this user."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.settimeout(_ANSWER_SECONDS)
    with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
        try:
            control.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()  # of a killed gateway
        else:
            if peer_uid(control) == os.getuid():
                return control
    control.close()
    return None


def _take_listener(control: socket.socket, path: Path) -> socket.socket:
    try:
        hello, descriptors, _, _ = socket.recv_fds(control, len(_HELLO), 1)
    except TimeoutError:
        hello, descriptors = b"", []
    if hello != _HELLO or len(descriptors) != 1:
        control.close()
        raise CannotReplace(
            f"the gateway at {path} does not hand over: it is ending, of another version, or being replaced "
            "already; try again, or stop it first"
        )
    return socket.socket(fileno=descriptors[0])


@contextlib.asynccontextmanager
async def offer(listener: socket.socket, directory: Path | None = None) -> AsyncIterator[asyncio.Event]:
    """Within the context, a successor may take the listener over; the event is set when it is ready."""
    path = _directory(directory) / f"sluice.{os.getpid()}.{listener.getsockname()[1]}.sock"
    taken = asyncio.Event()
    try:
        path.unlink(missing_ok=True)  # of a gateway long dead that had our pid
        control = listen(path)
    except (OSError, ValueError) as error:
        log.warning("no other gateway can replace this one (--replace): %s", error)
        yield taken
        return
    offering = asyncio.create_task(_offer(control, path, listener, taken))
    try:
        yield taken
    finally:
        offering.cancel()
        await asyncio.wait([offering])


async def _offer(control: socket.socket, path: Path, listener: socket.socket, taken: asyncio.Event) -> None:
    """To one after another, until one says that it is ready."""
    loop = asyncio.get_running_loop()
    try:
        while not taken.is_set():
            peer = await accept_peer(control)
            with peer, contextlib.suppress(OSError):  # it went away
                socket.send_fds(peer, [_HELLO], [listener.fileno()])
                if await loop.sock_recv(peer, len(_READY)) == _READY:
                    taken.set()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        control.close()


def _directory(directory: Path | None) -> Path:
    return directory or Path(tempfile.gettempdir())

"""The listening socket: made here, or handed in by systemd (socket activation)."""

from __future__ import annotations

import os
import socket

_BACKLOG = 2048
_FIRST_PASSED = 3  # descriptor, by systemd's convention: see sd_listen_fds(3)


class CannotListen(ValueError):  # noqa: N818
    """The address cannot be listened on. The message says why and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Clients that come early wait in its queue until the app is there.

    Raises CannotListen."""
    remedy = "choose another with --port (0: any free one) or --host"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    return sock


def from_systemd() -> socket.socket | None:
    """The socket that systemd listens on for this service; it stays open when we end, so nobody is refused
    over a restart. None without socket activation. Raises CannotListen when it is not one TCP socket."""
    is_for_us = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    num_passed = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not is_for_us:
        return None
    if num_passed != "1":
        raise CannotListen(f"systemd passed {num_passed} sockets; give the .socket unit one ListenStream")
    sock = socket.socket(fileno=_FIRST_PASSED)
    sock.set_inheritable(False)
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise CannotListen("systemd passed a socket that is not TCP; in the .socket unit: ListenStream=PORT")
    return sock


def notify_systemd(state: str) -> None:
    """Tell systemd `READY=1` or `STOPPING=1`, for a service of Type=notify; without effect elsewhere."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), path.replace("@", "\0", 1) if path.startswith("@") else path)


def url_of(listener: socket.socket) -> str:
    """The API's base address, as a client on this machine would write it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

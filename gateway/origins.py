"""The ASGI layer that keeps web pages of other origins out of a server that asks for no key.

A browser lets any page send a request here, though not read the answer, and to a server on the user's own
machine it comes as if from the user. Browsers say in `Origin` whose page it is. A name that is made to mean
this machine (DNS rebinding) makes a page look like one of ours: over the loopback interface only addresses
and localhost count as that.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.keys import KeyRing

_MAX_SHOWN = 100


class ForeignPage(Exception):  # noqa: N818
    """A web page of another origin asks."""


class Origins:
    """Refuses requests of pages that are neither ours nor of `allowed` origins ("*": all), unless there are
    keys: which a foreign page does not know."""

    def __init__(self, app: ASGIApp, keys: KeyRing, allowed: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys.is_open and "*" not in self._allowed:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and origin not in self._allowed:
                server = scope.get("server")
                if not is_own(origin, headers.get("host", ""), server[0] if server else ""):
                    raise ForeignPage(
                        f"Web pages of {origin[:_MAX_SHOWN]} may not ask this server, which has no API keys."
                        f" Start it with --cors-origin {origin[:_MAX_SHOWN]} to let them, or with --api-key."
                    )
        await self._app(scope, receive, send)


def is_own(origin: str, host: str, address: str) -> bool:
    """Whether a page of `origin` is one of the server that was asked as `host` on its own `address`."""
    try:
        ours, theirs = urlsplit(f"//{host}"), urlsplit(origin)
        if theirs.scheme not in ("http", "https") or theirs.netloc != ours.netloc or not theirs.hostname:
            return False
        return _is_fixed(theirs.hostname) or not _is_loopback(address)
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    ip = ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _is_fixed(name: str) -> bool:
    """Nobody can make another machine's name of it, or this machine's of another's."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True

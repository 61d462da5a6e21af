"""ASGI layers around the application: request ids and timing, API keys.

They are plain ASGI, not Starlette's BaseHTTPMiddleware, which would put a queue under every stream.
"""

from __future__ import annotations

import re
import secrets
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import APIError, InvalidKey, to_api_error
from gateway.keys import KeyRing
from gateway.metrics import Metrics

OPEN_PATHS = frozenset({b"/livez", b"/readyz"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


async def send_error(error: APIError, send: Send) -> None:
    """A whole response."""
    body = error.body
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class RequestContext:
    """The outermost layer: x-request-id and openai-processing-ms on every response, and the last word
    on an exception: to the client a general 500, to the log the traceback."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(1000 * (perf_counter() - started)))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            api_error = to_api_error(error, method=scope["method"], path=scope["path"], request_id=request_id)
            self._metrics.errors[api_error.label] += 1
            if has_started:
                raise
            await send_error(api_error, send_with_headers)


def _request_id(given: str | None) -> str:
    """The caller's, if it is harmless. It is only a label, never a key."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"


class ApiKeys:
    """Refuses what comes without a known key, whatever it is, but for GET and HEAD of OPEN_PATHS; and counts
    a key's POST requests against its limits."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise InvalidKey("Only HTTP is served here.")
        tenant = self._keys.find(_key(Headers(scope=scope)))
        if tenant is None:
            raise InvalidKey(
                "Incorrect API key provided, or none: send it in the Authorization header,"
                " as 'Authorization: Bearer KEY'."
            )
        scope.setdefault("state", {})["tenant"] = tenant
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with tenant.request():
            await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    """By the path as it was sent, byte for byte; `path` has been decoded, and is what the routes go by."""
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and scope.get("raw_path") in OPEN_PATHS
        and scope["path"].encode() == scope["raw_path"]
    )


def _key(headers: Headers) -> bytes | None:
    """Of the Authorization header, or of x-api-key, which Anthropic's clients send."""
    authorization = headers.get("authorization")
    if authorization is None:
        key = headers.get("x-api-key", "")
    else:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
    return key.strip().encode("latin-1")

"""ASGI layers around the application: request ids and timing, API keys.

They are plain ASGI, not Starlette's BaseHTTPMiddleware, which would put a queue under every stream.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import APIError, InvalidKey, to_api_error
from gateway.metrics import Metrics

OPEN_PATHS = frozenset({"/livez", "/readyz"})
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
    """Refuses every request without a known key, whatever its method and path, but for OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(scope):
            raise InvalidKey(
                "Incorrect API key provided, or none: send it in the Authorization header,"
                " as 'Authorization: Bearer KEY'."
            )
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if not self._digests:
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

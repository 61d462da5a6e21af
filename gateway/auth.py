"""ASGI layers around the application: request ids and timing, API keys.

They are plain ASGI, not Starlette's BaseHTTPMiddleware, which would put a queue under every stream.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import MutableMapping
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import logs
from gateway.anthropic_errors import error_body, is_anthropic
from gateway.errors import APIError, InvalidKey, to_api_error
from gateway.keys import KeyRing
from gateway.metrics import Metrics
from gateway.tenant import Tenant

PROBES = frozenset({b"/livez", b"/readyz"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


async def send_error(error: APIError, body: bytes, send: Send) -> None:
    """A whole response."""
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class RequestContext:
    """The outermost layer: x-request-id, openai-processing-ms and x-ratelimit-* on every response, a line in
    the access log, and the last word on an exception: to the client a general 500, to the log the rest."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool = False) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        logs.request_id.set(request_id)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(1000 * (perf_counter() - started)))
                tenant = _tenant(state)
                if tenant is not None:
                    headers.update(tenant.headers())
                if is_anthropic(scope["path"]):
                    headers["request-id"] = request_id
                    headers.update(tenant.anthropic_headers() if tenant is not None else {})
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            api_error = to_api_error(error, method=scope["method"], path=scope["path"], request_id=request_id)
            self._metrics.errors[api_error.label] += 1
            if status is not None:
                raise
            await send_error(api_error, error_body(api_error, scope["path"], request_id), send_with_headers)
        finally:
            if self._access_log:
                tenant = _tenant(state)
                key = tenant.name if tenant is not None else None
                seconds = perf_counter() - started
                logs.log_access(scope["method"], scope.get("raw_path") or b"", status or 499, seconds, key)


def _tenant(state: MutableMapping[str, Any]) -> Tenant | None:
    """Who asks, once ApiKeys knows it."""
    tenant = state.get("tenant")
    return tenant if isinstance(tenant, Tenant) else None


def _request_id(given: str | None) -> str:
    """The caller's, if it is harmless. It is only a label, never a key."""
    return given if given and _REQUEST_ID.fullmatch(given) else new_request_id()


def new_request_id() -> str:
    return f"req_{secrets.token_hex(16)}"


class ApiKeys:
    """Refuses what comes without a known key, whatever it is, but for GET and HEAD of `open_paths`; and
    counts a key's POST requests against its limits."""

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: frozenset[bytes] = PROBES) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope, self._open_paths):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise InvalidKey("Only HTTP is served here.")
        tenant = self._keys.find(_key(Headers(scope=scope)))
        if tenant is None:
            raise InvalidKey(
                "Incorrect API key provided, or none: send it in the Authorization header,"
                " as 'Authorization: Bearer KEY', or as x-api-key."
            )
        scope.setdefault("state", {})["tenant"] = tenant
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with tenant.request():
            await self._app(scope, receive, send)


def _is_open(scope: Scope, open_paths: frozenset[bytes]) -> bool:
    """By the path as it was sent, byte for byte; `path` has been decoded, and is what the routes go by."""
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and scope.get("raw_path") in open_paths
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

"""What the routes share: the application's parts, JSON responses, and starting a generation."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import msgspec
from fastapi import Request
from starlette.responses import Response

from gateway.admission import Admission
from gateway.errors import APIError, to_api_error
from gateway.grammar import Grammars
from gateway.keys import KeyRing
from gateway.metrics import Metrics
from gateway.response_store import ResponseStore
from gateway.router import Router
from gateway.settings import Settings
from gateway.sse import DescribeError, event
from gateway.tenant import Tenant


@dataclass(frozen=True, slots=True)
class Gateway:
    """The application's parts, at `app.state.gateway`."""

    settings: Settings
    router: Router
    metrics: Metrics
    keys: KeyRing
    admissions: Mapping[str, Admission]  # by the model's name
    grammars: Grammars
    responses: ResponseStore

    def error_of(self, request: Request, error: Exception) -> APIError:
        """What the client is told of an error in its stream. Counts it."""
        method, path, request_id = request.method, request.url.path, request.state.request_id
        api_error = to_api_error(error, method=method, path=path, request_id=request_id)
        self.metrics.errors[api_error.label] += 1
        return api_error

    def error_describer(self, request: Request) -> DescribeError:
        """Gives the error event of this request's stream, as OpenAI's older endpoints have it."""
        return lambda error: event(self.error_of(request, error).body)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is the same in a response and in all chunks of a stream."""

    id: str
    created: int
    model: str
    fingerprint: str | None


def gateway_of(request: Request) -> Gateway:
    return cast(Gateway, request.app.state.gateway)


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    return cast(Tenant, request.state.tenant)


def new_answer(prefix: str, model: str, fingerprint: str | None) -> Answer:
    return Answer(f"{prefix}-{secrets.token_hex(16)}", int(time.time()), model, fingerprint)


def json_response(content: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")

"""The HTTP application, put together. Nothing here or below imports torch or transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from gateway.admission import Admission
from gateway.anthropic_errors import error_body
from gateway.auth import PROBES, ApiKeys, RequestContext
from gateway.body_limit import BodyLimit
from gateway.errors import to_api_error
from gateway.grammar import Grammars
from gateway.keys import KeyRing
from gateway.metrics import Metrics
from gateway.origins import Origins
from gateway.response_store import ResponseStore
from gateway.router import Router, ServedModel
from gateway.routes import (
    capabilities,
    chat,
    completions,
    embeddings,
    messages,
    models,
    openapi,
    ops,
    page,
    responses,
    responses_stored,
    tokenize,
)
from gateway.routes.common import Gateway, gateway_of
from gateway.settings import Settings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: Settings, served_models: Sequence[ServedModel], lifespan: Lifespan | None = None
) -> FastAPI:
    """The application for these models. `lifespan` starts and stops what stands behind them.

    Raises ValueError when two models share a name, BadKeyFile.
    """
    app = FastAPI(
        title="Sluice",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # it would answer with an address made of the request's Host
        lifespan=lifespan,
        # An environment variable shall not make it connect to anybody; its records hold messages of errors.
        telemetry={"auto_configure": False, "logs": False},
    )
    responses_kept = ResponseStore(settings.response_store_bytes)
    metrics = Metrics(served_models, responses_kept)
    gateway = Gateway(
        settings,
        Router(served_models),
        metrics,
        KeyRing(settings.api_keys, settings.api_key_file),
        {model.name: Admission(model, metrics.of(model), settings.queue_timeout) for model in served_models},
        Grammars(),
        responses_kept,
    )
    app.state.gateway = gateway
    for routes in (
        capabilities,
        chat,
        completions,
        embeddings,
        messages,
        models,
        openapi,
        ops,
        responses,
        responses_stored,
        tokenize,
        *([page] if settings.page else []),
    ):
        app.include_router(routes.router)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    open_paths = PROBES | page.PATHS if settings.page else PROBES
    app.add_middleware(ApiKeys, keys=gateway.keys, open_paths=open_paths)
    app.add_middleware(Origins, keys=gateway.keys, allowed=settings.cors_origins)
    app.add_middleware(RequestContext, metrics=metrics, access_log=settings.access_log)
    if (
        settings.cors_origins
    ):  # last, outermost: errors have its headers, and a browser asks before it sends a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    return app


async def _no_such_route(request: Request, error: Exception) -> Response:
    """404 and 405. Every other exception goes on to RequestContext."""
    api_error = to_api_error(error, method=request.method, path=request.url.path)
    gateway_of(request).metrics.errors[api_error.label] += 1
    body = error_body(api_error, request.url.path, request.state.request_id)
    return Response(body, api_error.status, api_error.headers, "application/json")

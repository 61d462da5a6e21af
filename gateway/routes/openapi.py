"""GET /openapi.json: the API, as gateway/openapi.py describes it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.openapi import document
from gateway.routes.common import gateway_of

router = APIRouter()


@router.get("/openapi.json")
async def get_openapi(request: Request) -> Response:
    gateway = gateway_of(request)
    names = tuple(name for model in gateway.router.models for name in model.names)
    content = await asyncio.to_thread(
        document, names, not gateway.keys.is_open
    )  # the first time takes a while
    return Response(content, media_type="application/json")

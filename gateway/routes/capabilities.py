"""GET /v1/capabilities: what becomes of every field of every endpoint."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from gateway.protocol.capabilities import capabilities
from gateway.routes.common import json_response

router = APIRouter()


@router.get("/v1/capabilities")
async def get_capabilities() -> Response:
    return json_response(capabilities())

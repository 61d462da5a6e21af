"""GET /v1/models and /v1/models/{id}; an id may have slashes."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.protocol.models import Model, ModelList
from gateway.router import ServedModel
from gateway.routes.common import gateway_of, json_response

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Every name of every model, loaded or not."""
    models = gateway_of(request).router.models
    found = [_model(model, name) for model in models for name in model.names]
    return json_response(ModelList(data=found, first_id=found[0].id, last_id=found[-1].id))


@router.get("/v1/models/{id:path}")
async def get_model(request: Request, id: str) -> Response:
    return json_response(_model(gateway_of(request).router.find(id), id))


def _model(model: ServedModel, name: str) -> Model:
    created_at = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    return Model(
        id=name, created=model.created, owned_by=model.owned_by, display_name=name, created_at=created_at
    )
